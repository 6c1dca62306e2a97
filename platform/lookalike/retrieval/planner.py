"""Planner: measures candidate plans against the exact answer and picks the cheapest one that is good enough.

**What is cheap** is decided by a model of a query's work (``lookalike.retrieval.costs``), not by a stopwatch, so that a
plan made twice is the same plan. The times measured on this machine stand beside it in every row, and ``rank_by`` may
be set to them.

**What is good enough** is the recall@k of the sample's lower confidence bound (bootstrap over queries), not of its
mean: the best of many candidates looks better than it is. **What is allowed** are the plans within the limits of memory
and of the time of the slowest hundredth of the queries; a limit of time makes the choice one of the stopwatch too.
"""

import time
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import numpy as np
from pydantic import Field

from lookalike.config import Config
from lookalike.retrieval.candidates import calibrate_margins, count_left, list_between, widen
from lookalike.retrieval.costs import Counts, count_query, model_us, multiply_adds, paper_mflops, plan_memory
from lookalike.retrieval.metrics import per_query_overlap
from lookalike.retrieval.plan import Plan
from lookalike.retrieval.ranking import NO_ROW, Floats, Hits, Rows, top_k
from lookalike.retrieval.searcher import Searcher
from lookalike.retrieval.shortlist import Work, count_work

RankBy = Literal["model", "measured"]
DecideBy = Literal["lower", "mean"]
TIE = 1e-6
"""Cosines this close to the k-th best are as good as it."""
BASES = 3
"""Good plans that more sizes K and early exit are tried on."""
P99_QUERIES = 100
"""Queries from which on a 99th percentile is more than the slowest of a few."""


class MeasuredPlan(Config):
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
    """Time of one query alone on this machine: mean over queries of each one's least of repeats, in microseconds."""
    p99_us: float = Field(default=0.0, ge=0)
    """Time that 99% of the queries take at most, sent one by one, each one's median of repeats, in microseconds; of
    fewer than 100 queries it is the slowest."""
    batch_us: float = Field(default=0.0, ge=0)
    """Time per query when all sample queries are sent at once, least of repeats, in microseconds."""
    exact_ratio: float = Field(default=0.0, ge=0)
    """How many times longer the exact answer takes, query by query, in the same run."""
    ram_mb: float = Field(default=0.0, ge=0)
    """Memory that every query walks through, of all shards, in MB; ``costs.plan_memory`` says what counts."""
    shard_ram_mb: float = Field(default=0.0, ge=0)
    """The same of the largest shard."""
    mapped_mb: float = Field(default=0.0, ge=0)
    """Memory-mapped vectors that queries read a few rows of (a scan: all), in MB; no part of ``ram_mb``."""
    breaks: tuple[str, ...] = ()
    """The limits that it breaks, and by how much."""


def search_without(searcher: Searcher, queries: Floats, k: int, plan: Plan, own_rows: Rows) -> Hits:
    """Search, leaving each query's ``own_rows`` [n] out of its answer (-1: none): a query may be indexed itself."""
    hits = searcher.search(queries, k + _num_own(own_rows), plan)
    rows = np.where(hits.rows == own_rows[:, None], NO_ROW, hits.rows)
    return top_k(rows, hits.scores, k)


def _num_own(own_rows: Rows) -> int:
    return int(bool((own_rows != NO_ROW).any()))


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
    """95% interval of the mean of ``values`` over queries, from 1,000 seeded resamples.

    It has no width where all queries have the same: when none of n lost anything, a mean of 1 - 3 / n may look so too.
    """
    generator = np.random.default_rng(seed)
    means = [values[generator.integers(0, len(values), len(values))].mean() for _ in range(1000)]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(min(low, values.mean())), float(max(high, values.mean()))


def measure(
    searcher: Searcher,
    queries: Floats,
    k: int,
    plans: Iterable[Plan],
    *,
    own_rows: Rows,
    seed: int,
    exact: Hits | None = None,
) -> list[MeasuredPlan]:
    """Recall, modelled work and memory of each plan for raw ``queries`` float32 [n, dim]; the exact plan comes first.

    ``exact`` is the exact answer (:func:`search_without` by ``Plan.exact``) where it is known already.
    """
    exact_plan = Plan.exact(searcher.meta.dim)
    if exact is None:
        exact = search_without(searcher, queries, k, exact_plan, own_rows)
    result = []
    for plan in [exact_plan, *plans]:
        if plan == exact_plan:
            hits, (counts, kind) = exact, count_query(searcher, queries, plan, k=k, work=Work(0, 0))
        else:
            hits, counts, kind = run_plan(searcher, queries, k, plan, own_rows)
        recall = per_query_recall(hits, exact, same_dim=plan.rerank_dim == searcher.meta.dim)
        low, high = bootstrap_interval(recall, seed)
        memory = plan_memory(searcher, plan, k)
        result.append(
            MeasuredPlan(
                plan=plan,
                recall=float(recall.mean()),
                recall_low=low,
                recall_high=high,
                model_us=model_us(counts, kind),
                mflops=paper_mflops(searcher.meta, plan),
                mflops_done=multiply_adds(counts) / 1e6,
                ram_mb=memory.ram,
                shard_ram_mb=memory.shard_ram,
                mapped_mb=memory.mapped,
            )
        )
    return result


