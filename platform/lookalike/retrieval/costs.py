"""The cost model of a query, and the memory that a plan needs.

N * D_s multiply-adds do not predict the time of a query when D_s is small. The model counts the work that does: the
distances that a graph computed and the beam that it kept sorted; the centroids, lists and rows that IVF looked at; the
numbers that an exact scan read before its bounds dropped the rest; the places in memory that a re-rank reads for the
rows left; each call and each step. The cost is the sum of counts times prices. The prices are fitted (non-negative
least squares on relative errors) to the times of a grid of plans::

    python -m tests.benchmarks.retrieval_plan --fit [--kind KIND] [--without-library]

``NATIVE`` and the prices of ``graph`` and ``flat`` come from it: 200,000 x 2048-d in float16, one thread of a busy AMD
EPYC. ``PLAIN`` and the prices of the other types are older: least squares over 32-d to 256-d, 50,000 rows, before the C
library existed, with estimated common prices. Only ratios matter for a choice. A registered type without its own prices
gets those of ``flat``.
"""

import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from lookalike.retrieval import native
from lookalike.retrieval.index_meta import IndexMeta
from lookalike.retrieval.plan import Plan
from lookalike.retrieval.ranking import Floats
from lookalike.retrieval.rerank import INSERTED
from lookalike.retrieval.searcher import Searcher
from lookalike.retrieval.shard_searcher import ShardSearcher
from lookalike.retrieval.shortlist import NPROBE, Work, shortlist_name

COUNTED_SCANS = 16
"""Queries whose scan is repeated to count the numbers it reads."""


class Counts(NamedTuple):
    """Work of one query in all shards; or, as prices, nanoseconds per unit of that work."""

    calls: float = 0.0
    """Searches of a shard."""
    rows: float = 0.0
    """Rows that the shortlists look at: distances computed, rows of the probed lists, or all rows."""
    row_numbers: float = 0.0
    """Numbers in these rows (in a scan with bounds: those read)."""
    beam: float = 0.0
    """Candidates that a graph's walk keeps sorted and expands."""
    centroids: float = 0.0
    """Numbers of the IVF centroids compared with the query."""
    lists: float = 0.0
    """IVF lists probed: tables, first cache misses."""
    steps: float = 0.0
    """Steps of a re-rank."""
    places: float = 0.0
    """Places in memory that a re-rank reads: one per row and block, a cache miss each."""
    numbers: float = 0.0
    """Numbers that a re-rank reads."""
    ordered: float = 0.0
    """Rows that a re-rank sorts."""


NATIVE = Counts(calls=52_000, centroids=0.25, lists=600, steps=3_700, places=43, numbers=0.31)
"""Common prices with the C library, in nanoseconds."""
PLAIN = Counts(calls=60_000, rows=60, row_numbers=0.25, centroids=0.25, lists=600, steps=60_000, places=50, numbers=0.4)
"""Common prices without it."""
TYPE_PRICES: Mapping[str, Mapping[str, float]] = {
    "flat": {"rows": 2.8, "row_numbers": 0.25},
    "hnsw": {"rows": 160, "row_numbers": 0.33},
    "graph": {"rows": 63, "row_numbers": 0.18, "beam": 159},
    "hnsw-sq8": {"rows": 85, "row_numbers": 0.33},
    "ivf": {"rows": 2, "row_numbers": 0.25},
    "ivf-pq": {"rows": 1, "row_numbers": 0.033},
    "ivf-rabitq": {"rows": 4, "row_numbers": 0.018},
    "binary": {"rows": 0.7, "row_numbers": 0.006},
    "binary-signs": {"rows": 0.7, "row_numbers": 0.006},
}
"""Prices of one index type, in place of the common ones."""


def prices_of(kind: str) -> Counts:
    """Nanoseconds per count for plans with a shortlist of ``kind``, for this machine with or without the C library."""
    general = NATIVE if native.AVAILABLE else PLAIN
    return general._replace(**TYPE_PRICES.get(kind, TYPE_PRICES["flat"]))


def model_us(counts: Counts, kind: str) -> float:
    """Modelled time of one query, in microseconds."""
    return float(np.dot(counts, prices_of(kind))) / 1e3


def multiply_adds(counts: Counts) -> float:
    """Multiply-adds of one query."""
    return counts.row_numbers + counts.centroids + counts.numbers


def count_query(
    searcher: Searcher,
    queries: Floats,
    plan: Plan,
    *,
    k: int,
    work: Work,
    left: Sequence[Sequence[float]] | None = None,
) -> tuple[Counts, str]:
    """(mean work of a query, index type whose prices apply) of ``plan``, given the ``work`` that ``queries`` did.

    ``left``: for each shard, rows that enter each step after the first, if margins make them fewer than the plan's.
    """
    shards, dim = searcher.shards, plan.shortlist_dim
    total, kind = Counts(calls=len(shards)), searcher.meta.shortlist
    if plan.scan:
        kind, numbers = "flat", sum(_count_scan(shard, queries, plan, k) for shard in shards)
        total = total._replace(rows=searcher.meta.num_rows, row_numbers=numbers)
    else:
        indexes = [shard.index_over(dim) for shard in shards]
        counted = (work.distances or work.listed) / len(queries)
        if not counted and not kind.startswith("binary"):
            kind = "flat"  # shards too small for their type are flat
        rows = counted or searcher.meta.num_rows
        beams = [min(shard.meta.num_rows, max(k, plan.shortlist_k, plan.ef_search or 0)) for shard in shards]
        total = total._replace(
            rows=rows,
            row_numbers=rows * dim,
            beam=sum(beams) if any(index.is_graph for index in indexes) else 0,
            centroids=dim * sum(index.nlist for index in indexes),
            lists=sum(min(index.nlist, plan.nprobe or NPROBE) for index in indexes),
        )
    for number, shard in enumerate(shards):
        exact = plan.scan or shard.index_over(dim).is_exact
        total = _add(total, _count_steps(shard, plan, k, exact, left[number] if left else None))
    return total, kind


