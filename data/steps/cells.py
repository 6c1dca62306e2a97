"""The duplicate search of a corpus that no task holds: copies, cells, and the pairs of each cell, by shuffles."""

from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from lookalike.data.duplicates.copies import COPIES, find_copies, find_leaders, select_searched
from lookalike.data.duplicates.pair_search import (
    Cells,
    band_keys,
    cell_keys,
    count_cells,
    cut_cells,
    sample_share,
    search_cell,
    train_cells,
)
from lookalike.data.duplicates.signatures import ROW_SHIFT
from lookalike.data.duplicates.twins import words_of
from lookalike.data.features import feature_schema, unit_rows, vectors_of
from lookalike.data.parts import Item, blocks_of, broadcast, collect, read_table, write_table
from lookalike.data.steps.exchange import exchange, num_buckets, read_part, total, with_key, work_items
from lookalike.data.steps.job import LabelJob
from lookalike.data.steps.signing import HELD_OUT
from lookalike.sampling import mix_keys, stable_keys

_CELLS = "cells.parquet"


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


def make_cells(job: LabelJob, rows: int) -> dict[str, Any]:
    """``cells.parquet`` in the work folder: centroids, and about how many rows come to each.

    Trained by one task on the images whose hash is small, which are the same however the corpus is cut; at most
    ``MAX_SAMPLE`` vectors pass through the driver.
    """
    seed, config, cells = job.config.seed, job.config.dedup, count_cells(rows, job.config.dedup)
    share, searched, target = sample_share(rows, cells), _Searched(job), job.out.work(_CELLS)
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
        placed = Cells(centroids, config.probes).nearest(shared())
        counts = np.bincount(placed.ravel(), minlength=len(centroids)) / share
        flat = pa.FixedSizeListArray.from_arrays(pa.array(centroids.reshape(-1)), centroids.shape[1])
        write_table(target, pa.table({"centroid": flat, "rows": pa.array(counts.astype(np.int64))}))
        return pa.table({"cells": [len(centroids)]})

    return {"cells": sum(block["cells"][0].as_py() for block in blocks_of(job.map([{"number": 0}], train)))}


@lru_cache(maxsize=1)  # a worker's tasks share it: to build the graph of many cells takes seconds
def _read_cells(uri: str, probes: int) -> tuple[Cells, NDArray[np.int64], NDArray[np.int64]]:
    table = read_table(uri)
    return Cells(vectors_of(table, "centroid"), probes), *cut_cells(table["rows"].to_numpy())


def search_cells(job: LabelJob, rows: int) -> dict[str, Any]:
    """``pairs/part-K`` of every cell, or cut of a cell, K. The one shuffle of signatures: each goes to
    ``probes`` cells and ``hash_bands`` buckets of equal pieces of hashes.
    """
    config = job.config.dedup
    searched, centroids = _Searched(job), job.out.work(_CELLS)

    def spread(item: Item) -> pa.Table:
        table = searched(item).drop_columns(["dataset"])
        cells, first, cuts = _read_cells(centroids, config.probes)
        keys = cell_keys(cells.nearest(unit_rows(vectors_of(table))), first, cuts, words_of(table["pdq"]))
        sharp = table["trimmed_quality"].to_numpy() >= config.min_quality
        bands = band_keys(words_of(table["trimmed"]), sharp, int(cuts.sum()), len(cuts), config.hash_bands)
        keys = np.concatenate([keys, bands], axis=1)
        places = np.repeat(np.arange(table.num_rows), keys.shape[1])
        once = np.unique(np.stack([places, keys.reshape(-1)], axis=1), axis=0)
        once = once[once[:, 1] >= 0]
        return with_key(table.take(pa.array(once[:, 0])), once[:, 1])

    items = work_items(job, "signatures")
    exchange(
        job,
        items,
        spread,
        lambda _, cell: search_cell(cell, config),
        kind="pairs",
        rows=rows * (config.probes + config.hash_bands),
    )

    def count(item: Item) -> list[int]:
        split = read_table(item["uri"], ["split"])["split"]
        return [pc.sum(split.is_null()).as_py() or 0, len(split)]

    inside, found = total(job, work_items(job, "pairs"), count) or (0, 0)
    return {"inside": inside, "pairs": found}
