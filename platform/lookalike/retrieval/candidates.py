"""Candidate plans: prefixes x K x effort x funnels, and early exit with margins calibrated on sample queries.

**Funnels.** A step costs little beside the rows that it saves from being read whole, but each further step saves less.
So each shortlist gets three shapes: no stage; one stage at about a quarter of the vector that keeps a few rows per
result (the cheapest at 2048-d); and half the rows at every nested dim (as in the MRL paper, useful for a large K).

**Early exit.** A row is dropped once it lies farther below the k-th best than rows of the answer almost ever do. Sample
queries show how far that is: the margin is a high quantile of the gaps between true neighbours and the k-th best at
each step's dim. A sample's quantile may be too low, so it is taken one standard error higher and over half of the
queries, while recall is measured over all; the holdout of the plan stage decides in the end.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from lookalike.retrieval.index_meta import IndexMeta
from lookalike.retrieval.index_types import effort_of
from lookalike.retrieval.plan import Plan
from lookalike.retrieval.ranking import NO_ROW, NO_SCORE, Floats, Hits, Rows, top_k
from lookalike.retrieval.rerank import extend
from lookalike.retrieval.searcher import Searcher
from lookalike.retrieval.shard_searcher import ShardSearcher
from lookalike.retrieval.vectors import check_queries

QUANTILES = (0.998, 0.995)
"""Shares of the true neighbours that a margin may not drop."""
STAGE_SHARE = 4
"""The stage of a one-stage funnel is at the nested dim nearest to a quarter of the vector."""
STAGE_ROWS = 2.5
"""Rows that it keeps per result."""
BETWEEN = 3
"""Sizes K tried between the K of a good plan and the next smaller K."""
WIDER = (1.2, 1.5)
"""Factors of K in the early-exit twins of a plan: margins leave room for more rows."""
MARGIN_DIGITS = 4
"""Decimals of a margin."""


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
    """All candidates without margins: prefixes (with an index, or to scan) x K x effort x funnels.

    The effort is ef or nprobe, depending on the index type; an ef of at most K means K.
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
                for stages in list_funnels(meta.dims, dim, shortlist_k, k) if funnels else [()]:
                    plan = Plan(
                        shortlist_dim=dim,
                        shortlist_k=shortlist_k,
                        stages=stages,
                        rerank_dim=meta.dim,
                        scan=scan,
                        **({effort: beam} if effort else {}),
                    )
                    plans[plan.model_dump_json()] = plan
    return list(plans.values())


def list_funnels(dims: Sequence[int], dim: int, rows: int, k: int) -> list[tuple[tuple[int, int], ...]]:
    """Stages to try between a shortlist of ``rows`` at ``dim`` and the last of the nested ``dims``: none, one stage,
    and half the rows at each dim while at least 2 k are left."""
    between = [wider for wider in dims if dim < wider < dims[-1]]
    halving = tuple((wider, rows >> step) for step, wider in enumerate(between, start=1) if rows >> step >= 2 * k)
    funnels: list[tuple[tuple[int, int], ...]] = [()]
    few = int(STAGE_ROWS * k)
    if between and few < rows:
        at = min(between, key=lambda wider: (abs(wider * STAGE_SHARE - dims[-1]), wider))
        funnels.append(((at, few),))
    return [*funnels, halving] if halving and halving not in funnels else funnels


def follow(shard: ShardSearcher, queries: Floats, k: int, plan: Plan) -> Iterator[Hits]:
    """Surviving global rows after each step but the last, best first, with cosines at the step's dim.

    The same steps as ``rerank``, which returns only the last.
    """
    vectors = check_queries(queries, shard.meta.dim)
    hits, reached, offset = shard.shortlist(vectors, k, plan), plan.shortlist_dim, shard.meta.row_offset
    hits = Hits(np.where(hits.rows == NO_ROW, NO_ROW, hits.rows - offset), hits.scores)
    for dim, keep, margin in plan.list_steps(k)[:-1]:
        if dim != reached:
            hits = extend(shard.store, vectors, hits, reached, dim)
        hits = top_k(*hits, keep)
        far = hits.scores < hits.scores[:, k - 1 : k] - np.float32(margin)
        hits.rows[far], hits.scores[far] = NO_ROW, NO_SCORE
        yield Hits(np.where(hits.rows == NO_ROW, NO_ROW, hits.rows + offset), hits.scores)
        reached = dim