def _add(left: Counts, right: Counts) -> Counts:
    return Counts(*(a + b for a, b in zip(left, right, strict=True)))


def _count_scan(shard: ShardSearcher, queries: Floats, plan: Plan, k: int) -> float:
    """Numbers that a scan of one shard reads per query."""
    library, wanted = shard.store.native, max(k, plan.shortlist_k)
    if library is None or wanted > INSERTED:
        return float(shard.meta.num_rows * plan.shortlist_dim)
    sample = np.ascontiguousarray(queries[:COUNTED_SCANS])
    blocks = shard.store.position(plan.shortlist_dim) + 1
    return library.scan(sample, blocks, min(wanted, shard.meta.num_rows))[1] / len(sample)


def _count_steps(shard: ShardSearcher, plan: Plan, k: int, exact: bool, left: Sequence[float] | None) -> Counts:
    """Work of one shard's re-rank, which also reads the prefixes unless the shortlist's cosines are ``exact``."""
    steps = plan.list_steps(k)
    sizes: list[float] = [min(max(k, plan.shortlist_k), shard.meta.num_rows)]
    sizes += left or [min(keep, shard.meta.num_rows) for _, keep, _ in steps[:-1]]
    total, reached = Counts(), plan.shortlist_dim if exact else 0
    if exact and not plan.margins:
        steps, sizes = steps[1:], sizes[1:]
    for place, ((dim, keep, margin), size) in enumerate(zip(steps, sizes, strict=True)):
        runs = sum(start < dim and stop > reached for start, stop in shard.meta.block_borders)
        sorts = keep < size or margin < np.inf or place == len(steps) - 1
        places = size * (runs if dim > reached else 0)
        total = _add(total, Counts(steps=1, places=places, numbers=size * (dim - reached), ordered=size * sorts))
        reached = dim
    return total


def paper_mflops(meta: IndexMeta, plan: Plan) -> float:
    """Million multiply-adds per query by the MRL paper's formula, N * D_s + sum of K_j * D_j over all shards."""
    total = 0
    for rows in meta.shard_rows:
        kept = [min(plan.shortlist_k, rows), *(min(keep, rows) for _, keep in plan.stages)]
        dims = [*(dim for dim, _ in plan.stages), plan.rerank_dim]
        total += rows * plan.shortlist_dim
        if plan.rerank_dim != plan.shortlist_dim:
            total += sum(size * dim for size, dim in zip(kept, dims, strict=True))
    return total / 1e6


class Memory(NamedTuple):
    """Megabytes (10^6 bytes) that a plan needs in a searcher."""

    ram: float
    """What every query walks through and must be in memory, all shards: shortlist files of the plan's dim (read or
    mapped), norms at the dims it uses, one bit per row for each thread that walks a graph."""
    shard_ram: float
    """The same for the largest shard."""
    mapped: float
    """Blocks of vectors up to the plan's last dim, and the norms for the bounds of a scan, all shards: memory-mapped,
    so the system caches as much as there is room for and reads the rest from disk."""


def plan_memory(searcher: Searcher, plan: Plan, k: int) -> Memory:
    """Memory that ``plan`` needs in a process with all shards, or with the largest one.

    Not counted: the metadata of rows (mapped), the interpreter and its libraries.
    """
    shards_ram, mapped = [], 0.0
    for shard in searcher.shards:
        rows, dims = shard.meta.num_rows, {dim for dim, *_ in plan.list_steps(k)} | {plan.shortlist_dim}
        size = 4.0 * rows * len(dims)
        if not plan.scan:
            kind = shard.meta.shortlist
            size += os.path.getsize(f"{shard.store.folder}/{shortlist_name(plan.shortlist_dim, kind)}")
            size += rows / 8 if shard.index_over(plan.shortlist_dim).is_graph else 0
        shards_ram.append(size)
        number, scale = np.dtype(shard.meta.dtype).itemsize, 4.0 * (shard.meta.dtype == "int8")
        mapped += sum(rows * ((b - a) * number + scale) for a, b in shard.meta.block_borders if a < plan.rerank_dim)
        mapped += 4.0 * rows * sum(dim not in dims and dim < plan.shortlist_dim for dim in shard.meta.dims) * plan.scan
    return Memory(sum(shards_ram) / 1e6, max(shards_ram, default=0.0) / 1e6, mapped / 1e6)
