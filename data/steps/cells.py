"""The duplicate search of a corpus too large for one task: copies, cells, and the pairs of each cell, by shuffles."""

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lookalike.data.duplicates.copies import COPIES, find_copies, find_leaders, select_searched
from lookalike.data.duplicates.pair_search import (
    CellKeys,
    Cells,
    band_keys,
    count_cells,
    sample_share,
    search_cell,
    train_cells,
)
from lookalike.data.duplicates.twins import words_of
from lookalike.data.features import feature_schema, unit_rows, vectors_of
from lookalike.data.parts import Item, broadcast, collect, read_table, write_table
from lookalike.data.steps.exchange import ONE_TASK, exchange, num_buckets, read_part, return_rows, total, with_key
from lookalike.data.steps.job import LabelJob
from lookalike.data.steps.signing import HELD_OUT
from lookalike.sampling import mix_keys, stable_keys

_CELLS = "cells.parquet"


def held_groups(job: LabelJob) -> frozenset[str]:
    """Groups whose training rows are dropped, at most those of the held-out splits."""
    groups = read_table(job.out.work(HELD_OUT))["group"].to_pylist() if job.config.dedup.hold_out_groups else []
    return frozenset(groups)


def split_copies(job: LabelJob, rows: int) -> dict[str, Any]:
    """Write ``copies/part-N``: rows of part N that equal a row of an earlier part, or a held-out row; count them."""
    shared, buckets = broadcast(held_groups(job)), num_buckets(rows)

    def spread(item: Item) -> pa.Table:
        leaders = find_leaders(read_table(item["uri"]), shared())
        return with_key(leaders, words_of(leaders["content"])[:, 0] % np.uint64(buckets))

    exchange(job, job.work_items("signatures"), spread, find_copies, kind="all_copies", rows=rows)
    counts = total(job, job.work_items("all_copies"), lambda item: [read_table(item["uri"], ["row"]).num_rows])
    copies = sum(counts)
    return_rows(job, "all_copies", "copies", copies)
    return {"copies": copies}


class _SearchedRows:
    """Reads, in a task, the rows of a part that are searched."""

    def __init__(self, job: LabelJob) -> None:
        self._held, self._copies = broadcast(held_groups(job)), job.out.work("copies")

    def __call__(self, item: Item) -> pa.Table:
        copies = read_part(self._copies, item["number"], COPIES)
        return select_searched(read_table(item["uri"]), self._held(), copies)


def make_cells(job: LabelJob, rows: int) -> dict[str, Any]:
    """Write ``cells.parquet`` into the work folder: centroids, and about how many rows come to each.

    One task trains them on the images whose hash is small, which are the same however the corpus is cut; at most
    ``MAX_SAMPLE`` vectors pass through the driver.
    """
    seed, config, cells = job.config.seed, job.config.dedup, count_cells(rows, job.config.dedup)
    share, searched, target = sample_share(rows, cells), _SearchedRows(job), job.out.work(_CELLS)
    limit = np.uint64(min(int(share * 2.0**64), 2**64 - 1))

    def sample(item: Item) -> pa.Table:
        table = searched(item).select(["image_id", "vector"])
        keys = mix_keys(stable_keys(table["image_id"].to_pylist()), seed, "cells")
        return table.filter(pa.array(keys <= limit))

    items = job.work_items("signatures")
    dim = read_table(items[0]["uri"], ["vector"]).schema.field("vector").type.list_size
    sampled = collect(job.map(items, sample), feature_schema(dim)).sort_by("image_id")
    shared = broadcast(unit_rows(vectors_of(sampled)))

    def train(_: Item) -> list[int]:
        centroids = train_cells(shared(), cells, seed)
        nearest = Cells(centroids, config.probes).nearest(shared())
        counts = np.bincount(nearest.ravel(), minlength=len(centroids)) / share
        flat = pa.FixedSizeListArray.from_arrays(pa.array(centroids.reshape(-1)), centroids.shape[1])
        write_table(target, pa.table({"centroid": flat, "rows": pa.array(counts.astype(np.int64))}))
        return [len(centroids)]

    return {"cells": total(job, ONE_TASK, train)[0]}


class _CellLookup(NamedTuple):
    cells: Cells
    keys: CellKeys


@lru_cache(maxsize=1)  # shared by a worker's tasks: building the graph of many cells takes seconds
def _read_cells(uri: str, probes: int) -> _CellLookup:
    table = read_table(uri)
    return _CellLookup(Cells(vectors_of(table, "centroid"), probes), CellKeys(table["rows"].to_numpy()))


def search_cells(job: LabelJob, rows: int) -> dict[str, Any]:
    """Write ``pairs/part-K`` of every cell, or cut of a cell, K; count the pairs, and those inside the training rows.

    This is the one shuffle of signatures: each goes to ``probes`` cells and ``hash_bands`` buckets of equal pieces of
    hashes.
    """
    config = job.config.dedup
    searched, centroids = _SearchedRows(job), job.out.work(_CELLS)

    def spread(item: Item) -> pa.Table:
        table = searched(item).drop_columns(["dataset"])
        cells, keys = _read_cells(centroids, config.probes)
        sharp = table["trimmed_quality"].to_numpy() >= config.min_quality
        of_cells = keys.of(cells.nearest(unit_rows(vectors_of(table))), words_of(table["pdq"]))
        of_bands = band_keys(words_of(table["trimmed"]), sharp, keys.total, len(keys.cuts), config.hash_bands)
        all_keys = np.concatenate([of_cells, of_bands], axis=1)
        places = np.repeat(np.arange(table.num_rows), all_keys.shape[1])
        once = np.unique(np.stack([places, all_keys.reshape(-1)], axis=1), axis=0)
        once = once[once[:, 1] >= 0]
        return with_key(table.take(pa.array(once[:, 0])), once[:, 1])

    copies = rows * (config.probes + config.hash_bands)
    signatures = job.work_items("signatures")
    exchange(job, signatures, spread, lambda cell: search_cell(cell, config), kind="pairs", rows=copies)

    def count(item: Item) -> list[int]:
        split = read_table(item["uri"], ["split"])["split"]
        return [pc.sum(split.is_null()).as_py() or 0, len(split)]

    inside, pairs = total(job, job.work_items("pairs"), count) or (0, 0)
    return {"inside": inside, "pairs": pairs}
