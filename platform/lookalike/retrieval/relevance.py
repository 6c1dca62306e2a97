"""What counts as a right answer: by equal columns or by judged pairs, behind one interface.

A ``Relevance`` knows n queries and the rows of a database. It tells how many rows are relevant to each query and judges
ranked lists of row numbers; metrics see nothing else. A row that is kept out of a query's list is not relevant to it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from lookalike.errors import UsageError

Codes = npt.NDArray[np.int64]
Scores = npt.NDArray[np.float64]
NO_CODE = -1
"""Code of a row without a value; it equals no other, not even itself."""


@dataclass(frozen=True)
class Judged:
    """Ranked lists of n queries, best rank first, after relevance has looked at them."""

    grades: Scores
    """float64 [n, depth]: grade of the row at each rank; 0 if it is not relevant or there is no row."""
    num_relevant: Codes
    """int64 [n], R: relevant rows of the whole database."""
    ideal: Scores
    """float64 [n, depth]: the grades of the best possible list."""
    codes: Codes | None = None
    """int64 [n, depth]: class of the row at each rank, if relevance goes by class; -1 for none."""

    @property
    def hits(self) -> npt.NDArray[np.bool_]:
        """Whether the row at each rank is relevant, bool [n, depth]."""
        return self.grades > 0

    @property
    def depth(self) -> int:
        """Ranks of each list."""
        return int(self.grades.shape[1])


class Relevance(Protocol):
    """The relevant rows of n queries."""

    @property
    def num_relevant(self) -> Codes:
        """int64 [n]: relevant database rows of each query."""
        ...

    def judge(self, rows: Codes, start: int = 0) -> Judged:
        """Judge the lists int64 [m, depth] of the queries from number ``start``; -1 stands for no row."""
        ...


def judge_labels(neighbours: npt.NDArray[Any], labels: npt.NDArray[Any], num_relevant: npt.ArrayLike = 0) -> Judged:
    """Judge lists of labels [n, depth] by the queries' labels [n]; ``num_relevant`` is R, [n] or a scalar.

    Labels are integers or strings; -1 and "" stand for no row or an unknown label and are never relevant. Raises
    ``UsageError`` for floats: float16, as in the MRL paper's published funnel code, merges classes beyond 2048.
    """
    neighbours, labels = np.asarray(neighbours), np.asarray(labels)
    for name, array in (("neighbours", neighbours), ("labels", labels)):
        if array.dtype.kind not in "iuU":
            raise UsageError(
                f"{name} have dtype {array.dtype}; labels must be integers or strings (float16 merges "
                "classes beyond 2048)"
            )
    if neighbours.ndim != 2 or labels.shape != neighbours.shape[:1]:
        raise UsageError(f"neighbours {neighbours.shape} and labels {labels.shape} must be [n, k] and [n]")
    hits = (neighbours == labels[:, None]) & _is_known(labels)[:, None]
    total = np.broadcast_to(np.asarray(num_relevant, np.int64), labels.shape)
    codes = neighbours.astype(np.int64) if neighbours.dtype.kind in "iu" else None
    return Judged(hits.astype(np.float64), total, _ideal(total, neighbours.shape[1]), codes)


def _is_known(labels: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    return np.asarray(labels != "" if labels.dtype.kind == "U" else labels.astype(np.int64) >= 0)


def _ideal(num_relevant: Codes, depth: int) -> Scores:
    return (np.arange(depth) < num_relevant[:, None]).astype(np.float64)


def encode_rows(table: pa.Table, columns: Sequence[str]) -> Codes:
    """Codes int64 [n] that are equal exactly where all ``columns`` are; -1 where one is null or an empty text."""
    codes = np.zeros(table.num_rows, np.int64)
    for name in columns:
        values = pc.cast(table[name].combine_chunks(), pa.string())
        values = pc.if_else(pc.equal(values, ""), None, values)
        found = values.dictionary_encode().indices.fill_null(NO_CODE).to_numpy(zero_copy_only=False).astype(np.int64)
        pairs = codes * (found.max(initial=0) + 1) + found
        codes = np.where((codes < 0) | (found < 0), NO_CODE, np.unique(pairs, return_inverse=True)[1])
    return codes


def count_equal(database: Codes, queries: Codes) -> Codes:
    """The number of database rows with each query's code, 0 for -1, int64 [n]."""
    values, counts = np.unique(database[database >= 0], return_counts=True)
    if not len(values):
        return np.zeros(len(queries), np.int64)
    place = np.minimum(np.searchsorted(values, queries), len(values) - 1)
    return np.where(values[place] == queries, counts[place], 0)


