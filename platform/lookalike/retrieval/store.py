"""Prefix store: the vectors of one shard, cut at the nested dims into blocks that are separate memory-mapped arrays.

A reader of the first m dimensions touches the blocks up to m and no others, and no dimension is stored twice.
Files of a shard folder (n rows, nested dims d_1 < ... < d_j):

- ``block-<from>-<to>.npy``: [n, to - from], float32, float16 or int8; it ends at nested dims, see ``choose_blocks``
- ``scales.npy``: [blocks, n] float32, only of int8 blocks: value = code * scale of its row and block
- ``norms.npy``: [j, n] float32, the norm of each row's prefix at each nested dim
- ``rows.arrow``: image_id and metadata columns, sorted by image_id, read through a memory map
- ``digests.npy``: [1, n] uint64, what each row was made from; a later build tells by it which rows have changed
- ``tombstones.npy``: [1, n / 8] uint8, a bit a row, the lowest first: rows that are no more. Only where there are some
- ``shard.json``: :class:`ShardMeta`, written last

Rows are stored scaled to unit length at the full dim, which float16 needs and the cosine of a prefix does not notice;
the norms are those of the stored (rounded) values, so the cosines of what is stored are exact. float16 moves a cosine
by about 1e-4, int8 by about 1e-3.
"""

import io
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field, ValidationError, model_validator

import lookalike
from lookalike import storage
from lookalike.config import Config
from lookalike.errors import ArtifactError, UsageError
from lookalike.retrieval import native
from lookalike.retrieval.native import NativeStore
from lookalike.retrieval.ranking import Floats, Rows

SHARD_META = "shard.json"
ROWS_FILE = "rows.arrow"
NORMS_FILE = "norms.npy"
SCALES_FILE = "scales.npy"
BLOCK_BYTES = 128
"""Bytes of a row that a block holds at least: to read less from a place of its own costs as much."""
HEAD_SHARE = 16
"""Beyond the first 1/16 of the dimensions all of a row lies together: scans have dropped most rows by then, and what a
funnel reads of the few that are left should be one place in memory (at 2048-d a fifth of a query's time)."""
DIGESTS_FILE = "digests.npy"
TOMBSTONES_FILE = "tombstones.npy"
FORMAT_VERSION = 2
"""Layout of a shard folder: 2 may have tombstones."""
Mask = npt.NDArray[np.bool_]
Dtype = Literal["float32", "float16", "int8"]


class ShardMeta(Config):
    """What a shard folder holds."""

    format_version: int = Field(default=FORMAT_VERSION, ge=1, le=FORMAT_VERSION)
    """Layout of the folder."""
    num_rows: int = Field(ge=0, lt=1 << 32)
    """Vectors stored."""
    row_offset: int = Field(ge=0)
    """Global number of the shard's first row."""
    dims: tuple[int, ...] = Field(min_length=1)
    """Nested dims, smallest first; the last is the size of a vector."""
    block_dims: tuple[int, ...] = ()
    """Dims at which a block ends; all nested dims when there are none."""
    dtype: Dtype = "float32"
    """Number format of the blocks."""
    shortlist: str = "flat"
    """Index type of ``shortlist-<dim>.faiss``."""
    shortlist_dims: tuple[int, ...] = ()
    """Prefixes that an index is built over."""
    num_zero: int = Field(default=0, ge=0)
    """Vectors of length zero, which have no direction and score 0 everywhere."""
    num_deleted: int = Field(default=0, ge=0)
    """Rows under tombstones: stored, but in no answer."""

    @model_validator(mode="after")
    def _nested(self) -> "ShardMeta":
        check_dims(self.dims)
        if self.block_dims and (self.block_dims[-1] != self.dim or not set(self.block_dims) <= set(self.dims)):
            raise ValueError(f"block_dims {self.block_dims} do not end at {self.dim} or are none of {self.dims}")
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
    """Raise ``UsageError`` unless ``dims`` are positive and grow."""
    if not dims or dims[0] < 1 or any(b <= a for a, b in pairwise(dims)):
        raise UsageError(f"nested dims {list(dims)} must be positive and grow, as in [8, 16, 32]")


def choose_blocks(dims: Sequence[int], dtype: str) -> tuple[int, ...]:
    """The nested dims at which blocks end: each fills ``BLOCK_BYTES``, and the last begins at ``HEAD_SHARE``."""
    chosen: list[int] = []
    for dim in dims[:-1]:
        begun = chosen[-1] if chosen else 0
        if begun * HEAD_SHARE < dims[-1] and (dim - begun) * np.dtype(dtype).itemsize >= BLOCK_BYTES:
            chosen.append(dim)
    return (*chosen, dims[-1])


