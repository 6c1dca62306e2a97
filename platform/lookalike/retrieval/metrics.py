"""Retrieval metrics over the labels of ranked neighbours, each with its denominator in its name.

"mAP@k" alone is ambiguous: the MRL paper divides by k, torchmetrics by the hits among the first k,
pytorch-metric-learning by all relevant items; the same ranking scored 0.22 and 0.43. Here:

- ``map_at_k_by_k``: (1/Q) sum_q (1/k) sum_{i<=k} rel_i * P@i, the MRL paper's form. It reaches 1 only if every query
  has at least k relevant items.
- ``map_at_k_by_relevant``: the same sum divided by min(k, R), with R counted in the database.
- ``recall_at_k``: hits among the first k divided by R (the MRL paper divides by 1300, a fact of its database).

``neighbours`` are labels [n, k'] in rank order, k' >= k; ``labels`` are the queries' [n]. Labels are integers or
strings; -1 and "" stand for no hit or an unknown label and are never relevant. Floats are refused: float16 labels, as
in the paper's published funnel code, are exact only up to 2048 and merge classes beyond. Functions return the mean over
queries in [0, 1]; the ``per_query`` functions return float64 [n].
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from lookalike.errors import UsageError

Labels = npt.NDArray[Any]
Scores = npt.NDArray[np.float64]


def relevance(neighbours: Labels, labels: Labels, k: int) -> npt.NDArray[np.bool_]:
    """Whether each of the first ``k`` neighbours has the query's label, bool [n, k]."""
    neighbours, labels = np.asarray(neighbours), np.asarray(labels)
    for name, array in (("neighbours", neighbours), ("labels", labels)):
        if array.dtype.kind not in "iuU":
            raise UsageError(
                f"{name} have dtype {array.dtype}; labels must be integers or strings (float16 merges "
                "classes beyond 2048)"
            )
    if neighbours.ndim != 2 or labels.shape != neighbours.shape[:1]:
        raise UsageError(f"neighbours {neighbours.shape} and labels {labels.shape} must be [n, k] and [n]")
    if not 1 <= k <= neighbours.shape[1]:
        raise UsageError(f"k is {k}, the neighbours go to {neighbours.shape[1]}; retrieve more or lower k")
    return np.asarray((neighbours[:, :k] == labels[:, None]) & _is_known(labels)[:, None])


def _is_known(labels: Labels) -> npt.NDArray[np.bool_]:
    return np.asarray(labels != "" if labels.dtype.kind == "U" else labels.astype(np.int64) >= 0)


def count_relevant(database: Labels, labels: Labels) -> npt.NDArray[np.int64]:
    """R: the number of database items with each query's label, 0 for an unknown label, int64 [n]."""
    values, counts = np.unique(database, return_counts=True)
    place = np.minimum(np.searchsorted(values, labels), max(0, len(values) - 1))
    if not len(values):
        return np.zeros(len(labels), np.int64)
    return np.where((values[place] == labels) & _is_known(labels), counts[place], 0)


def per_query_precision(neighbours: Labels, labels: Labels, k: int) -> Scores:
    """Hits among the first ``k`` divided by k, float64 [n]."""
    return np.asarray(relevance(neighbours, labels, k).mean(axis=1))


def per_query_ap_by_k(neighbours: Labels, labels: Labels, k: int) -> Scores:
    """(1/k) sum over the first ``k`` ranks of rel_i * P@i, float64 [n]."""
    hits = relevance(neighbours, labels, k)
    precision = np.cumsum(hits, axis=1) / np.arange(1, k + 1)
    return np.asarray((hits * precision).sum(axis=1) / k)


def precision_at_k(neighbours: Labels, labels: Labels, k: int) -> float:
    """Mean P@k; P@1 is the accuracy of the nearest neighbour."""
    return _mean(per_query_precision(neighbours, labels, k))


def map_at_k_by_k(neighbours: Labels, labels: Labels, k: int) -> float:
    """mAP@k in the MRL paper's form: divided by ``k``."""
    return _mean(per_query_ap_by_k(neighbours, labels, k))


def map_at_k_by_relevant(neighbours: Labels, labels: Labels, k: int, *, num_relevant: npt.ArrayLike) -> float:
    """mAP@k divided by min(k, R), over the queries with R > 0; ``num_relevant`` is R, [n] or a scalar."""
    total = np.broadcast_to(np.asarray(num_relevant), labels.shape)
    scores = per_query_ap_by_k(neighbours, labels, k) * k / np.maximum(1, np.minimum(k, total))
    return _mean(scores[total > 0])


def recall_at_k(neighbours: Labels, labels: Labels, k: int, *, num_relevant: npt.ArrayLike) -> float:
    """Hits among the first ``k`` divided by R, over the queries with R > 0."""
    total = np.broadcast_to(np.asarray(num_relevant), labels.shape)
    hits = relevance(neighbours, labels, k).sum(axis=1)
    return _mean((hits / np.maximum(1, total))[total > 0])


def per_query_overlap(found: npt.NDArray[np.int64], exact: npt.NDArray[np.int64]) -> Scores:
    """k-recall: the share of the ``exact`` rows [n, k] among the ``found`` rows [n, k'], float64 [n].

    -1 stands for no row. A query without exact rows has recall 1.
    """
    wanted = exact >= 0
    hit = (exact[:, :, None] == found[:, None, :]).any(axis=2) & wanted
    return np.asarray(np.where(wanted.any(axis=1), hit.sum(axis=1) / np.maximum(1, wanted.sum(axis=1)), 1.0))


def _mean(values: Scores) -> float:
    if not len(values):
        raise UsageError("no query to average over; give at least one whose label is in the database")
    return float(values.mean())