def run_plan(searcher: Searcher, queries: Floats, k: int, plan: Plan, own_rows: Rows) -> tuple[Hits, Counts, str]:
    """The answer of ``plan``, what a query did for it on average, and the index type whose prices hold for that."""
    asked = k + _num_own(own_rows)
    with count_work() as done:
        hits = search_without(searcher, queries, k, plan, own_rows)
        work = done()
    left = count_left(searcher, queries, asked, plan) if plan.margins else None
    counts, kind = count_query(searcher, queries, plan, k=asked, work=work, left=left)
    return hits, counts, kind


def measure_between(
    searcher: Searcher,
    queries: Floats,
    k: int,
    measured: Sequence[MeasuredPlan],
    *,
    own_rows: Rows,
    seed: int,
    exact: Hits,
    target: float,
    decide_by: DecideBy,
) -> list[MeasuredPlan]:
    """Twins of the ``BASES`` cheapest candidates that reach ``target``, with sizes K that are not in the list."""
    tried = [one.plan for one in measured]
    bases = _cheapest(measured, target, decide_by)
    plans = {plan.model_dump_json(): plan for base in bases for plan in list_between(base, tried, k)}
    if not plans:
        return []
    return measure(searcher, queries, k, plans.values(), own_rows=own_rows, seed=seed, exact=exact)[1:]


def _cheapest(
    measured: Sequence[MeasuredPlan], target: float, decide_by: DecideBy, *, several: bool = False
) -> list[Plan]:
    """The ``BASES`` plans (of ``several`` stages) that reach ``target`` for the least modelled work, no exact scan; by
    the model whatever ranks in the end, so that the candidates are always the same."""
    good = rank_good(measured, target, decide_by=decide_by, rank_by="model", exact=False)
    plans = [measured[place].plan for place in good]
    return [plan for plan in plans if not (plan.is_single_stage if several else plan.is_exact)][:BASES]


def measure_early_exit(
    searcher: Searcher,
    queries: Floats,
    k: int,
    measured: Sequence[MeasuredPlan],
    *,
    own_rows: Rows,
    seed: int,
    exact: Hits,
    target: float,
    decide_by: DecideBy,
) -> list[MeasuredPlan]:
    """Early-exit twins of the ``BASES`` cheapest candidates of several stages that reach ``target``, and of the same
    with a larger K; margins come from every other query, the rest is measured on all."""
    bases = _cheapest(measured, target, decide_by, several=True)
    asked, some = k + _num_own(own_rows), slice(None, None, 2)
    plans: dict[str, Plan] = {}
    for base in bases:
        for plan in widen(searcher.meta, base):
            for early in calibrate_margins(searcher, queries[some], exact.rows[some], asked, plan):
                plans[early.model_dump_json()] = early
    if not plans:
        return []
    return measure(searcher, queries, k, plans.values(), own_rows=own_rows, seed=seed, exact=exact)[1:]


def time_plans(
    searcher: Searcher, queries: Floats, k: int, measured: Sequence[MeasuredPlan], *, repeats: int
) -> list[MeasuredPlan]:
    """The same candidates with times: each repeat runs all of them in turn, so that all see the same machine, and what
    else runs there meanwhile is left out by taking the least (``query_us``, ``batch_us``) or the median (``p99_us``) of
    a query's repeats."""
    single = np.empty((len(measured), repeats, len(queries)))
    batch = np.empty((len(measured), repeats))
    for turn in range(repeats):
        for number, candidate in enumerate(measured):
            batch[number, turn] = _seconds(searcher, queries, k, candidate.plan) / len(queries)
            single[number, turn] = [_seconds(searcher, query[None], k, candidate.plan) for query in queries]
    means = single.min(axis=1).mean(axis=1)
    tails = np.quantile(np.median(single, axis=1), 0.99, axis=1, method="higher")
    return [
        candidate.model_copy(
            update={
                "query_us": float(means[n]) * 1e6,
                "p99_us": float(tails[n]) * 1e6,
                "batch_us": float(batch[n].min()) * 1e6,
                "exact_ratio": float(means[0] / means[n]),
            }
        )
        for n, candidate in enumerate(measured)
    ]


def _seconds(searcher: Searcher, queries: Floats, k: int, plan: Plan) -> float:
    start = time.perf_counter()
    searcher.search(queries, k, plan)
    return time.perf_counter() - start


