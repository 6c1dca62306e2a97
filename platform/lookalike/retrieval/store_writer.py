"""Writing of a shard folder: blocks, norms, metadata, tombstones."""

import io
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa

from lookalike import storage
from lookalike.retrieval.ranking import Floats, Mask, Rows
from lookalike.retrieval.shard_meta import (
    NORMS_FILE,
    ROWS_FILE,
    SCALES_FILE,
    TOMBSTONES_FILE,
    ShardMeta,
    block_name,
    choose_blocks,
)
from lookalike.retrieval.vectors import normalise, quantise


class PrefixWriter:
    """Fills the blocks and norms of a shard, rows in any order; :meth:`close` flushes them."""

    def __init__(self, folder: str, meta: ShardMeta) -> None:
        self.meta = meta
        self.num_zero = 0

        def create(name: str, dtype: str, shape: tuple[int, int]) -> np.memmap[Any, Any]:
            array = np.lib.format.open_memmap(f"{folder}/{name}", mode="w+", dtype=dtype, shape=shape)
            storage.allocate(f"{folder}/{name}")  # a write to a map that finds the disk full would end the process
            return array

        rows, borders = meta.num_rows, meta.block_borders
        self._blocks = [create(block_name(a, b), meta.dtype, (rows, b - a)) for a, b in borders]
        self._norms = create(NORMS_FILE, "float32", (len(meta.dims), rows))
        self._scales = create(SCALES_FILE, "float32", (len(borders), rows)) if meta.dtype == "int8" else None

    def write(self, rows: Rows, vectors: Floats) -> None:
        """Store raw ``vectors`` [m, dim] float32 as ``rows`` [m]."""
        unit = normalise(vectors)
        squares = np.zeros(len(rows), np.float64)
        for number, (start, stop) in enumerate(self.meta.block_borders):
            if self._scales is None:
                self._blocks[number][rows] = block = unit[:, start:stop].astype(self.meta.dtype)
                stored = block.astype(np.float64)
            else:
                codes, scales = quantise(unit[:, start:stop])
                self._blocks[number][rows], self._scales[number, rows] = codes, scales
                stored = codes.astype(np.float64) * scales[:, None]
            for position, (first, last) in enumerate(self.meta.borders):
                if start <= first < stop:
                    squares += np.square(stored[:, first - start : last - start]).sum(axis=1)
                    self._norms[position, rows] = np.sqrt(squares)
        self.num_zero += int((squares == 0).sum())

    def close(self) -> None:
        """Flush everything to disk."""
        for array in (*self._blocks, self._norms, self._scales):
            if array is not None and array.size:
                array.flush()


def write_store(folder: str, meta: ShardMeta, table: pa.Table, batches: Iterable[tuple[Rows, Floats]]) -> ShardMeta:
    """Write blocks, norms and metadata of a shard from batches of (rows, raw vectors) that cover every row once.

    Returns the content of ``shard.json``: ``meta`` with its blocks chosen and its zero vectors counted.
    """
    meta = meta.model_copy(update={"block_dims": choose_blocks(meta.dims, meta.dtype)})
    writer = PrefixWriter(folder, meta)
    for rows, vectors in batches:
        writer.write(rows, vectors)
    writer.close()
    write_rows(folder, table)
    return meta.model_copy(update={"num_zero": writer.num_zero})


def write_rows(folder: str, table: pa.Table) -> None:
    """Write the metadata table, uncompressed so that it can be memory-mapped."""
    with pa.OSFile(f"{folder}/{ROWS_FILE}", "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table.combine_chunks())


def write_tombstones(folder: str, deleted: Mask) -> None:
    """Mark the deleted rows of a shard, bool [n]; ``folder`` may be remote."""
    content = io.BytesIO()
    np.save(content, np.packbits(deleted, bitorder="little")[None])
    storage.write_atomic(storage.join(folder, TOMBSTONES_FILE), content.getvalue())