def count_left(searcher: Searcher, queries: Floats, k: int, plan: Plan) -> list[list[float]]:
    """Mean number of rows that survive each step but the last, for each shard."""
    return [
        [float((hits.rows != NO_ROW).sum(axis=1).mean()) for hits in follow(shard, queries, k, plan)]
        for shard in searcher.shards
    ]


def calibrate_margins(
    searcher: Searcher, queries: Floats, exact: Rows, k: int, plan: Plan, *, quantiles: Sequence[float] = QUANTILES
) -> list[Plan]:
    """``plan`` with margins at each of ``quantiles``, calibrated on ``queries`` and their true neighbours ``exact``
    [n, <= k], global rows, -1 for none.

    A margin is that quantile (plus a standard error) of the gaps at the step's dim: how far a true neighbour that the
    plan still has lies below the k-th best row of its shard, 0 if it lies above. Empty for a plan of one stage, which
    has no step to leave early.
    """
    plain = plan.model_copy(update={"margins": ()})
    gaps_by_step: list[list[npt.NDArray[np.float32]]] = [[] for _ in plain.list_steps(k)[:-1]]
    for shard in searcher.shards:
        for step_gaps, hits in zip(gaps_by_step, follow(shard, queries, k, plain), strict=True):
            kth = hits.scores[:, k - 1 : k]
            true = (hits.rows[:, :, None] == exact[:, None, :]).any(axis=2) & (hits.rows != NO_ROW)
            gaps = np.where(true & np.isfinite(kth), np.maximum(0, kth - np.where(true, hits.scores, 0)), 0)
            step_gaps.append(gaps[true])
    if not gaps_by_step or not all(sum(map(len, step_gaps)) for step_gaps in gaps_by_step):
        return []
    limits = [_upper_quantiles(np.concatenate(step_gaps), quantiles) for step_gaps in gaps_by_step]
    return [plain.model_copy(update={"margins": margins}) for margins in zip(*limits, strict=True)]


def _upper_quantiles(values: npt.NDArray[np.float32], quantiles: Sequence[float]) -> list[float]:
    """Each quantile of ``values`` plus a standard error, rounded up."""
    scale = 10**MARGIN_DIGITS
    levels = [min(1.0, level + math.sqrt(level * (1 - level) / len(values))) for level in quantiles]
    upper = np.quantile(values, levels, method="higher").astype(np.float64)
    return [min(2.0, math.ceil(value * scale) / scale) for value in upper.tolist()]


def list_between(plan: Plan, tried: Sequence[Plan], k: int) -> list[Plan]:
    """``plan`` with ``BETWEEN`` evenly spaced sizes K between its own and the next smaller K among ``tried``, because a
    coarse list of sizes is wasteful. A stage keeps at most K rows."""
    alike = [other for other in tried if (other.shortlist_dim, other.scan) == (plan.shortlist_dim, plan.scan)]
    low = max((other.shortlist_k for other in alike if other.shortlist_k < plan.shortlist_k), default=k)
    step = (plan.shortlist_k - low) / (BETWEEN + 1)
    sizes = sorted({round(low + step * number) for number in range(1, BETWEEN + 1)} - {low, plan.shortlist_k})
    return [
        plan.model_copy(
            update={"shortlist_k": size, "stages": tuple((dim, min(keep, size)) for dim, keep in plan.stages)}
        )
        for size in sizes
    ]


def widen(meta: IndexMeta, plan: Plan) -> list[Plan]:
    """``plan`` itself and its twins with a larger K."""
    most = max(meta.shard_rows)
    sizes = sorted({min(most, round(plan.shortlist_k * factor)) for factor in (1, *WIDER)})
    return [plan.model_copy(update={"shortlist_k": size}) for size in sizes]
