"""The choice among measured plans: their cost, the limits on them, the Pareto front, the cheapest good plan.

A plan is good if its recall reaches the target and it keeps the limits on memory and on the time of the slowest 1% of
queries. With a limit on time, the choice depends on the stopwatch too.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from pydantic import Field

from lookalike.config import Config
from lookalike.retrieval.plan import Plan

RankBy = Literal["model", "measured"]
DecideBy = Literal["lower", "mean"]
REMEDIES = {
    "p99": "a lower target, a shortlist over another prefix, or more shards that answer side by side",
    "RAM": "a smaller shortlist: fewer shortlist_dims or smaller ones, or shortlist: graph, ivf-rabitq or binary",
    "recall": "a lower target, larger shortlist_ks, or scan_dims",
}


class MeasuredPlan(Config):
    """One candidate plan and its measurements."""

    plan: Plan
    """The candidate."""
    recall: float = Field(ge=0, le=1)
    """Mean recall@k against the exact answer."""
    recall_low: float = Field(ge=0, le=1)
    """Lower end of its 95% interval over queries."""
    recall_high: float = Field(ge=0, le=1)
    """Upper end."""
    model_us: float = Field(ge=0)
    """Modelled work of one query, in microseconds of the reference core; ranks the plans."""
    mflops: float = Field(ge=0)
    """Multiply-adds of one query as the MRL paper counts them (N * D_s + sum of K_j * D_j), in millions."""
    mflops_done: float = Field(ge=0)
    """Multiply-adds really done (rows that the shortlist looked at, and only the blocks a step adds), in millions."""
    query_us: float = Field(default=0.0, ge=0)
    """Time of one query alone on this machine: mean over queries of each query's fastest repeat, in microseconds."""
    p99_us: float = Field(default=0.0, ge=0)
    """99th percentile over queries, sent one by one, of each query's median repeat, in microseconds; with fewer than
    100 queries, the slowest."""
    batch_us: float = Field(default=0.0, ge=0)
    """Time per query when all sample queries are sent at once, fastest repeat, in microseconds."""
    exact_ratio: float = Field(default=0.0, ge=0)
    """Time of the exact answer over the time of this plan, one query at a time, in the same run."""
    ram_mb: float = Field(default=0.0, ge=0)
    """Memory that every query walks through, all shards together, in MB; ``costs.plan_memory`` says what counts."""
    shard_ram_mb: float = Field(default=0.0, ge=0)
    """The same for the largest shard."""
    mapped_mb: float = Field(default=0.0, ge=0)
    """Memory-mapped vectors, of which a query reads a few rows (a scan: all), in MB; not part of ``ram_mb``."""
    breaks: tuple[str, ...] = ()
    """The limits that it breaks, and by how much."""


class PlanLimits(NamedTuple):
    """Most that a plan may take; None: no limit."""

    max_p99_ms: float | None = None
    """99th percentile of the time of one query, in milliseconds."""
    max_ram_mb: float | None = None
    """Memory of a searcher with all shards (``MeasuredPlan.ram_mb``), in megabytes."""

    def excess(self, measured: MeasuredPlan) -> dict[str, tuple[float, float, str]]:
        """(value, limit, unit) of each limit that a candidate breaks."""
        values = {
            "p99": (measured.p99_us / 1e3, self.max_p99_ms, "ms"),
            "RAM": (measured.ram_mb, self.max_ram_mb, "MB"),
        }
        return {
            name: (value, limit, unit)
            for name, (value, limit, unit) in values.items()
            if limit is not None and value > limit
        }

    def mark(self, measured: Sequence[MeasuredPlan]) -> list[MeasuredPlan]:
        """The candidates with ``breaks`` filled in."""

        def breaks(row: MeasuredPlan) -> tuple[str, ...]:
            excess = self.excess(row).items()
            return tuple(f"{name} {value:.3g} {unit} > {limit:g} {unit}" for name, (value, limit, unit) in excess)

        return [row.model_copy(update={"breaks": breaks(row)}) for row in measured]


def cost_of(measured: MeasuredPlan, rank_by: RankBy) -> float:
    """Microseconds per query: modelled, or measured one query at a time."""
    return measured.model_us if rank_by == "model" else measured.query_us


def recall_of(measured: MeasuredPlan, decide_by: DecideBy) -> float:
    """The recall to compare with the target: the lower confidence bound, or the mean."""
    return measured.recall_low if decide_by == "lower" else measured.recall


def pareto_front(measured: Sequence[MeasuredPlan], rank_by: RankBy) -> list[int]:
    """Places of the candidates that no other beats in both cost and recall, cheapest first."""
    order = sorted(range(len(measured)), key=lambda n: (cost_of(measured[n], rank_by), -measured[n].recall, n))
    front: list[int] = []
    for place in order:
        if not front or measured[place].recall > measured[front[-1]].recall:
            front.append(place)
    return front


def rank_good(
    measured: Sequence[MeasuredPlan], target: float, *, decide_by: DecideBy, rank_by: RankBy, exact: bool
) -> list[int]:
    """Places of the candidates that reach ``target`` and break no limit, cheapest first, ties by place.

    ``exact``: the exact plan (place 0) competes on cost; otherwise it comes last. It is there unless it breaks a limit.
    """
    good = [
        place
        for place, row in enumerate(measured)
        if recall_of(row, decide_by) >= target and not row.breaks and (exact or place)
    ]
    good.sort(key=lambda place: (cost_of(measured[place], rank_by), place))
    return good if 0 in good or measured[0].breaks else [*good, 0]


def nearest_miss(
    measured: Sequence[MeasuredPlan], target: float, limits: PlanLimits, *, decide_by: DecideBy
) -> tuple[int, str]:
    """(place, explanation) of the candidate that misses ``target`` and ``limits`` by the smallest factor, for when no
    candidate is good: what it breaks, and what would help."""

    def misses(row: MeasuredPlan) -> dict[str, tuple[float, str]]:
        recall = recall_of(row, decide_by)
        broken = {
            name: (value / limit, f"{name} {value:.3g} {unit}, limit {limit:g} {unit}")
            for name, (value, limit, unit) in limits.excess(row).items()
        }
        if recall < target:
            broken["recall"] = (target / max(recall, 1e-9), f"recall {recall:.4f} ({decide_by}), target {target:g}")
        return broken

    place = min(range(len(measured)), key=lambda n: (max((f for f, _ in misses(measured[n]).values()), default=0), n))
    missed = misses(measured[place])
    broken, remedies = "; ".join(words for _, words in missed.values()), "; ".join(REMEDIES[name] for name in missed)
    return place, f"{measured[place].plan.describe()} comes nearest: {broken}; what helps: {remedies}"


def compare_stages(
    measured: Sequence[MeasuredPlan], good: Sequence[int], rank_by: RankBy
) -> dict[str, int | float | None]:
    """Places of the cheapest ``good`` plan of one stage and of several, and the cost of the latter over the former
    (below 1, several stages pay). mAP is not looked at."""
    single = next((place for place in good if measured[place].plan.is_single_stage), None)
    several = next((place for place in good if not measured[place].plan.is_single_stage), None)
    ratio = None
    if single is not None and several is not None:
        ratio = cost_of(measured[several], rank_by) / max(1e-9, cost_of(measured[single], rank_by))
    return {"one_stage": single, "several_stages": several, "several_to_one": ratio}