def cost_of(candidate: MeasuredPlan, rank_by: RankBy) -> float:
    """Microseconds a query: modelled, or measured one query at a time."""
    return candidate.model_us if rank_by == "model" else candidate.query_us


def pareto_front(measured: Sequence[MeasuredPlan], rank_by: RankBy) -> list[int]:
    """Places of the candidates that no other beats in both cost and recall, cheapest first."""
    order = sorted(range(len(measured)), key=lambda n: (cost_of(measured[n], rank_by), -measured[n].recall, n))
    front: list[int] = []
    for place in order:
        if not front or measured[place].recall > measured[front[-1]].recall:
            front.append(place)
    return front


class Limits(NamedTuple):
    """What a plan may take; None: no limit."""

    max_p99_ms: float | None = None
    """Time of one query, 99th percentile, in milliseconds."""
    max_ram_mb: float | None = None
    """Memory of a searcher that holds all shards (``MeasuredPlan.ram_mb``), in megabytes."""

    def excess(self, one: MeasuredPlan) -> dict[str, tuple[float, float, str]]:
        """(value, limit, unit) of each limit that a candidate breaks."""
        pairs = {"p99": (one.p99_us / 1e3, self.max_p99_ms, "ms"), "RAM": (one.ram_mb, self.max_ram_mb, "MB")}
        return {
            name: (value, limit, unit)
            for name, (value, limit, unit) in pairs.items()
            if limit is not None and value > limit
        }

    def mark(self, measured: Sequence[MeasuredPlan]) -> list[MeasuredPlan]:
        """The candidates with the limits that they break."""
        return [
            one.model_copy(
                update={
                    "breaks": tuple(
                        f"{name} {value:.3g} {unit} > {limit:g} {unit}"
                        for name, (value, limit, unit) in self.excess(one).items()
                    )
                }
            )
            for one in measured
        ]


REMEDIES = {
    "p99": "a lower target, a shortlist over another prefix, or more shards that answer side by side",
    "RAM": "a smaller shortlist: fewer shortlist_dims or smaller ones, or shortlist: graph, ivf-rabitq or binary",
    "recall": "a lower target, larger shortlist_ks, or scan_dims",
}


def nearest(measured: Sequence[MeasuredPlan], target: float, limits: Limits, *, decide_by: DecideBy) -> tuple[int, str]:
    """(place, words) of the candidate that misses ``target`` and ``limits`` by the smallest factor: what it breaks and
    what would help. For when none holds all of them."""

    def misses(one: MeasuredPlan) -> dict[str, tuple[float, str]]:
        recall, broken = recall_of(one, decide_by), limits.excess(one)
        found = {
            name: (value / limit, f"{name} {value:.3g} {unit}, limit {limit:g} {unit}")
            for name, (value, limit, unit) in broken.items()
        }
        if recall < target:
            found["recall"] = (target / max(recall, 1e-9), f"recall {recall:.4f} ({decide_by}), target {target:g}")
        return found

    place = min(range(len(measured)), key=lambda n: (max((f for f, _ in misses(measured[n]).values()), default=0), n))
    missed = misses(measured[place])
    broken, remedies = "; ".join(words for _, words in missed.values()), "; ".join(REMEDIES[name] for name in missed)
    return place, f"{measured[place].plan.describe()} comes nearest: {broken}; what helps: {remedies}"


def recall_of(one: MeasuredPlan, decide_by: DecideBy) -> float:
    """The recall that the target is compared with."""
    return one.recall_low if decide_by == "lower" else one.recall


def rank_good(
    measured: Sequence[MeasuredPlan], target: float, *, decide_by: DecideBy, rank_by: RankBy, exact: bool
) -> list[int]:
    """Places of the candidates whose recall reaches ``target`` and that break no limit, cheapest first, the earlier one
    of equals.

    ``exact`` lets the exact plan (place 0) compete on cost; else it comes last. It is there unless it breaks a limit.
    """
    good = [
        place
        for place, one in enumerate(measured)
        if recall_of(one, decide_by) >= target and not one.breaks and (exact or place)
    ]
    good.sort(key=lambda place: (cost_of(measured[place], rank_by), place))
    return good if 0 in good or measured[0].breaks else [*good, 0]


def compare_stages(
    measured: Sequence[MeasuredPlan], good: Sequence[int], rank_by: RankBy
) -> dict[str, int | float | None]:
    """The cheapest of the ``good`` plans of one stage and of several: their places, and how many times as much the
    latter costs (below 1: more than one stage pays)."""
    one = next((place for place in good if measured[place].plan.is_single_stage), None)
    several = next((place for place in good if not measured[place].plan.is_single_stage), None)
    ratio = None
    if one is not None and several is not None:
        ratio = cost_of(measured[several], rank_by) / max(1e-9, cost_of(measured[one], rank_by))
    return {"one_stage": one, "several_stages": several, "several_to_one": ratio}
