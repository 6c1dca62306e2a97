"""Re-rank, funnel and scan over a prefix store.

MRL paper, section 4.3. A funnel step adds the survivors' partial dot products over the next blocks and renormalises by
the stored norms: nothing is read twice, and a step to dim m costs m minus the dimensions read before. All steps are
batched over queries; a Python loop per query would cost up to ten times the shortlist itself. The C library does this
where it is built (``native.py``); without it, the numpy code here gives the same answers up to rounding.
"""

from collections.abc import Sequence

import numpy as np

from lookalike.retrieval.kernels import inner_products_by_row
from lookalike.retrieval.native import Steps, pack_rows, pack_steps
from lookalike.retrieval.plan import Plan
from lookalike.retrieval.ranking import (
    NO_ROW,
    NO_SCORE,
    Floats,
    Hits,
    Rows,
    empty_hits,
    from_keys,
    pad_hits,
    sort_keys,
    top_k,
)
from lookalike.retrieval.store import PrefixStore
from lookalike.retrieval.vectors import inverse_norms, normalise, row_slices

GATHER_NUMBERS = 1 << 21
"""Numbers that a re-rank converts at a time: 8 MB as float32."""
SCAN_NUMBERS = 1 << 20
"""Stored numbers that a scan converts at a time: 4 MB, which stays in cache."""
GATHER_SHARE = 1 / 16
"""Largest share of a shard's rows that a filtered scan gathers; above it, the scan reads all rows and skips some."""
INSERTED = 4096
"""Most results that the C library keeps sorted during a scan; above it, numpy scans and sorts."""
SCAN_SCORES = 1 << 22
"""Scores that a scan holds at a time: 16 MB."""


def rerank(store: PrefixStore, queries: Floats, shortlist: Hits, k: int, plan: Plan) -> Hits:
    """Run the plan's funnel steps and its re-rank over a shortlist made at ``plan.shortlist_dim``.

    ``queries`` are float32 [n, dim], not normalised; ``shortlist`` holds rows of this shard with cosines at the
    shortlist dim. Returns rows of this shard with cosines at ``plan.rerank_dim``.
    """
    steps = plan.list_steps(k)
    if not plan.margins and len(steps) > 1:
        steps = steps[1:]  # the first step would keep the whole shortlist
    survivors, reached = shortlist, plan.shortlist_dim
    if store.native is not None:
        return store.native.rerank(queries, shortlist, store.position(reached) + 1, pack_plan_steps(store, steps), k)
    for dim, keep, margin in steps:
        if dim != reached:
            survivors = extend(store, queries, survivors, reached, dim)
        survivors = top_k(survivors.rows, survivors.scores, keep)
        if margin < np.inf:
            far = survivors.scores < survivors.scores[:, k - 1 : k] - np.float32(margin)
            survivors.rows[far], survivors.scores[far] = NO_ROW, NO_SCORE
        reached = dim
    return Hits(survivors.rows[:, :k], survivors.scores[:, :k])


def pack_plan_steps(store: PrefixStore, steps: Sequence[tuple[int, int, float]]) -> Steps:
    """The steps of a plan, (dim, surviving rows, margin), for the library."""
    return pack_steps([(store.position(dim) + 1, keep, margin) for dim, keep, margin in steps])


def extend(store: PrefixStore, queries: Floats, hits: Hits, reached: int, dim: int) -> Hits:
    """The same rows, in any order, with cosines at ``dim``, from their cosines at ``reached`` and the blocks between.

    With ``reached`` 0 all blocks up to ``dim`` are read and the scores of ``hits`` are ignored.
    """
    if store.native is not None:
        first, num = store.position(reached) + 1 if reached else 0, hits.rows.shape[1]
        return store.native.rerank(queries, hits, first, pack_steps([(store.position(dim) + 1, num, np.inf)]), num)
    valid = np.where(hits.rows == NO_ROW, 0, hits.rows)
    if reached:
        dots = np.where(hits.rows == NO_ROW, 0, hits.scores) * _lengths(store, queries, valid, reached)
    else:
        dots = np.zeros(valid.shape, np.float32)
    for position in range(store.position(reached) + 1 if reached else 0, store.position(dim) + 1):
        start, stop = store.meta.borders[position]
        dots += _partial_dots(store, position, np.ascontiguousarray(queries[:, start:stop]), valid)
    return Hits(hits.rows, (dots * inverse_norms(_lengths(store, queries, valid, dim))).astype(np.float32))


