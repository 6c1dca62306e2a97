"""The duplicate search of a corpus that no task holds: copies, cells, and the pairs of each cell, by shuffles."""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lookalike import storage
from lookalike.data.candidates import (
    Cells,
    cell_keys,
    count_cells,
    cut_cells,
    sample_share,
    search_cell,
    train_cells,
)
from lookalike.data.copies import COPIES, find_copies, find_leaders, select_searched
from lookalike.data.features import feature_schema, unit_rows, vectors_of
from lookalike.data.parts import Item, blocks_of, broadcast, collect, read_table, part_name, write_table
from lookalike.data.signatures import ROW_SHIFT
from lookalike.data.steps.exchange import exchange, num_buckets, read_part, total, with_key, work_items
from lookalike.data.steps.job import LabelJob
from lookalike.data.steps.signatures import HELD_OUT
from lookalike.data.twins import words_of
from lookalike.sampling import mix_keys, stable_keys


def held_groups(job: LabelJob) -> frozenset[str]:
    """Groups whose training rows are dropped: as many as the held-out splits have, broadcast."""
    groups = read_table(job.out.work(HELD_OUT))["group"].to_pylist() if job.config.dedup.hold_out_groups else []
    return frozenset(groups)


def split_copies(job: LabelJob, rows: int) -> dict[str, Any]:
    """``copies/part-N``: the rows of each part that follow one in another part, or a held-out row of equal bytes."""
    shared, buckets = broadcast(held_groups(job)), num_buckets(rows)

    def spread(item: Item) -> pa.Table:
        leaders = find_leaders(read_table(item["uri"]), shared())
        key = words_of(leaders["content"])[:, 0] % np.uint64(buckets)
        return with_key(leaders, key.astype(np.int64))

    signatures = work_items(job, "signatures")
    exchange(job, signatures, spread, lambda _, found: find_copies(found), kind="all_copies", rows=rows)
    items = work_items(job, "all_copies")
    copies = _count_rows(job, items)

    def gather(item: Item) -> pa.Table:
        table = read_table(item["uri"])
        return with_key(table, table["row"].to_numpy() >> ROW_SHIFT)

    exchange(job, items, gather, lambda _, part: part.sort_by("row"), kind="copies", rows=copies)
    return {"copies": copies}


def _count_rows(job: LabelJob, items: list[Item]) -> int:
    return sum(total(job, items, lambda item: [read_table(item["uri"], ["row"]).num_rows]))


class _Searched:
    """Reads the rows of a part that are searched, in a task."""

    def __init__(self, job: LabelJob) -> None:
        self._held, self._copies = broadcast(held_groups(job)), job.out.work("copies")

    def __call__(self, item: Item) -> pa.Table:
        copies = read_part(self._copies, item["number"], COPIES)
        return select_searched(read_table(item["uri"]), self._held(), copies)


def place_rows(job: LabelJob, rows: int) -> dict[str, Any]:
    """``cells/part-N``: the cells of every searched row. The result holds the images of each cell."""
    config, cells = job.config.dedup, count_cells(rows, job.config.dedup)
    searched, items = _Searched(job), work_items(job, "signatures")
    shared = broadcast(_train(job, searched, rows, cells))
    folder = job.out.work("cells")

    def place(item: Item) -> list[int]:
        target = storage.join(folder, part_name(item["number"]))
        if storage.exists(target):
            found = np.stack(read_table(target)["cells"].to_pylist() or [[]]).astype(np.int64)
        else:
            vectors = unit_rows(vectors_of(searched(item)))
            found = Cells(shared(), config.probes).nearest(vectors)
            write_table(target, pa.table({"cells": pa.array(found.tolist(), pa.list_(pa.int32()))}))
        return np.bincount(found.ravel(), minlength=len(shared())).tolist()

    return {"counts": total(job, items, place)}


def _train(job: LabelJob, searched: _Searched, rows: int, cells: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Centroids, from the images whose hash is small: the same however the corpus is cut."""
    seed, share = job.config.seed, sample_share(rows, cells)
    least = np.uint64(min(int(share * 2.0**64), 2**64 - 1))

    def sample(item: Item) -> pa.Table:
        table = searched(item).select(["image_id", "vector"])
        keys = mix_keys(stable_keys(table["image_id"].to_pylist()), seed, "cells")
        return table.filter(pa.array(keys <= least))

    items = work_items(job, "signatures")
    dim = read_table(items[0]["uri"], ["vector"]).schema.field("vector").type.list_size
    chosen = collect(job.map(items, sample), feature_schema(dim)).sort_by("image_id")
    shared = broadcast(unit_rows(vectors_of(chosen)))

    def train(_: Item) -> pa.Table:
        centroids = train_cells(shared(), cells, seed)
        flat = pa.array(centroids.reshape(-1), pa.float32())
        return pa.table({"centroid": pa.FixedSizeListArray.from_arrays(flat, centroids.shape[1])})

    tables = list(blocks_of(job.map([{"number": 0}], train)))
    return vectors_of(pa.concat_tables(tables), "centroid")


def search_cells(job: LabelJob, rows: int, counts: list[int]) -> dict[str, Any]:
    """``pairs/part-K`` of every cell, or cut of a cell, K. The one shuffle of signatures: ``probes`` times each."""
    config = job.config.dedup
    searched, folder = _Searched(job), job.out.work("cells")
    first, cuts = cut_cells(np.array(counts, np.int64))

    def spread(item: Item) -> pa.Table:
        table = searched(item).drop_columns(["dataset"])
        placed = read_part(folder, item["number"], pa.schema([("cells", pa.list_(pa.int32()))]))
        cells = np.array(placed["cells"].to_pylist(), np.int64).reshape(table.num_rows, -1)
        keys = cell_keys(cells, first, cuts, words_of(table["pdq"]))
        places = np.repeat(np.arange(table.num_rows), cells.shape[1])
        once = np.unique(np.stack([places, keys.reshape(-1)], axis=1), axis=0)
        return with_key(table.take(pa.array(once[:, 0])), once[:, 1])

    items = work_items(job, "signatures")
    exchange(job, items, spread, lambda _, cell: search_cell(cell, config), kind="pairs", rows=rows * config.probes)

    def count(item: Item) -> list[int]:
        split = read_table(item["uri"], ["split"])["split"]
        return [pc.sum(split.is_null()).as_py() or 0, len(split)]

    inside, found = total(job, work_items(job, "pairs"), count) or (0, 0)
    return {"inside": inside, "pairs": found}
