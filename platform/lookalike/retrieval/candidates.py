"""Which plans the planner tries: prefixes x K x effort x funnels, and early exit with margins that a sample tells.

**Funnels.** A step costs little beside the rows that it saves from being read whole, but each saves less than the one
before it; so three shapes are tried for each shortlist and no more: none, one stage at about a quarter of the vector
that keeps a few rows for each result (at 2048-d the cheapest there is), and half the rows at every nested dim (what
the MRL paper uses, and of use where K is large).

**Early exit.** A row can be dropped as soon as it lies so far below the k-th best that rows of the answer hardly ever
do. How far that is, is read off sample queries: the deficit of each true neighbour below the k-th best at each step's
dim, of which the margin is a high quantile. The quantile of a sample may lie too low: it is taken a standard error
higher, and over half of the queries, while recall is measured over all of them; the holdout of the plan stage has the
last word.
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
"""The one stage of a short funnel stands at the nested dim nearest to a quarter of the vector."""
STAGE_ROWS = 2.5
"""Rows that it keeps, for each result asked for."""
BETWEEN = 3
"""Sizes K tried between a good one and the next smaller one, once it is known which plans are good."""
WIDER = (1.2, 1.5)
"""How much larger K is in the early-exit twins of a plan: margins make room for it."""
MARGIN_DIGITS = 4
"""Digits of a margin."""


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
    """Every candidate without margins: prefixes with an index (and those to scan) x K x effort x funnels.

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
    """The stages to try between a shortlist of ``rows`` at ``dim`` and the last of the nested ``dims``: none, a single
    one, and half the rows at each dim as long as 2 k are left."""
    between = [wider for wider in dims if dim < wider < dims[-1]]
    halving = tuple((wider, rows >> step) for step, wider in enumerate(between, start=1) if rows >> step >= 2 * k)
    found: list[tuple[tuple[int, int], ...]] = [()]
    few = int(STAGE_ROWS * k)
    if between and few < rows:
        at = min(between, key=lambda wider: (abs(wider * STAGE_SHARE - dims[-1]), wider))
        found.append(((at, few),))
    return [*found, halving] if halving and halving not in found else found


def without_margins(plan: Plan) -> Plan:
    """The same plan with no early exit."""
    return plan.model_copy(update={"margins": ()})


def follow(shard: ShardSearcher, queries: Floats, k: int, plan: Plan) -> Iterator[Hits]:
    """What is left of each query's shortlist after each step but the last: global rows, best first, and their cosines
    at the step's dim. The same steps as ``rerank``, which tells the end only."""
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
    """Rows that go on from each step but the last, mean over ``queries``, for each shard."""
    return [
        [float((hits.rows != NO_ROW).sum(axis=1).mean()) for hits in follow(shard, queries, k, plan)]
        for shard in searcher.shards
    ]


def calibrate_margins(
    searcher: Searcher, queries: Floats, exact: Rows, k: int, plan: Plan, *, quantiles: Sequence[float] = QUANTILES
) -> list[Plan]:
    """``plan`` with the margins of each of ``quantiles``, read off ``queries`` and their true neighbours ``exact``
    [n, <= k], global rows, -1 for none.

    A margin is that quantile (and a standard error more) of how far true neighbours, where the plan has not lost them,
    lie below the k-th best row of their shard at the step's dim; those above it have a deficit of 0. Plans that only
    rank the shortlist have no step to leave: none come back.
    """
    plain = without_margins(plan)
    deficits: list[list[npt.NDArray[np.float32]]] = [[] for _ in plain.list_steps(k)[:-1]]
    for shard in searcher.shards:
        for found, hits in zip(deficits, follow(shard, queries, k, plain), strict=True):
            kth = hits.scores[:, k - 1 : k]
            true = (hits.rows[:, :, None] == exact[:, None, :]).any(axis=2) & (hits.rows != NO_ROW)
            gaps = np.where(true & np.isfinite(kth), np.maximum(0, kth - np.where(true, hits.scores, 0)), 0)
            found.append(gaps[true])
    if not deficits or not all(sum(map(len, found)) for found in deficits):
        return []
    limits = [_upper_quantiles(np.concatenate(found), quantiles) for found in deficits]
    return [plain.model_copy(update={"margins": margins}) for margins in zip(*limits, strict=True)]


def _upper_quantiles(values: npt.NDArray[np.float32], quantiles: Sequence[float]) -> list[float]:
    """A standard error above each quantile of ``values``, rounded up."""
    scale = 10**MARGIN_DIGITS
    levels = [min(1.0, level + math.sqrt(level * (1 - level) / len(values))) for level in quantiles]
    found = np.quantile(values, levels, method="higher").astype(np.float64)
    return [min(2.0, math.ceil(value * scale) / scale) for value in found.tolist()]


def list_between(plan: Plan, tried: Sequence[Plan], k: int) -> list[Plan]:
    """``plan`` with ``BETWEEN`` sizes K, evenly spaced, between its own and the next smaller one among ``tried``: what
    a coarse list of sizes wastes. A beam narrower than K is K, and a stage keeps no more rows than it is given."""
    smaller = [
        one.shortlist_k
        for one in tried
        if one.shortlist_dim == plan.shortlist_dim and one.scan == plan.scan and one.shortlist_k < plan.shortlist_k
    ]
    low = max(smaller, default=k)
    step = (plan.shortlist_k - low) / (BETWEEN + 1)
    sizes = sorted({round(low + step * number) for number in range(1, BETWEEN + 1)} - {low, plan.shortlist_k})
    return [
        plan.model_copy(
            update={"shortlist_k": size, "stages": tuple((dim, min(keep, size)) for dim, keep in plan.stages)}
        )
        for size in sizes
    ]


def widen(meta: IndexMeta, plan: Plan) -> list[Plan]:
    """``plan`` itself and the same with a larger K."""
    most = max(meta.shard_rows)
    sizes = sorted({min(most, round(plan.shortlist_k * factor)) for factor in (1, *WIDER)})
    return [plan.model_copy(update={"shortlist_k": size}) for size in sizes]
