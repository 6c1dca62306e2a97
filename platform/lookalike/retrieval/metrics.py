"""Retrieval metrics by definition id, such as ``map_at_10_by_k``: each says what it divides by and which queries count.

"mAP@k" alone is ambiguous: the MRL paper divides by k, torchmetrics by the hits among the first k,
pytorch-metric-learning by all relevant rows; the same ranking scored 0.22 and 0.43. "R@k" is the share of relevant rows
found, or whether any was. So the id holds the denominator, and ``Metric.definition`` says the rest.

Metrics look at ``Judged`` lists, whose order is the tie rule of the search that made them. They return float64 [n] in
[0, 1], NaN for a query that does not count. A list shorter than k is padded: no row is no hit.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lookalike.errors import UsageError
from lookalike.registry import nearest
from lookalike.retrieval.relevance import NO_CODE, Codes, Judged, Scores


@dataclass(frozen=True)
class Metric:
    """A figure of each query, with its definition."""

    id: str
    definition: str
    k: int | None
    """Ranks that it reads; None for R, the number of relevant rows."""
    score: Callable[[Judged], Scores]

    def depth(self, num_relevant: Codes) -> int:
        """Ranks that a list must have for queries with ``num_relevant`` rows to find."""
        return int(num_relevant.max(initial=1)) if self.k is None else self.k


def _first(judged: Judged, k: int) -> npt.NDArray[np.bool_]:
    if not 1 <= k <= judged.depth:
        raise UsageError(f"k is {k}, the neighbours go to {judged.depth}; retrieve more or lower k")
    return judged.hits[:, :k]


def _if_relevant(judged: Judged, scores: Scores) -> Scores:
    return np.asarray(np.where(judged.num_relevant > 0, scores, np.nan))


def precision(judged: Judged, k: int) -> Scores:
    """Hits among the first ``k`` divided by k; P@1 is the accuracy of the nearest neighbour."""
    return np.asarray(_first(judged, k).mean(axis=1))


def any_hit(judged: Judged, k: int) -> Scores:
    """Whether a relevant row is among the first ``k``."""
    return np.asarray(_first(judged, k).any(axis=1), np.float64)


def recall(judged: Judged, k: int) -> Scores:
    """Hits among the first ``k`` divided by R."""
    found = np.asarray(_first(judged, k).sum(axis=1))
    return _if_relevant(judged, found / np.maximum(1, judged.num_relevant))


def ap_sum(judged: Judged, k: int) -> Scores:
    """The sum over the first ``k`` ranks i of rel_i * P@i, which the forms of average precision divide."""
    hits = _first(judged, k)
    return np.asarray((hits * (np.cumsum(hits, axis=1) / np.arange(1, k + 1))).sum(axis=1))


def ap_by_k(judged: Judged, k: int) -> Scores:
    """Average precision divided by ``k``, the MRL paper's form: 1 only if there are k relevant rows."""
    return ap_sum(judged, k) / k


def ap_by_hits(judged: Judged, k: int) -> Scores:
    """Average precision divided by the hits among the first ``k``, 0 without one, as torchmetrics does."""
    return np.asarray(ap_sum(judged, k) / np.maximum(1, _first(judged, k).sum(axis=1)))


def ap_by_relevant(judged: Judged, k: int) -> Scores:
    """Average precision divided by R, as trec_eval, ranx and pytorch-metric-learning do."""
    return _if_relevant(judged, ap_sum(judged, k) / np.maximum(1, judged.num_relevant))


def ap_by_reachable(judged: Judged, k: int) -> Scores:
    """Average precision divided by min(k, R)."""
    return _if_relevant(judged, ap_sum(judged, k) / np.maximum(1, np.minimum(k, judged.num_relevant)))


def r_precision(judged: Judged) -> Scores:
    """Hits among the first R divided by R."""
    total = _within(judged)
    hits = judged.hits & (np.arange(judged.depth) < total[:, None])
    return _if_relevant(judged, hits.sum(axis=1) / np.maximum(1, total))


def map_at_r(judged: Judged) -> Scores:
    """MAP@R: the sum over the first R ranks i of rel_i * P@i, divided by R (Musgrave et al. 2020, section 3.3)."""
    total = _within(judged)
    hits = judged.hits & (np.arange(judged.depth) < total[:, None])
    sums = (hits * (np.cumsum(hits, axis=1) / np.arange(1, judged.depth + 1))).sum(axis=1)
    return _if_relevant(judged, sums / np.maximum(1, total))


def _within(judged: Judged) -> Codes:
    most = int(judged.num_relevant.max(initial=0))
    if most > judged.depth:
        raise UsageError(f"a query has {most} relevant rows, the neighbours go to {judged.depth}; retrieve {most}")
    return judged.num_relevant


def ndcg(judged: Judged, k: int, *, exponential: bool = False) -> Scores:
    """Discounted gain of the first ``k`` divided by that of the best list (Järvelin and Kekäläinen 2002).

    The gain of rank i is grade / log2(i + 1), or (2^grade - 1) / log2(i + 1) if ``exponential`` (Burges et al. 2005).
    The best list is of all relevant rows of the database, found or not, so the quotient never exceeds 1.
    """
    _first(judged, k)
    gains, ideal = judged.grades[:, :k], judged.ideal[:, :k]
    if exponential:
        gains, ideal = np.exp2(gains) - 1, np.exp2(ideal) - 1
    discounts = 1 / np.log2(np.arange(2, k + 2))
    best = (ideal * discounts).sum(axis=1)
    return _if_relevant(judged, (gains * discounts).sum(axis=1) / np.where(best > 0, best, 1))


def ndcg_exponential(judged: Judged, k: int) -> Scores:
    """``ndcg`` with gains of 2^grade - 1."""
    return ndcg(judged, k, exponential=True)


