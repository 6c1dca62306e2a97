"""What a query's work costs on the reference core, by a model whose inputs are counts.

A count of N * D_s multiply-adds is wrong as soon as D_s is small; the model counts what a stopwatch confirms to matter:
the distances HNSW really computed, each a cache miss or two; the centroids, lists and rows that IVF really looked at;
one random read per re-ranked row; the selection of k; the fixed price of a step. The constants come from this code on
one core of an x86 server (AMD Milan, 16 GB/s), those of the index types from least squares over 32-d to 256-d, 50,000
rows, that of the int8 graph from its searches at 64-d and 128-d; only their ratios matter for a choice. A registered
type without prices of its own has those of a flat one.
"""

from typing import NamedTuple

from lookalike.retrieval.plan import Plan
from lookalike.retrieval.searcher import IndexMeta, Searcher
from lookalike.retrieval.shortlist import NPROBE, Work

ROW_PRICES = {
    "flat": (30.0, 0.25),
    "hnsw": (160.0, 0.33),
    "graph": (36.0, 0.20),
    "hnsw-sq8": (85.0, 0.33),
    "ivf": (2.0, 0.25),
    "ivf-pq": (1.0, 0.033),
    "ivf-rabitq": (4.0, 0.018),
    "binary": (0.7, 0.006),
}
"""Nanoseconds per row that the shortlist looks at, and per number of it: of a distance for HNSW (a random access and
the candidate heap), of a row in a list for IVF (read in order; codes in registers), of a scanned row else."""
CENTROID_NS, LIST_NS = 0.25, 600.0
"""Nanoseconds per number of an IVF centroid, and per list looked into (its tables, its first cache misses)."""
ROW_NS = (50.0, 0.40)
"""Nanoseconds per row and step of a re-rank (a random access), and per number."""
STEP_NS = 60_000.0
"""Nanoseconds per step and shard, whatever its size."""


class Effort(NamedTuple):
    """What the shortlists of all shards do for one query."""

    rows: float
    """Rows looked at: distances HNSW computed, rows of the lists IVF looked into, all of them else."""
    price: tuple[float, float]
    """Nanoseconds of each, and per number."""
    centroids: int = 0
    """IVF centroids compared with the query."""
    lists: int = 0
    """IVF lists looked into."""
    coded: bool = False
    """Whether the shortlist's prefixes are read from the store because the index keeps codes."""


def shortlist_effort(searcher: Searcher, plan: Plan, work: Work, num_queries: int) -> Effort:
    """The effort a query of ``plan``, given the ``work`` that ``num_queries`` did."""
    if plan.scan:
        return Effort(searcher.meta.num_rows, ROW_PRICES["flat"])
    indexes = [shard.index_over(plan.shortlist_dim) for shard in searcher.shards]
    lists = [min(index.nlist, plan.nprobe or NPROBE) for index in indexes]
    coded = not all(index.is_exact for index in indexes)
    price = ROW_PRICES.get(searcher.meta.shortlist, ROW_PRICES["flat"])
    counted = (work.distances or work.listed) / num_queries
    if not counted and searcher.meta.shortlist != "binary":
        price = ROW_PRICES["flat"]  # shards too small for their type are flat
    return Effort(counted or searcher.meta.num_rows, price, sum(index.nlist for index in indexes), sum(lists), coded)


def model_work(meta: IndexMeta, plan: Plan, effort: Effort) -> tuple[float, float]:
    """(microseconds, million multiply-adds) of one query by the model."""
    dim = plan.shortlist_dim
    nanoseconds = effort.rows * (effort.price[0] + effort.price[1] * dim) + STEP_NS * meta.num_shards
    nanoseconds += effort.centroids * dim * CENTROID_NS + effort.lists * LIST_NS
    operations = (effort.rows + effort.centroids) * dim
    for rows in meta.shard_rows:
        for kept, reached, before in [*_rescore(plan, rows, effort), *_steps(plan, rows)]:
            nanoseconds += STEP_NS + kept * (ROW_NS[0] + ROW_NS[1] * (reached - before))
            operations += kept * (reached - before)
    return nanoseconds / 1e3, operations / 1e6


def paper_mflops(meta: IndexMeta, plan: Plan) -> float:
    """Million multiply-adds a query by the MRL paper's formula, N * D_s + sum of K_j * D_j over all shards."""
    return sum(rows * plan.shortlist_dim + sum(kept * dim for kept, dim, _ in _steps(plan, rows))
               for rows in meta.shard_rows) / 1e6  # fmt: skip


def _rescore(plan: Plan, num_rows: int, effort: Effort) -> list[tuple[int, int, int]]:
    return [(min(plan.shortlist_k, num_rows), plan.shortlist_dim, 0)] if effort.coded else []


def _steps(plan: Plan, num_rows: int) -> list[tuple[int, int, int]]:
    """(rows read, dim reached, dim before) of each step after the shortlist on a shard of ``num_rows``."""
    kept = [min(plan.shortlist_k, num_rows), *(min(keep, num_rows) for _, keep in plan.stages)]
    dims = [plan.shortlist_dim, *(dim for dim, _ in plan.stages), plan.rerank_dim]
    if plan.rerank_dim == plan.shortlist_dim:
        return []
    return list(zip(kept, dims[1:], dims[:-1], strict=True))
