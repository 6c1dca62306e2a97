"""Evaluation of vectors in memory, without artifacts: the figures of the stage ``evaluate`` in one call."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from lookalike import arguments
from lookalike.errors import ArgumentError, UsageError
from lookalike.retrieval.relevance import NO_CODE, ByClass
from lookalike.train.evaluate.evaluate import ALWAYS, Case, measure_case


def evaluate(
    vectors: npt.ArrayLike,
    labels: npt.ArrayLike,
    *,
    dims: Sequence[int] | None = None,
    metrics: str | Sequence[str] = ALWAYS,
    queries: npt.ArrayLike | None = None,
    database: npt.ArrayLike | None = None,
    groups: npt.ArrayLike | None = None,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Exact retrieval by prefixes of ``vectors`` [n, D]: rows of equal ``labels`` [n] are right answers.

    Args:
        vectors: numbers of any length; each prefix is normalised after truncation.
        labels: integers or texts; a negative number or an empty text is no label: such a row asks nothing.
        dims: prefixes to measure; D alone by default.
        metrics: definition ids (``lookalike.retrieval.metrics``), such as ``ndcg_at_5``.
        queries, database: bool [n], the rows that ask and that may answer; all by default. A row is never its own
            answer.
        groups: of rows that are alike, [n]; they are drawn together for the intervals.
        seed: of the draws.

    Returns:
        For each dim a row with ``dim``, ``queries``, ``database``, and for each metric its value, ``<id>_low`` and
        ``<id>_high``, the ends of its 95% interval. Of equal cosines the smaller row comes first.

    Raises ``UsageError`` if nothing is asked, or shapes, dims or metrics do not fit.
    """
    rows = arguments.to_float32("vectors", arguments.check_array("vectors", vectors))
    if rows.ndim != 2 or 0 in rows.shape:
        raise UsageError(f"vectors have shape {list(rows.shape)}; give one or more rows of equal size, [n, D]")
    if len(bad := np.flatnonzero(~np.isfinite(rows).all(axis=1))):
        raise UsageError(f"vectors[{bad[0]}] holds NaN or infinity, as {len(bad)} of {len(rows)} rows; leave them out")
    classes = _classes("labels", labels, len(rows))
    wanted = sorted({*(dims or ())}) or [rows.shape[1]]
    if not 1 <= wanted[0] <= wanted[-1] <= rows.shape[1]:
        raise UsageError(f"dims {wanted} must be between 1 and the vectors' {rows.shape[1]}")
    asking = np.flatnonzero(_mask("queries", queries, len(rows)) & (classes >= 0))
    answering = np.flatnonzero(_mask("database", database, len(rows)))
    if not len(asking) or not len(answering):
        raise UsageError(f"{len(asking)} rows with a label ask and {len(answering)} may answer; give some of both")
    place = np.full(len(rows), -1)
    place[answering] = np.arange(len(answering))
    relevance = ByClass(classes[asking], classes[answering], (asking, answering))
    alike = np.arange(len(rows)) if groups is None else _classes("groups", groups, len(rows))
    case = Case(asking, answering, place[asking], relevance, alike[asking])
    names = arguments.list_texts("metrics", metrics, "a metric's id as str, or a list of them")
    return list(measure_case(case, rows, wanted, names, seed))


def _classes(name: str, values: npt.ArrayLike, num_rows: int) -> npt.NDArray[np.int64]:
    """Numbers of the distinct values, -1 for a negative number or an empty text."""
    array = np.asarray(values)
    if array.dtype.kind == "O":
        array = np.asarray(["" if value is None else str(value) for value in array.ravel()]).reshape(array.shape)
    if array.dtype.kind not in "iuU" or array.shape != (num_rows,):
        raise ArgumentError(
            f"{name} are {array.dtype}{list(array.shape)}; give an integer or a text for each of {num_rows} rows"
        )
    known = array != "" if array.dtype.kind == "U" else array >= 0
    return np.where(known, np.unique(array, return_inverse=True)[1], NO_CODE)


def _mask(name: str, rows: npt.ArrayLike | None, num_rows: int) -> npt.NDArray[np.bool_]:
    mask = np.ones(num_rows, bool) if rows is None else np.asarray(rows)
    if mask.dtype != bool or mask.shape != (num_rows,):
        raise ArgumentError(f"{name} are {mask.dtype}{list(mask.shape)}; give bool [{num_rows}]")
    return mask
