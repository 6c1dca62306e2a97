"""Hits, and their order everywhere: descending score, then ascending row."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
NO_ROW = -1
NO_SCORE = np.float32(-np.inf)


class Hits(NamedTuple):
    """The answers to n queries."""

    rows: Rows
    """int64 [n, k]: global row numbers, -1 for no hit."""
    scores: Floats
    """float32 [n, k]: cosine at the plan's re-rank dim, descending; -inf for no hit."""


def empty_hits(num_queries: int, k: int) -> Hits:
    """Hits [num_queries, k] without a row."""
    return Hits(np.full((num_queries, k), NO_ROW, np.int64), np.full((num_queries, k), NO_SCORE, np.float32))


def pad_hits(hits: Hits, k: int) -> Hits:
    """``hits`` with empty columns appended up to ``k``."""
    missing = k - hits.rows.shape[1]
    if missing <= 0:
        return hits
    none = empty_hits(len(hits.rows), missing)
    return Hits(np.hstack([hits.rows, none.rows]), np.hstack([hits.scores, none.scores]))


def top_k(rows: Rows, scores: Floats, k: int) -> Hits:
    """The best ``k`` candidates of each line [n, m], in order, padded if m < k; of equal scores, the smaller row first.

    A row of -1 is not a candidate, whatever its score.
    """
    scores = np.where(rows == NO_ROW, NO_SCORE, scores).astype(np.float32, copy=False)
    rows = np.where(scores == NO_SCORE, NO_ROW, rows)
    order = np.lexsort((rows, -scores), axis=-1)[:, :k]
    lines = np.arange(len(rows))[:, None]
    return pad_hits(Hits(rows[lines, order], scores[lines, order]), k)


def merge_hits(parts: Sequence[Hits], k: int) -> Hits:
    """The best ``k`` of several shards' hits for the same queries."""
    if not parts:
        raise ValueError("nothing to merge: give the hits of at least one shard")
    return top_k(np.hstack([part.rows for part in parts]), np.hstack([part.scores for part in parts]), k)


def sort_keys(scores: Floats, rows: Rows) -> npt.NDArray[np.uint64]:
    """Unique uint64 keys [n, m] whose ascending order is the order of hits; column j stands for row ``rows[j]``.

    The upper half is the score, its bits changed so that a larger float is a smaller integer; the lower half is the
    row, which must fit 32 bits. A partial sort of the keys breaks ties by row; a partial sort of the scores would not.
    """
    bits = (scores + np.float32(0.0)).view(np.uint32)  # + 0.0 turns -0.0 into 0.0
    falling = np.where(bits >> 31, bits, ~bits & np.uint32(0x7FFFFFFF))
    keys: npt.NDArray[np.uint64] = (falling.astype(np.uint64) << np.uint64(32)) | rows.astype(np.uint64)
    return keys


def from_keys(keys: npt.NDArray[np.uint64]) -> Hits:
    """The hits of sorted keys, the inverse of :func:`sort_keys`."""
    upper = (keys >> np.uint64(32)).astype(np.uint32)
    bits = np.where(upper >> 31, upper, ~upper & np.uint32(0x7FFFFFFF))
    rows: Rows = (keys & np.uint64(0xFFFFFFFF)).astype(np.int64)
    return Hits(rows, bits.astype(np.uint32).view(np.float32))
