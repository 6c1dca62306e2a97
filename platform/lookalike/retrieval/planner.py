"""Planner: measures candidate plans against the exact answer, on a sample of queries.

**Cost** is modelled from counts of a query's work (``lookalike.retrieval.costs``), not timed, so that planning twice
gives the same plan. The times measured on this machine stand beside it, and ``rank_by`` may be set to them.

**Recall** is recall@k; the target is compared with the lower end of its 95% interval over queries rather than its mean,
because the best of many candidates looks better than it is. The interval (``intervals.mean_interval``) knows that a
graph may lose a query whole now and then: of 400 queries with a recall of 1 it says .9908.
"""

import time
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lookalike.intervals import mean_interval
from lookalike.retrieval.candidates import calibrate_margins, count_left, list_between, widen
from lookalike.retrieval.choice import DecideBy, MeasuredPlan, rank_good
from lookalike.retrieval.costs import Counts, count_query, model_us, multiply_adds, paper_mflops, plan_memory
from lookalike.retrieval.metrics import per_query_overlap
from lookalike.retrieval.plan import Plan
from lookalike.retrieval.ranking import NO_ROW, Floats, Hits, Rows, top_k
from lookalike.retrieval.searcher import Searcher
from lookalike.retrieval.shortlist import Work, count_work

TIE = 1e-6
"""Cosines this close to the k-th best count as equally good."""
BASES = 3
"""Good plans that get more sizes K and early exit."""
P99_QUERIES = 100
"""Fewest queries for which a 99th percentile is meaningful."""


class PlanSample(NamedTuple):
    """Queries to measure plans with, and their exact answer; made by :func:`take_sample`."""

    searcher: Searcher
    queries: Floats
    """Raw vectors float32 [n, dim]."""
    k: int
    own_rows: Rows
    """The global row that each query is indexed as [n], left out of its answer; -1 if it is not indexed."""
    exact: Hits

    @property
    def wanted(self) -> int:
        """Results to ask for, so that ``k`` are left without the query's own row."""
        return self.k + _num_own(self.own_rows)


def take_sample(searcher: Searcher, queries: Floats, k: int, *, own_rows: Rows) -> PlanSample:
    """A sample with its exact answer."""
    exact = search_without(searcher, queries, k, Plan.exact(searcher.meta.dim), own_rows)
    return PlanSample(searcher, queries, k, own_rows, exact)


def search_without(searcher: Searcher, queries: Floats, k: int, plan: Plan, own_rows: Rows) -> Hits:
    """Search, leaving each query's ``own_rows`` [n] out of its answer (-1: none), since a query may be indexed."""
    hits = searcher.search(queries, k + _num_own(own_rows), plan)
    rows = np.where(hits.rows == own_rows[:, None], NO_ROW, hits.rows)
    return top_k(rows, hits.scores, k)


def _num_own(own_rows: Rows) -> int:
    return int(bool((own_rows != NO_ROW).any()))


def per_query_recall(hits: Hits, exact: Hits, *, same_dim: bool) -> npt.NDArray[np.float64]:
    """Recall@k of each query, float64 [n].

    With ``same_dim`` (both carry full-dim cosines), a row that scores like the k-th exact row counts as found:
    duplicates in the database make the exact list arbitrary.
    """
    overlap = per_query_overlap(hits.rows, exact.rows)
    if not same_dim:
        return overlap
    wanted = exact.rows != NO_ROW
    kth = np.where(wanted, exact.scores, np.inf).min(axis=1, keepdims=True)
    as_good = ((hits.scores >= kth - TIE) & (hits.rows != NO_ROW)).sum(axis=1) / np.maximum(1, wanted.sum(axis=1))
    return np.asarray(np.maximum(overlap, np.minimum(1.0, as_good)))


def measure(sample: PlanSample, plans: Iterable[Plan]) -> list[MeasuredPlan]:
    """Recall, modelled work and memory of each plan; the exact plan comes first."""
    searcher, exact_plan = sample.searcher, Plan.exact(sample.searcher.meta.dim)
    nothing = count_query(searcher, sample.queries, exact_plan, k=sample.k, work=Work(0, 0))
    result = [_measured(sample, exact_plan, sample.exact, *nothing)]
    for plan in plans:
        if plan == exact_plan:
            result.append(result[0])
        else:
            result.append(_measured(sample, plan, *run_plan(sample, plan)))
    return result