def _lengths(store: PrefixStore, queries: Floats, rows: Rows, dim: int) -> Floats:
    query_norms = np.linalg.norm(queries[:, :dim], axis=1)[:, None]
    return np.asarray(query_norms * store.norms[store.position(dim)][rows], dtype=np.float32)


def _partial_dots(store: PrefixStore, position: int, queries: Floats, rows: Rows) -> Floats:
    """Dot products [n, k] over one block: ``queries`` are [n, width], ``rows`` [n, k] are valid."""
    block, (n, k) = store.blocks[position], rows.shape
    if block.dtype == np.float32 and block.flags.c_contiguous:
        return inner_products_by_row(queries, block, np.ascontiguousarray(rows))
    out = np.empty((n, k), np.float32)
    for part in row_slices(n, max(1, GATHER_NUMBERS // max(1, k * block.shape[1]))):
        out[part] = np.einsum("nkd,nd->nk", store.numbers(position, rows[part]), queries[part])
    return out


def scan(store: PrefixStore, queries: Floats, k: int, dim: int, rows: Rows | None = None) -> Hits:
    """The exact ``k`` nearest rows of the shard by cosine at ``dim``, read part by part.

    ``rows`` [m], ascending: only these are read, once for all queries.
    """
    if store.native is not None and k <= INSERTED:
        return _scan_native(store, queries, k, dim, rows)
    num_rows = store.meta.num_rows if rows is None else len(rows)
    unit, best = normalise(queries[:, :dim]), np.empty((len(queries), 0), np.uint64)
    inverse = inverse_norms(np.asarray(store.norms[store.position(dim)]))
    step = max(1, min(SCAN_NUMBERS // dim, SCAN_SCORES // max(1, len(queries))))
    for part in row_slices(num_rows, step):
        numbers = np.arange(part.start, part.stop) if rows is None else rows[part]
        place = part if rows is None else numbers
        scores = _dots_in_order(store, unit, place, dim) * inverse[place]
        best = np.hstack([best, sort_keys(scores, numbers)])
        if best.shape[1] > k:
            best = np.partition(best, k - 1, axis=1)[:, :k]
    best.sort(axis=1)
    return pad_hits(from_keys(best), k)


def _scan_native(store: PrefixStore, queries: Floats, k: int, dim: int, rows: Rows | None) -> Hits:
    library, num_blocks = store.native, store.position(dim) + 1
    assert library is not None
    if rows is None:
        return library.scan(queries, num_blocks, k)[0]
    if len(rows) > GATHER_SHARE * store.meta.num_rows:
        allowed = np.zeros(store.meta.num_rows, bool)
        allowed[rows] = True
        return library.scan(queries, num_blocks, k, pack_rows(allowed))[0]
    result = empty_hits(len(queries), k)
    for part in row_slices(len(queries), max(1, SCAN_SCORES // max(1, len(rows)))):
        lines = np.broadcast_to(rows, (len(queries[part]), len(rows)))
        candidates, steps = Hits(lines, np.empty(lines.shape, np.float32)), pack_steps([(num_blocks, k, np.inf)])
        result.rows[part], result.scores[part] = library.rerank(queries[part], candidates, 0, steps, k)
    return result


def _dots_in_order(store: PrefixStore, queries: Floats, place: slice | Rows, dim: int) -> Floats:
    dots: Floats = np.zeros((len(queries), 1), np.float32)
    for position in range(store.position(dim) + 1):
        start, stop = store.meta.borders[position]
        block = store.numbers(position, place)
        rows = np.broadcast_to(np.arange(len(block)), (len(queries), len(block))).copy()
        dots = dots + inner_products_by_row(np.ascontiguousarray(queries[:, start:stop]), block, rows)
    return dots
