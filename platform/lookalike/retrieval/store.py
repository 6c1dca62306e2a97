"""Prefix store: the vectors of one shard, cut at the nested dims into blocks that are separate memory-mapped arrays.

A reader of the first m dimensions touches only the blocks up to m, and no dimension is stored twice. Rows are stored at
unit length in the full dim: float16 needs that, and the cosine of a prefix does not change. The norms are those of the
stored (rounded) values, so the cosines of the stored values are exact. float16 moves a cosine by about 1e-4, int8 by
about 1e-3. ``shard_meta.py`` lists the files.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from lookalike.errors import ArtifactError, UsageError
from lookalike.retrieval import native
from lookalike.retrieval.native import NativeStore
from lookalike.retrieval.ranking import Floats, Mask, Rows
from lookalike.retrieval.shard_meta import (
    NORMS_FILE,
    ROWS_FILE,
    SCALES_FILE,
    SHARD_META,
    TOMBSTONES_FILE,
    ShardMeta,
    block_name,
    explained,
    read_meta,
)
from lookalike.retrieval.vectors import inverse_norms, row_slices, to_float32


class PrefixStore:
    """A shard's vectors and metadata, opened from a local folder without reading them."""

    def __init__(self, folder: str, meta: ShardMeta) -> None:
        self.folder, self.meta = folder, meta
        arrays = [self._array(block_name(a, b), (meta.num_rows, b - a), meta.dtype) for a, b in meta.block_borders]
        self.norms = self._array(NORMS_FILE, (len(meta.dims), meta.num_rows), "float32")
        self.blocks: list[npt.NDArray[Any]] = []
        """[n, width] between neighbouring nested dims: slices of the memory-mapped arrays."""
        self.scales: list[Floats | None] = []
        """[n] float32 for each of ``blocks``, the factor of its int8 codes; None for floats."""
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
        """Open a shard folder; ``ArtifactError`` if a file is missing or contradicts ``shard.json``."""
        return cls(folder, read_meta(folder))

    def _array(self, name: str, shape: tuple[int, int], dtype: str) -> npt.NDArray[Any]:
        path = f"{self.folder}/{name}"
        with explained(path):
            array: npt.NDArray[Any] = np.load(path, mmap_mode="r" if shape[0] * shape[1] else None, allow_pickle=False)
        if array.shape != shape or array.dtype != np.dtype(dtype):
            raise ArtifactError(
                f"{path} holds {array.dtype}{list(array.shape)}, not {dtype}{list(shape)}; build the index again"
            )
        return array

    @cached_property
    def table(self) -> pa.Table:
        """image_id and metadata columns, memory-mapped."""
        path = f"{self.folder}/{ROWS_FILE}"
        with explained(path):
            return pa.ipc.open_file(pa.memory_map(path)).read_all()

    @cached_property
    def _rows(self) -> pa.RecordBatch | pa.Table:
        """The table as a single batch if it has only one: taking rows is then more than twice as fast."""
        batches = self.table.to_batches()
        return batches[0] if len(batches) == 1 else self.table

    def read_rows(self, rows: Rows, columns: Sequence[str] | None = None) -> list[dict[str, str]]:
        """Values of ``columns`` (default: all) in ``rows``, numbered within the shard; nulls are left out."""
        names = self.table.schema.names if columns is None else columns
        records: list[dict[str, str]] = [{} for _ in range(len(rows))]
        for name, column in zip(names, self.read_columns(rows, names), strict=True):
            for record, value in zip(records, column, strict=True):
                if value is not None:
                    record[name] = value
        return records

    def read_columns(self, rows: Rows, columns: Sequence[str]) -> list[list[str | None]]:
        """The same by column, with None for a null."""
        result = []
        for column in self._rows.select(columns).take(pa.array(rows)).columns:
            values = column.to_pylist()
            text = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
            result.append(values if text else [None if value is None else str(value) for value in values])
        return result

    @cached_property
    def live(self) -> Mask | None:
        """Rows that are not deleted, bool [n]; None if no row is deleted."""
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
        """The same arrays for the C library; None without it, or with more rows than its 31 bits can number."""
        if not native.AVAILABLE or not 0 < self.meta.num_rows < 1 << 31:
            return None
        return NativeStore(self.blocks, np.ascontiguousarray(self.norms), self.meta.dtype, self.scales)

    def position(self, dim: int) -> int:
        """Place of ``dim`` among the nested dims; ``UsageError`` if it is not one of them."""
        if dim not in self.meta.dims:
            raise UsageError(f"dim {dim} is not a nested dim of the index, which has {list(self.meta.dims)}")
        return self.meta.dims.index(dim)

    def read(self, rows: slice | Rows, dim: int | None = None) -> Floats:
        """The first ``dim`` numbers (default: all) of ``rows``, float32 [m, dim], of unit length in the full dim."""
        last = self.position(self.meta.dim if dim is None else dim)
        return np.hstack([self.numbers(position, rows) for position in range(last + 1)])

    def numbers(self, position: int, rows: slice | Rows) -> Floats:
        """Numbers of ``rows`` between nested dims ``position`` - 1 and ``position``, float32 [*rows.shape, width]."""
        numbers, scales = to_float32(self.blocks[position][rows]), self.scales[position]
        return np.ascontiguousarray(numbers if scales is None else numbers * scales[rows][..., None])

    def unit_prefix(self, dim: int) -> Floats:
        """Prefixes of all rows at unit length, float32 [n, dim]: the input of a shortlist index."""
        result = np.empty((self.meta.num_rows, dim), np.float32)
        for part in row_slices(self.meta.num_rows, max(1, (1 << 22) // dim)):
            result[part] = self.read(part, dim)
            result[part] *= inverse_norms(np.asarray(self.norms[self.position(dim), part]))[:, None]
        return result
