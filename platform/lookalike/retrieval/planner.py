"""Planner: measures candidate plans against the exact answer and picks the cheapest one that is good enough.

**What is cheap** is decided by a model of a query's work (``lookalike.retrieval.costs``), not by a stopwatch, so that a
plan made twice is the same plan. The times measured on this machine stand beside it in every row, and ``rank_by`` may
be set to them.

**What is good enough** is the recall@k of the sample's lower confidence bound (bootstrap over queries), not of its
mean: the best of many candidates looks better than it is.
"""

import time
from collections.abc import Iterable, Sequence
from statistics import median
from typing import Literal

import numpy as np
from pydantic import Field

from lookalike.config import Config
from lookalike.retrieval.costs import model_work, paper_mflops, shortlist_effort
from lookalike.retrieval.metrics import per_query_overlap
from lookalike.retrieval.plan import Plan
from lookalike.retrieval.ranking import NO_ROW, Floats, Hits, Rows, top_k
from lookalike.retrieval.searcher import IndexMeta, Searcher
from lookalike.retrieval.shortlist import count_work, effort_of

RankBy = Literal["model", "measured"]
DecideBy = Literal["lower", "mean"]
TIE = 1e-6
"""Cosines this close to the k-th best are as good as it."""


class Measured(Config):
    """One candidate plan, measured."""

    plan: Plan
    """The candidate."""
    recall: float = Field(ge=0, le=1)
    """Mean recall@k against the exact answer."""
    recall_low: float = Field(ge=0, le=1)
    """Lower end of its 95% interval, bootstrap over queries."""
    recall_high: float = Field(ge=0, le=1)
    """Upper end."""
    model_us: float = Field(ge=0)
    """Modelled work of one query, in microseconds of the reference core; what plans are ranked by."""
    mflops: float = Field(ge=0)
    """Multiply-adds of one query as the MRL paper counts them (N * D_s + sum of K_j * D_j), in millions."""
    mflops_done: float = Field(ge=0)
    """Multiply-adds really done (what the shortlist looked at, and only the blocks a step adds), in millions."""
    query_us: float = Field(default=0.0, ge=0)
    """Median time of one query alone on this machine, in microseconds."""
    batch_us: float = Field(default=0.0, ge=0)
    """Time per query when all sample queries are sent at once, median of repeats, in microseconds."""
    exact_ratio: float = Field(default=0.0, ge=0)
    """How many times longer the exact answer takes, query by query, in the same run."""


def search_without(searcher: Searcher, queries: Floats, k: int, plan: Plan, own_rows: Rows) -> Hits:
    """Search, leaving each query's ``own_rows`` [n] out of its answer (-1: none): a query may be indexed itself."""
    extra = int(bool((own_rows != NO_ROW).any()))
    hits = searcher.search(queries, k + extra, plan)
    rows = np.where(hits.rows == own_rows[:, None], NO_ROW, hits.rows)
    return top_k(rows, hits.scores, k)


def per_query_recall(hits: Hits, exact: Hits, *, same_dim: bool) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Recall@k of each query, float64 [n].

    With ``same_dim`` (both carry full-dim cosines), another row that scores like the k-th exact one counts as found:
    duplicates in the database make the exact list arbitrary.
    """
    overlap = per_query_overlap(hits.rows, exact.rows)
    if not same_dim:
        return overlap
    wanted = exact.rows != NO_ROW
    kth = np.where(wanted, exact.scores, np.inf).min(axis=1, keepdims=True)
    as_good = ((hits.scores >= kth - TIE) & (hits.rows != NO_ROW)).sum(axis=1) / np.maximum(1, wanted.sum(axis=1))
    return np.asarray(np.maximum(overlap, np.minimum(1.0, as_good)))


def bootstrap_interval(values: np.ndarray[tuple[int], np.dtype[np.float64]], seed: int) -> tuple[float, float]:
    """95% interval of the mean of ``values`` over queries, from 1,000 seeded resamples."""
    generator = np.random.default_rng(seed)
    means = [values[generator.integers(0, len(values), len(values))].mean() for _ in range(1000)]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(min(low, values.mean())), float(max(high, values.mean()))


def list_plans(
    meta: IndexMeta,
    *,
    k: int,
    shortlist_ks: Sequence[int],
    efs: Sequence[int | None],
    nprobes: Sequence[int | None] = (None,),
    scan_dims: Sequence[int] = (),
    funnels: bool = True,
    single_stage: bool = True,
) -> list[Plan]:
    """Every candidate: prefixes with an index (and those to scan) x K x effort x with and without a halving funnel.

    The effort is ef or nprobe, whichever the index type takes; ef values not above K are the same as K.
    """
    effort = effort_of(meta.shortlist)
    plans: dict[str, Plan] = {}
    sources = [(dim, False) for dim in meta.shortlist_dims] + [(dim, True) for dim in scan_dims]
    for dim, scan in sources:
        if dim == meta.dim and (not single_stage or scan):
            continue
        for shortlist_k in sorted({max(k, min(size, max(meta.shard_rows))) for size in shortlist_ks}):
            beams: set[int | None] = {None}
            if effort == "ef_search" and not scan:
                beams = {None if ef is None or ef <= shortlist_k else ef for ef in efs}
            elif effort == "nprobe" and not scan:
                beams = set(nprobes)
            for beam in sorted(beams, key=lambda size: size or 0):
                for stages in [(), _halving(meta, dim, shortlist_k, 2 * k)] if funnels else [()]:
                    plan = Plan(shortlist_dim=dim, shortlist_k=shortlist_k, stages=stages, rerank_dim=meta.dim,
                                scan=scan, **({effort: beam} if effort else {}))  # fmt: skip
                    plans[plan.model_dump_json()] = plan
    return list(plans.values())


def _halving(meta: IndexMeta, dim: int, rows: int, least: int) -> tuple[tuple[int, int], ...]:
    """Half the rows at each nested dim between the shortlist's and the full one, as long as ``least`` are left."""
    between = [wider for wider in meta.dims if dim < wider < meta.dim]
    return tuple((wider, rows >> step) for step, wider in enumerate(between, start=1) if rows >> step >= least)