def _measured(sample: PlanSample, plan: Plan, hits: Hits, counts: Counts, kind: str) -> MeasuredPlan:
    recall = per_query_recall(hits, sample.exact, same_dim=plan.rerank_dim == sample.searcher.meta.dim)
    low, high = (1.0, 1.0) if plan == Plan.exact(sample.searcher.meta.dim) else mean_interval(recall)
    memory = plan_memory(sample.searcher, plan, sample.k)
    return MeasuredPlan(
        plan=plan,
        recall=float(recall.mean()),
        recall_low=low,
        recall_high=high,
        model_us=model_us(counts, kind),
        mflops=paper_mflops(sample.searcher.meta, plan),
        mflops_done=multiply_adds(counts) / 1e6,
        ram_mb=memory.ram,
        shard_ram_mb=memory.shard_ram,
        mapped_mb=memory.mapped,
    )


def run_plan(sample: PlanSample, plan: Plan) -> tuple[Hits, Counts, str]:
    """The answer of ``plan``, the mean work of a query, and the index type whose prices apply to it."""
    searcher, queries, k = sample.searcher, sample.queries, sample.k
    with count_work() as work_done:
        hits = search_without(searcher, queries, k, plan, sample.own_rows)
        work = work_done()
    left = count_left(searcher, queries, sample.wanted, plan) if plan.margins else None
    counts, kind = count_query(searcher, queries, plan, k=sample.wanted, work=work, left=left)
    return hits, counts, kind


def measure_between(
    sample: PlanSample, measured: Sequence[MeasuredPlan], target: float, decide_by: DecideBy
) -> list[MeasuredPlan]:
    """Twins of the ``BASES`` cheapest candidates that reach ``target``, with sizes K between those tried."""
    tried = [row.plan for row in measured]
    bases = _cheapest(measured, target, decide_by)
    return _measure_new(sample, (plan for base in bases for plan in list_between(base, tried, sample.k)))


def measure_early_exit(
    sample: PlanSample, measured: Sequence[MeasuredPlan], target: float, decide_by: DecideBy
) -> list[MeasuredPlan]:
    """Early-exit twins of the ``BASES`` cheapest candidates of several stages that reach ``target``, also with a larger
    K. Margins come from every other query; recall is measured on all."""
    half = slice(None, None, 2)
    queries, exact = sample.queries[half], sample.exact.rows[half]
    return _measure_new(
        sample,
        (
            early
            for base in _cheapest(measured, target, decide_by, several=True)
            for plan in widen(sample.searcher.meta, base)
            for early in calibrate_margins(sample.searcher, queries, exact, sample.wanted, plan)
        ),
    )


def _measure_new(sample: PlanSample, plans: Iterable[Plan]) -> list[MeasuredPlan]:
    """Measure ``plans``, each once, without the exact one."""
    unique = {plan.model_dump_json(): plan for plan in plans}
    return measure(sample, unique.values())[1:] if unique else []


def _cheapest(
    measured: Sequence[MeasuredPlan], target: float, decide_by: DecideBy, *, several: bool = False
) -> list[Plan]:
    """The ``BASES`` good plans with the least modelled work: of ``several`` stages, or any but an exact scan.

    Always by the model, so that the candidates do not depend on ``rank_by``.
    """
    good = rank_good(measured, target, decide_by=decide_by, rank_by="model", exact=False)
    plans = [measured[place].plan for place in good]
    return [plan for plan in plans if not (plan.is_single_stage if several else plan.is_exact)][:BASES]


def time_plans(
    searcher: Searcher, queries: Floats, k: int, measured: Sequence[MeasuredPlan], *, repeats: int
) -> list[MeasuredPlan]:
    """The same candidates with times.

    Each repeat runs all candidates in turn, so that all meet the same load. Taking a query's fastest repeat
    (``query_us``, ``batch_us``) or its median (``p99_us``) leaves out disturbances by other programs.
    """
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