def block_name(start: int, stop: int) -> str:
    """File name of the block that holds dimensions ``start`` to ``stop``."""
    return f"block-{start:05d}-{stop:05d}.npy"


def check_queries(queries: npt.ArrayLike, dim: int) -> Floats:
    """``queries`` as contiguous float32 [n, dim]; one vector counts as n = 1.

    Raises ``UsageError`` for another size, numbers that are not finite, or a vector of zeros.
    """
    array = queries if isinstance(queries, np.ndarray) else np.asarray(queries, dtype=np.float32)
    if array.dtype != np.float32 or array.ndim != 2 or not array.flags.c_contiguous:
        array = np.ascontiguousarray(np.atleast_2d(np.asarray(array, dtype=np.float32)))
    if array.ndim != 2 or array.shape[1] != dim:
        raise UsageError(f"query of shape {np.shape(queries)}: this index takes vectors of {dim} numbers")
    if len(array) == 1:  # every step of the way counts for a query alone
        if 0 < np.dot(array[0], array[0]) < np.inf:
            return array
    elif (squares := np.einsum("nd,nd->n", array, array)).min(initial=np.inf) > 0 and squares.max(initial=0) < np.inf:
        return array
    if not np.isfinite(array).all():
        raise UsageError("the query vector holds NaN or infinity; send finite numbers")
    if (norms := np.linalg.norm(array, axis=1)).size and not norms.min() > 0:
        raise UsageError("the query vector is all zeros and has no direction; send another")
    return array


def normalise(vectors: Floats) -> Floats:
    """Rows scaled to unit length, float32; rows of zeros stay zeros."""
    return vectors * inverse_norms(np.linalg.norm(vectors, axis=1).astype(np.float32))[:, None]


def inverse_norms(norms: Floats) -> Floats:
    """1 / norm, and 0 where the norm is 0: such a prefix has no direction, its cosine is taken as 0."""
    return np.divide(np.float32(1), norms, out=np.zeros_like(norms), where=norms > 0)


def quantise(vectors: Floats) -> tuple[npt.NDArray[np.int8], Floats]:
    """int8 codes [n, d] from -127 to 127 and the scales float32 [n] that turn them back: value ~ code * scale."""
    largest = np.abs(vectors).max(axis=1, initial=0).astype(np.float32)
    scales = largest / np.float32(127)
    inverse = np.divide(np.float32(127), largest, out=np.zeros_like(largest), where=largest > 0)
    return np.rint(vectors * inverse[:, None]).astype(np.int8), scales


def to_float32(array: npt.NDArray[Any]) -> Floats:
    """``array`` as float32; halves go through a table of all 65,536, twice as fast as numpy's cast on CPUs."""
    if array.dtype == np.float16:
        return _HALVES.take(np.ascontiguousarray(array).view(np.uint16))
    return np.asarray(array, dtype=np.float32)


_HALVES: Floats = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)


class PrefixWriter:
    """Fills the blocks and norms of a shard, in any order of rows; :meth:`close` flushes them."""

    def __init__(self, folder: str, meta: ShardMeta) -> None:
        self.meta = meta
        self.num_zero = 0
        create = np.lib.format.open_memmap
        self._blocks = [
            create(f"{folder}/{block_name(a, b)}", mode="w+", dtype=meta.dtype, shape=(meta.num_rows, b - a))
            for a, b in meta.block_borders
        ]
        self._norms = create(
            f"{folder}/{NORMS_FILE}", mode="w+", dtype=np.float32, shape=(len(meta.dims), meta.num_rows)
        )
        self._scales = (
            create(f"{folder}/{SCALES_FILE}", mode="w+", dtype=np.float32, shape=(len(self._blocks), meta.num_rows))
            if meta.dtype == "int8"
            else None
        )

    def write(self, rows: Rows, vectors: Floats) -> None:
        """Store raw ``vectors`` [m, dim] float32 as ``rows`` [m]."""
        unit = normalise(vectors)
        squares = np.zeros(len(rows), np.float64)
        for number, (start, stop) in enumerate(self.meta.block_borders):
            if self._scales is None:
                self._blocks[number][rows] = block = unit[:, start:stop].astype(self.meta.dtype)
                held = block.astype(np.float64)
            else:
                codes, scales = quantise(unit[:, start:stop])
                self._blocks[number][rows], self._scales[number, rows] = codes, scales
                held = codes.astype(np.float64) * scales[:, None]
            for position, (first, last) in enumerate(self.meta.borders):
                if start <= first < stop:
                    squares += np.square(held[:, first - start : last - start]).sum(axis=1)
                    self._norms[position, rows] = np.sqrt(squares)
        self.num_zero += int((squares == 0).sum())

    def close(self) -> None:
        """Flush all to disk."""
        for array in (*self._blocks, self._norms, self._scales):
            if array is not None and array.size:
                array.flush()


