"""Layout of a shard folder: file names, the blocks that a vector is cut into, and ``shard.json``.

Files of a shard of n rows with nested dims d_1 < ... < d_j:

- ``block-<from>-<to>.npy``: [n, to - from], float32, float16 or int8; blocks end at nested dims, see ``choose_blocks``
- ``scales.npy``: [blocks, n] float32, only for int8 blocks: value = code * scale of its row and block
- ``norms.npy``: [j, n] float32, the norm of each row's prefix at each nested dim
- ``rows.arrow``: image_id and metadata columns, sorted by image_id, read through a memory map
- ``digests.npy``: [1, n] uint64, a hash of each row's input; a later build compares it to find changed rows
- ``tombstones.npy``: [1, n / 8] uint8, one bit per row, lowest bit first: deleted rows. Only if there are any
- ``shortlist-<dim>.faiss`` or ``.graph``: the indexes, see ``shortlist.py``
- ``shard.json``: :class:`ShardMeta`, written last
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from pydantic import Field, ValidationError, model_validator

import lookalike
from lookalike import storage
from lookalike.config import Config
from lookalike.errors import ArtifactError, UsageError

SHARD_META = "shard.json"
ROWS_FILE = "rows.arrow"
NORMS_FILE = "norms.npy"
SCALES_FILE = "scales.npy"
DIGESTS_FILE = "digests.npy"
TOMBSTONES_FILE = "tombstones.npy"
BLOCK_BYTES = 128
"""Least bytes of a row in a block: a smaller read from a separate place costs as much."""
HEAD_SHARE = 16
"""All dimensions beyond the first 1/16 of the vector lie in one block: scans have dropped most rows by then, and a
funnel reads its few remaining rows faster from one place (at 2048-d this saves a fifth of a query's time)."""
FORMAT_VERSION = 2
"""Version of the layout; 2 added tombstones."""
Dtype = Literal["float32", "float16", "int8"]


class ShardMeta(Config):
    """Content of ``shard.json``."""

    format_version: int = Field(default=FORMAT_VERSION, ge=1, le=FORMAT_VERSION)
    """Layout of the folder."""
    num_rows: int = Field(ge=0, lt=1 << 32)
    """Vectors stored."""
    row_offset: int = Field(ge=0)
    """Global number of the shard's first row."""
    dims: tuple[int, ...] = Field(min_length=1)
    """Nested dims, smallest first; the last is the size of a vector."""
    block_dims: tuple[int, ...] = ()
    """Dims at which a block ends; empty: at every nested dim."""
    dtype: Dtype = "float32"
    """Number format of the blocks."""
    shortlist: str = "flat"
    """Index type of ``shortlist-<dim>.faiss``."""
    shortlist_dims: tuple[int, ...] = ()
    """Prefixes with an index."""
    num_zero: int = Field(default=0, ge=0)
    """Vectors of length zero, which have no direction and score 0 everywhere."""
    num_deleted: int = Field(default=0, ge=0)
    """Rows under tombstones: stored, but in no answer."""

    @model_validator(mode="after")
    def _nested(self) -> "ShardMeta":
        check_dims(self.dims)
        if self.block_dims and (self.block_dims[-1] != self.dim or not set(self.block_dims) <= set(self.dims)):
            raise ValueError(f"block_dims {self.block_dims} must be dims of {self.dims} and end at {self.dim}")
        return self

    @property
    def dim(self) -> int:
        """Size of a vector."""
        return self.dims[-1]

    @property
    def borders(self) -> list[tuple[int, int]]:
        """(from, to) between neighbouring nested dims."""
        return list(pairwise((0, *self.dims)))

    @property
    def block_borders(self) -> list[tuple[int, int]]:
        """(from, to) of each block."""
        return list(pairwise((0, *(self.block_dims or self.dims))))


def check_dims(dims: Sequence[int]) -> None:
    """Raise ``UsageError`` unless ``dims`` are positive and increasing."""
    if not dims or dims[0] < 1 or any(b <= a for a, b in pairwise(dims)):
        raise UsageError(f"nested dims {list(dims)} must be positive and increasing, as in [8, 16, 32]")


def choose_blocks(dims: Sequence[int], dtype: str) -> tuple[int, ...]:
    """Nested dims at which blocks end: each block fills ``BLOCK_BYTES``, the last one begins at ``HEAD_SHARE``."""
    ends: list[int] = []
    for dim in dims[:-1]:
        start = ends[-1] if ends else 0
        if start * HEAD_SHARE < dims[-1] and (dim - start) * np.dtype(dtype).itemsize >= BLOCK_BYTES:
            ends.append(dim)
    return (*ends, dims[-1])


def block_name(start: int, stop: int) -> str:
    """File name of the block that holds dimensions ``start`` to ``stop``."""
    return f"block-{start:05d}-{stop:05d}.npy"


@contextmanager
def explained(path: str) -> Iterator[None]:
    """Turn errors of reading a local file of an index into an ``ArtifactError``."""
    try:
        yield
    except FileNotFoundError:
        raise ArtifactError(f"{path} is missing; build the index again or restore it from a copy") from None
    except (ValueError, EOFError, OSError) as error:  # pyarrow raises ValueErrors
        reason = str(error).partition("\n")[0]
        raise ArtifactError(f"{path} is damaged ({reason}); build the index again") from None


def read_meta(folder: str) -> ShardMeta:
    """``shard.json`` of a finished shard folder; ``ArtifactError`` if it is missing or damaged."""
    path = storage.join(folder, SHARD_META)
    try:
        return ShardMeta.model_validate(require_format(json.loads(storage.read_bytes(path)), FORMAT_VERSION, path))
    except FileNotFoundError:
        raise ArtifactError(f"{path} is missing: the folder is no finished shard; build the index again") from None
    except (ValueError, ValidationError) as error:
        raise ArtifactError(f"{path} is damaged ({str(error).splitlines()[0]}); build the index again") from None


def require_format(values: Any, newest: int, path: str) -> Any:
    """``values``, read from ``path``; ``ArtifactError`` if their ``format_version`` is above ``newest``."""
    version = values.get("format_version") if isinstance(values, dict) else None
    if isinstance(version, int) and version > newest:
        raise ArtifactError(
            f"{path} has format {version}, this lookalike {lookalike.__version__} reads up to {newest};"
            " upgrade lookalike, or build the index again with this one"
        )
    return values