class ByClass:
    """A row is relevant if its class code is the query's; a distractor has the code -1.

    ``kept_out`` are two arrays of codes, of the queries [n] and of the database [N]: a row of a query's code is not in
    the query's lists. Costs 8 bytes a row.
    """

    def __init__(self, queries: Codes, database: Codes, kept_out: tuple[Codes, Codes] | None = None) -> None:
        self._queries, self._database = queries, database
        self.num_relevant: Codes = count_equal(database, queries)
        if kept_out is not None:
            mine, others = kept_out
            base = max(queries.max(initial=0), database.max(initial=0)) + 1
            self.num_relevant = self.num_relevant - count_equal(
                np.where((database < 0) | (others < 0), NO_CODE, others * base + database),
                np.where((queries < 0) | (mine < 0), NO_CODE, mine * base + queries),
            )

    def judge(self, rows: Codes, start: int = 0) -> Judged:
        """See ``Relevance``."""
        chosen = slice(start, start + len(rows))
        codes = np.where(rows >= 0, self._database[rows], NO_CODE)
        return judge_labels(codes, self._queries[chosen], self.num_relevant[chosen])


class ByPairs:
    """A row is relevant if a pair names it, with the pair's grade. Costs 16 bytes a pair."""

    def __init__(self, queries: Codes, rows: Codes, grades: Scores, *, num_queries: int, min_grade: float = 0) -> None:
        """Take pairs [p] of a query's number, a row's number and a grade, each pair once.

        Pairs below ``min_grade`` or of grade 0 were judged not relevant. Raises ``UsageError`` for a negative or
        infinite grade, or a pair with two grades.
        """
        if not np.isfinite(grades).all() or (grades < 0).any():
            wrong = grades[~np.isfinite(grades) | (grades < 0)][0]
            raise UsageError(f"a pair has grade {wrong}; grades are finite and at least 0, which means not relevant")
        order = np.lexsort((rows, queries))
        queries, rows, grades = queries[order], rows[order], grades[order]
        again = (queries[1:] == queries[:-1]) & (rows[1:] == rows[:-1])
        if (again & (grades[1:] != grades[:-1])).any():
            at = int(np.flatnonzero(again & (grades[1:] != grades[:-1]))[0])
            raise UsageError(f"one pair has the grades {grades[at]:g} and {grades[at + 1]:g}; give each pair once")
        kept = ~np.append(again, np.zeros(len(rows) - len(again), bool)) & (grades > 0) & (grades >= min_grade)
        self._rows, self._grades = rows[kept], grades[kept]
        self._starts = np.searchsorted(queries[kept], np.arange(num_queries + 1))
        self.num_relevant: Codes = np.diff(self._starts)

    def judge(self, rows: Codes, start: int = 0) -> Judged:
        """See ``Relevance``."""
        grades, ideal = np.zeros(rows.shape), np.zeros(rows.shape)
        for line, ranked in enumerate(rows):
            mine = slice(self._starts[start + line], self._starts[start + line + 1])
            known, worth = self._rows[mine], self._grades[mine]
            if not len(known):
                continue
            place = np.minimum(np.searchsorted(known, ranked), len(known) - 1)
            grades[line] = np.where(known[place] == ranked, worth[place], 0)
            best = np.sort(worth)[::-1][: rows.shape[1]]
            ideal[line, : len(best)] = best
        return Judged(grades, self.num_relevant[start : start + len(rows)], ideal)
