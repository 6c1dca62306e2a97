"""What a shard answers, and how it travels between processes: plain bytes, no pickled arrays."""

import json
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lookalike.retrieval.ranking import Hits, merge_hits

Column = Sequence[str | None]
"""What some rows hold in one stored column; None where they hold nothing."""
Entry = tuple[str | None, ...]
"""What a row holds in each stored column."""
Packed = tuple[bytes, bytes, bytes]
"""Rows (int64), scores (float32), names and columns of the rows that occur, in rising order (JSON)."""


class Answer(NamedTuple):
    """Hits of n queries, with what is stored of every row in them."""

    hits: Hits
    names: Sequence[str]
    """Stored columns, the id first."""
    entries: dict[int, Entry]
    """Row -> what it holds in each of ``names``."""


def occurring_rows(hits: Hits) -> npt.NDArray[np.int64]:
    """The rows that are hits, each once, rising."""
    rows = np.unique(hits.rows)
    return rows[rows >= 0]


def compose(hits: Hits, names: Sequence[str], columns: Sequence[Column]) -> Answer:
    """An answer; ``columns`` are those of ``occurring_rows(hits)``, one for each of ``names``."""
    return Answer(hits, names, dict(zip(occurring_rows(hits).tolist(), zip(*columns, strict=True), strict=True)))


def pack(hits: Hits, names: Sequence[str], columns: Sequence[Column]) -> Packed:
    """The bytes of the same. Columns are written and read faster than rows, and one of nothing but None is null."""
    filled = [column if column.count(None) < len(column) else None for column in columns]
    stored = json.dumps([names, *filled]).encode()
    return hits.rows.astype("<i8").tobytes(), hits.scores.astype("<f4").tobytes(), stored


def unpack(packed: Packed | Answer, num_queries: int) -> Answer:
    """The answer to ``num_queries`` queries that ``packed`` holds, if it is not one already."""
    if isinstance(packed, Answer):
        return packed
    rows, scores, stored = packed
    names, *filled = json.loads(stored)
    num_rows = max((len(column) for column in filled if column is not None), default=0)
    columns = [[None] * num_rows if column is None else column for column in filled]
    return compose(read_hits(rows, scores, num_queries), names, columns)


def read_hits(rows: bytes, scores: bytes, num_queries: int) -> Hits:
    """Hits [num_queries, k] from the bytes of their rows and scores."""
    shape = (num_queries, -1)
    return Hits(np.frombuffer(rows, "<i8").reshape(shape), np.frombuffer(scores, "<f4").reshape(shape))


def merge(answers: Sequence[Answer], k: int) -> Answer:
    """The ``k`` best of several shards' answers to the same queries."""
    if len(answers) == 1 and answers[0].hits.rows.shape[1] == k:
        return answers[0]
    entries = {row: entry for answer in answers for row, entry in answer.entries.items()}
    return Answer(merge_hits([answer.hits for answer in answers], k), answers[0].names, entries)