def reciprocal_rank(judged: Judged, k: int) -> Scores:
    """1 / rank of the first relevant row, 0 if none is among the first ``k``."""
    hits = _first(judged, k)
    return np.asarray(np.where(hits.any(axis=1), 1 / (hits.argmax(axis=1) + 1), 0.0))


def vote(judged: Judged, k: int) -> Scores:
    """Whether most of the first ``k`` have the query's class; of equally frequent classes, the one that ranks first.

    Rows without a class do not vote. Raises ``UsageError`` if relevance is not by class.
    """
    hits = _first(judged, k)
    if judged.codes is None:
        raise UsageError("a vote needs classes; pairs have none: drop the vote, or give the task a label")
    codes, lines = judged.codes[:, :k], np.arange(len(hits))
    _, inverse, counts = np.unique(
        np.stack([np.repeat(lines, k), codes.ravel()]), axis=1, return_inverse=True, return_counts=True
    )
    votes = np.where(codes == NO_CODE, 0, counts[inverse.ravel()].reshape(codes.shape))
    return np.asarray(hits[lines, votes.argmax(axis=1)], np.float64)


ALL, SOME = "every query counts", "queries without a relevant row do not count"
FAMILIES: dict[str, tuple[Callable[..., Scores], str]] = {
    "p_at_{k}": (precision, "hits among the first {k}, divided by {k}; " + ALL),
    "hit_at_{k}": (any_hit, "1 if any of the first {k} is relevant; " + ALL),
    "recall_at_{k}": (recall, "hits among the first {k}, divided by all relevant rows of the database; " + SOME),
    "map_at_{k}_by_k": (ap_by_k, "(1/{k}) sum_{i<={k}} rel_i P@i, the MRL paper's form; " + ALL),
    "map_at_{k}_by_hits": (ap_by_hits, "sum_{i<={k}} rel_i P@i, divided by the hits among the first {k}; " + ALL),
    "map_at_{k}_by_relevant": (ap_by_relevant, "sum_{i<={k}} rel_i P@i, divided by all relevant rows R; " + SOME),
    "map_at_{k}_by_reachable": (
        ap_by_reachable,
        "sum_{i<={k}} rel_i P@i, divided by min({k}, R) of the R relevant rows; " + SOME,
    ),
    "map_at_r": (map_at_r, "(1/R) sum_{i<=R} rel_i P@i for R relevant rows; " + SOME),
    "r_precision": (r_precision, "hits among the first R, divided by R; " + SOME),
    "ndcg_at_{k}": (ndcg, "sum_{i<={k}} grade_i / log2(i + 1), divided by that of the best list; " + SOME),
    "ndcg_at_{k}_exponential": (
        ndcg_exponential,
        "sum_{i<={k}} (2^grade_i - 1) / log2(i + 1), divided by that of the best list; " + SOME,
    ),
    "mrr_at_{k}": (reciprocal_rank, "1 / rank of the first relevant row, 0 beyond rank {k}; " + ALL),
    "vote_at_{k}": (
        vote,
        "1 if the query's class is the most frequent among the first {k}, or ranks first of those that are; " + ALL,
    ),
}
"""Form of the id -> function of ``Judged`` and perhaps k, and definition."""


def get_metric(id_: str) -> Metric:
    """The metric called ``id_``, for example ``ndcg_at_5``; raises ``UsageError`` with the forms that exist."""
    number = re.search(r"(?<=_at_)[1-9]\d{0,5}(?=_|$)", id_)
    form = id_ if number is None else f"{id_[: number.start()]}{{k}}{id_[number.end() :]}"
    if form not in FAMILIES or (number is None and "{k}" in form):
        raise UsageError(f"unknown metric {id_!r}{nearest(form, list(FAMILIES))}; there are {', '.join(FAMILIES)}")
    function, definition = FAMILIES[form]
    if number is None:
        return Metric(id_, definition, None, function)
    k = int(number[0])
    return Metric(id_, definition.replace("{k}", number[0]), k, lambda judged: function(judged, k))


def mean(scores: Scores) -> float:
    """Mean over the queries that count; raises ``UsageError`` if none does."""
    counting = scores[~np.isnan(scores)]
    if not len(counting):
        raise UsageError("no query to average over; give at least one whose label is in the database")
    return float(counting.mean())


def per_query_overlap(found: npt.NDArray[np.int64], exact: npt.NDArray[np.int64]) -> Scores:
    """k-recall@N: the share of the ``exact`` rows [n, k] among the ``found`` rows [n, N], float64 [n].

    -1 stands for no row. A query without exact rows has recall 1.
    """
    wanted = exact >= 0
    hit = (exact[:, :, None] == found[:, None, :]).any(axis=2) & wanted
    return np.asarray(np.where(wanted.any(axis=1), hit.sum(axis=1) / np.maximum(1, wanted.sum(axis=1)), 1.0))


def recall_at_precision(
    hits: npt.NDArray[np.bool_], scores: Scores, least: float, *, num_relevant: int | None = None
) -> float:
    """Largest recall of ``scores >= t`` over all t with a precision of at least ``least``; 0 if there is no such t.

    ``hits`` and ``scores`` are of pairs [p]; recall is divided by ``num_relevant``, or else by the hits.
    """
    order = np.argsort(-scores, kind="stable")
    found = np.cumsum(hits[order])
    last = np.append(scores[order][1:] != scores[order][:-1], True)  # a threshold takes all pairs of equal score
    fine = last & (found >= least * np.arange(1, len(scores) + 1))
    total = int(hits.sum()) if num_relevant is None else num_relevant
    return float(found[fine].max(initial=0) / max(total, 1))
