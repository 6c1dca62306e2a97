"""A shard's answer, and its form between processes: plain bytes instead of pickled arrays."""

import json
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lookalike.retrieval.ranking import Hits, merge_hits

Column = Sequence[str | None]
"""Values of one stored column, one per row."""
Entry = tuple[str | None, ...]
"""Values of one row, one per stored column."""


class Packed(NamedTuple):
    """An answer as bytes."""

    rows: bytes
    """int64."""
    scores: bytes
    """float32."""
    columns: bytes
    """Names and columns of the rows that occur, in rising order, as JSON."""


class Answer(NamedTuple):
    """Hits of n queries, and the stored columns of every row among them."""

    hits: Hits
    names: Sequence[str]
    """Stored columns, the id first."""
    entries: dict[int, Entry]
    """Row -> its value in each of ``names``."""


def occurring_rows(hits: Hits) -> npt.NDArray[np.int64]:
    """Return the distinct rows of ``hits``, rising."""
    rows = np.unique(hits.rows)
    return rows[rows >= 0]


def compose(hits: Hits, names: Sequence[str], columns: Sequence[Column]) -> Answer:
    """Return an answer; ``columns`` hold the values of ``occurring_rows(hits)``, a column per name."""
    return Answer(hits, names, dict(zip(occurring_rows(hits).tolist(), zip(*columns, strict=True), strict=True)))


def pack(hits: Hits, names: Sequence[str], columns: Sequence[Column]) -> Packed:
    """Return the same as bytes: columns, which JSON handles faster than rows, and null for an empty column."""
    filled = [column if column.count(None) < len(column) else None for column in columns]
    stored = json.dumps([names, *filled]).encode()
    return Packed(hits.rows.astype("<i8").tobytes(), hits.scores.astype("<f4").tobytes(), stored)


def unpack(packed: Packed | Answer, num_queries: int) -> Answer:
    """Return the answer to ``num_queries`` queries; an ``Answer`` is returned as it came."""
    if isinstance(packed, Answer):
        return packed
    rows, scores, columns_json = packed
    names, *filled = json.loads(columns_json)
    num_rows = max((len(column) for column in filled if column is not None), default=0)
    columns = [[None] * num_rows if column is None else column for column in filled]
    return compose(read_hits(rows, scores, num_queries), names, columns)


def read_hits(rows: bytes, scores: bytes, num_queries: int) -> Hits:
    """Return hits [num_queries, k] from the bytes of rows and scores."""
    shape = (num_queries, -1)
    return Hits(np.frombuffer(rows, "<i8").reshape(shape), np.frombuffer(scores, "<f4").reshape(shape))


def merge(answers: Sequence[Answer], k: int) -> Answer:
    """Return the ``k`` best hits among several shards' answers to the same queries."""
    if len(answers) == 1 and answers[0].hits.rows.shape[1] == k:
        return answers[0]
    entries = {row: entry for answer in answers for row, entry in answer.entries.items()}
    return Answer(merge_hits([answer.hits for answer in answers], k), answers[0].names, entries)