def write_rows(folder: str, table: pa.Table) -> None:
    """Write the metadata table, uncompressed so that it can be read through a memory map."""
    with pa.OSFile(f"{folder}/{ROWS_FILE}", "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table.combine_chunks())


class PrefixStore:
    """A shard's vectors and metadata, opened from a local folder without reading them."""

    def __init__(self, folder: str, meta: ShardMeta) -> None:
        self.folder, self.meta = folder, meta
        arrays = [self._array(block_name(a, b), (meta.num_rows, b - a), meta.dtype) for a, b in meta.block_borders]
        self.norms = self._array(NORMS_FILE, (len(meta.dims), meta.num_rows), "float32")
        self.blocks: list[npt.NDArray[Any]] = []
        """[n, width] between neighbouring nested dims: slices of the mapped arrays."""
        self.scales: list[Floats | None] = []
        """[n] that int8 of each of ``blocks`` are multiplied with; None for floats."""
        coded = meta.dtype == "int8"
        scales = self._array(SCALES_FILE, (len(arrays), meta.num_rows), "float32") if coded else None
        for number, (array, (start, stop)) in enumerate(zip(arrays, meta.block_borders, strict=True)):
            within = [(a, b) for a, b in meta.borders if start <= a < stop]
            self.blocks += [array[:, a - start : b - start] for a, b in within]
            self.scales += [None if scales is None else scales[number]] * len(within)
        if len(self.table) != meta.num_rows:
            raise ArtifactError(
                f"{folder}/{ROWS_FILE} has {len(self.table)} rows, {SHARD_META} says {meta.num_rows}; "
                "build the index again"
            )

    @classmethod
    def open(cls, folder: str) -> "PrefixStore":
        """Open a shard folder; ``ArtifactError`` when a file is missing or is not what ``shard.json`` says."""
        return cls(folder, read_meta(folder))

    def _array(self, name: str, shape: tuple[int, int], dtype: str) -> npt.NDArray[Any]:
        path = f"{self.folder}/{name}"
        try:
            array: npt.NDArray[Any] = np.load(path, mmap_mode="r" if shape[0] * shape[1] else None, allow_pickle=False)
        except FileNotFoundError:
            raise ArtifactError(f"{path} is missing; build the index again or restore it from a copy") from None
        except (ValueError, EOFError, OSError) as error:
            raise ArtifactError(f"{path} is damaged ({error}); build the index again") from None
        if array.shape != shape or array.dtype != np.dtype(dtype):
            raise ArtifactError(
                f"{path} holds {array.dtype}{list(array.shape)}, not {dtype}{list(shape)}; build the index again"
            )
        return array

    @cached_property
    def table(self) -> pa.Table:
        """image_id and metadata columns, one line a row, memory-mapped."""
        path = f"{self.folder}/{ROWS_FILE}"
        try:
            return pa.ipc.open_file(pa.memory_map(path)).read_all()
        except FileNotFoundError:
            raise ArtifactError(f"{path} is missing; build the index again or restore it from a copy") from None
        except pa.ArrowInvalid as error:
            raise ArtifactError(f"{path} is damaged ({error}); build the index again") from None

    @cached_property
    def _rows(self) -> pa.RecordBatch | pa.Table:
        """The table as its one batch, if it has one: rows are taken out of it in less than half the time."""
        batches = self.table.to_batches()
        return batches[0] if len(batches) == 1 else self.table

    def read_rows(self, rows: Rows, columns: Sequence[str] | None = None) -> list[dict[str, str]]:
        """What some rows, numbered within the shard, hold in ``columns`` (all by default), nulls left out."""
        names = self.table.schema.names if columns is None else columns
        read: list[dict[str, str]] = [{} for _ in range(len(rows))]
        for name, column in zip(names, self.read_columns(rows, names), strict=True):
            for record, value in zip(read, column, strict=True):
                if value is not None:
                    record[name] = value
        return read

    def read_columns(self, rows: Rows, columns: Sequence[str]) -> list[list[str | None]]:
        """The same by column, None for a null."""
        taken = self._rows.select(columns).take(pa.array(rows))
        read = []
        for column in taken.columns:
            values = column.to_pylist()
            text = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
            read.append(values if text else [None if value is None else str(value) for value in values])
        return read

    @cached_property
    def live(self) -> Mask | None:
        """Which rows are not deleted, bool [n]; None when all are there."""
        if not self.meta.num_deleted:
            return None
        num_rows = self.meta.num_rows
        bits = self._array(TOMBSTONES_FILE, (1, -(-num_rows // 8)), "uint8")[0]
        deleted = np.unpackbits(bits, count=num_rows, bitorder="little").astype(bool)
        if int(deleted.sum()) != self.meta.num_deleted:
            raise ArtifactError(
                f"{self.folder}/{TOMBSTONES_FILE} marks {deleted.sum()} rows, {SHARD_META} says "
                f"{self.meta.num_deleted}; build the index again"
            )
        return ~deleted

    @cached_property
    def native(self) -> NativeStore | None:
        """The same arrays for the C library, which numbers rows by 31 bits; None where that is not there."""
        if not native.AVAILABLE or not 0 < self.meta.num_rows < 1 << 31:
            return None
        return NativeStore(self.blocks, np.ascontiguousarray(self.norms), self.meta.dtype, self.scales)

    def position(self, dim: int) -> int:
        """Where ``dim`` stands among the nested dims; ``UsageError`` when it is none of them."""
        if dim not in self.meta.dims:
            raise UsageError(f"dim {dim} is not a nested dim of the index, which has {list(self.meta.dims)}")
        return self.meta.dims.index(dim)

    def read(self, rows: slice | Rows, dim: int | None = None) -> Floats:
        """The first ``dim`` numbers of ``rows``, float32 [m, dim], unit length at the full dim."""
        last = self.position(self.meta.dim if dim is None else dim)
        return np.hstack([self.numbers(position, rows) for position in range(last + 1)])

    def numbers(self, position: int, rows: slice | Rows) -> Floats:
        """What ``rows`` hold between nested dims ``position`` - 1 and ``position``: float32, [*rows.shape, width]."""
        numbers, scales = to_float32(self.blocks[position][rows]), self.scales[position]
        return np.ascontiguousarray(numbers if scales is None else numbers * scales[rows][..., None])

    def unit_prefix(self, dim: int) -> Floats:
        """All rows' prefixes scaled to unit length, float32 [n, dim]: what a shortlist index is built over."""
        result = np.empty((self.meta.num_rows, dim), np.float32)
        for part in row_slices(self.meta.num_rows, max(1, (1 << 22) // dim)):
            result[part] = self.read(part, dim)
            result[part] *= inverse_norms(np.asarray(self.norms[self.position(dim), part]))[:, None]
        return result


def row_slices(num_rows: int, step: int) -> Iterator[slice]:
    """Consecutive slices of at most ``step`` rows."""
    return (slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step))


def read_meta(folder: str) -> ShardMeta:
    """A finished shard folder's ``shard.json``; ``ArtifactError`` when it is missing or damaged."""
    path = storage.join(folder, SHARD_META)
    try:
        return ShardMeta.model_validate(require_format(json.loads(storage.read_bytes(path)), FORMAT_VERSION, path))
    except FileNotFoundError:
        raise ArtifactError(f"{path} is missing: the folder is no finished shard; build the index again") from None
    except (ValueError, ValidationError) as error:
        raise ArtifactError(f"{path} is damaged ({str(error).splitlines()[0]}); build the index again") from None


def require_format(values: Any, newest: int, path: str) -> Any:
    """``values`` read from ``path``, unless their ``format_version`` is above the ``newest`` that is known here."""
    version = values.get("format_version") if isinstance(values, dict) else None
    if isinstance(version, int) and version > newest:
        raise ArtifactError(
            f"{path} has format {version}, this lookalike {lookalike.__version__} reads up to {newest};"
            " upgrade lookalike, or build the index again with this one"
        )
    return values


def write_tombstones(folder: str, deleted: Mask) -> None:
    """Mark the rows of a shard that are no more, bool [n]; ``folder`` may be remote."""
    content = io.BytesIO()
    np.save(content, np.packbits(deleted, bitorder="little")[None])
    storage.write_atomic(storage.join(folder, TOMBSTONES_FILE), content.getvalue())


def write_store(folder: str, meta: ShardMeta, table: pa.Table, batches: Iterable[tuple[Rows, Floats]]) -> ShardMeta:
    """Write blocks, norms and metadata of a shard from batches of (rows, raw vectors) that cover every row once.

    Returns what ``shard.json`` is to say: ``meta`` with its blocks chosen and its zero vectors counted."""
    meta = meta.model_copy(update={"block_dims": choose_blocks(meta.dims, meta.dtype)})
    writer = PrefixWriter(folder, meta)
    for rows, vectors in batches:
        writer.write(rows, vectors)
    writer.close()
    write_rows(folder, table)
    return meta.model_copy(update={"num_zero": writer.num_zero})