def measure(
    searcher: Searcher, queries: Floats, k: int, plans: Iterable[Plan], *, own_rows: Rows, seed: int
) -> list[Measured]:
    """Recall and modelled work of each plan for raw ``queries`` float32 [n, dim]; the exact plan comes first."""
    exact_plan = Plan.exact(searcher.meta.dim)
    exact = search_without(searcher, queries, k, exact_plan, own_rows)
    result = []
    for plan in [exact_plan, *plans]:
        with count_work() as done:
            hits = search_without(searcher, queries, k, plan, own_rows)
            effort = shortlist_effort(searcher, plan, done(), len(queries))
        recall = per_query_recall(hits, exact, same_dim=plan.rerank_dim == searcher.meta.dim)
        low, high = bootstrap_interval(recall, seed)
        model_us, mflops_done = model_work(searcher.meta, plan, effort)
        result.append(Measured(
            plan=plan, recall=float(recall.mean()), recall_low=low, recall_high=high, model_us=model_us,
            mflops=paper_mflops(searcher.meta, plan), mflops_done=mflops_done,
        ))  # fmt: skip
    return result


def time_plans(
    searcher: Searcher, queries: Floats, k: int, measured: Sequence[Measured], *, repeats: int
) -> list[Measured]:
    """The same candidates with times: each repeat runs all of them in turn, so that all see the same machine."""
    single: list[list[float]] = [[] for _ in measured]
    batch: list[list[float]] = [[] for _ in measured]
    for _ in range(repeats):
        for number, candidate in enumerate(measured):
            batch[number].append(_seconds(searcher, queries, k, candidate.plan) / len(queries))
            single[number].append(median(_seconds(searcher, query[None], k, candidate.plan) for query in queries))
    exact = median(single[0])
    return [
        candidate.model_copy(update={"query_us": median(one) * 1e6, "batch_us": median(many) * 1e6,
                                     "exact_ratio": exact / median(one)})
        for candidate, one, many in zip(measured, single, batch, strict=True)
    ]  # fmt: skip


def _seconds(searcher: Searcher, queries: Floats, k: int, plan: Plan) -> float:
    start = time.perf_counter()
    searcher.search(queries, k, plan)
    return time.perf_counter() - start


def cost_of(candidate: Measured, rank_by: RankBy) -> float:
    """Microseconds a query: modelled, or measured one query at a time."""
    return candidate.model_us if rank_by == "model" else candidate.query_us


def pareto_front(measured: Sequence[Measured], rank_by: RankBy) -> list[int]:
    """Places of the candidates that no other beats in both cost and recall, cheapest first."""
    order = sorted(range(len(measured)), key=lambda n: (cost_of(measured[n], rank_by), -measured[n].recall, n))
    front: list[int] = []
    for place in order:
        if not front or measured[place].recall > measured[front[-1]].recall:
            front.append(place)
    return front


def rank_good(
    measured: Sequence[Measured], target: float, *, decide_by: DecideBy, rank_by: RankBy, exact: bool
) -> list[int]:
    """Places of the candidates whose recall reaches ``target``, cheapest first, the earlier one of equals.

    ``exact`` lets the exact plan (place 0) compete on cost; else it comes last. It is always there.
    """
    good = [
        place for place, one in enumerate(measured)
        if (one.recall_low if decide_by == "lower" else one.recall) >= target and (exact or place)
    ]  # fmt: skip
    good.sort(key=lambda place: (cost_of(measured[place], rank_by), place))
    return good if 0 in good else [*good, 0]
