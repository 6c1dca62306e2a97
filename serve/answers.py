"""What a shard answers, and how it travels between processes: plain bytes, no pickled arrays."""

import json
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lookalike.retrieval.ranking import Hits, merge_hits

Entry = tuple[str, dict[str, str]]
"""Id and stored columns of a row."""
Packed = tuple[bytes, bytes, bytes]
"""Rows (int64), scores (float32), entries of the rows that occur, in rising order (JSON)."""


class Answer(NamedTuple):
    """Hits of n queries, with the entry of every row in them."""

    hits: Hits
    entries: dict[int, Entry]


def occurring_rows(hits: Hits) -> npt.NDArray[np.int64]:
    """The rows that are hits, each once, rising."""
    rows = np.unique(hits.rows)
    return rows[rows >= 0]


def pack(hits: Hits, entries: Sequence[Entry]) -> Packed:
    """The bytes of an answer; ``entries`` are those of ``occurring_rows(hits)``."""
    return hits.rows.astype("<i8").tobytes(), hits.scores.astype("<f4").tobytes(), json.dumps(entries).encode()


def unpack(packed: Packed | Answer, num_queries: int) -> Answer:
    """The answer to ``num_queries`` queries that ``packed`` holds, if it is not one already."""
    if isinstance(packed, Answer):
        return packed
    rows, scores, entries = packed
    hits = read_hits(rows, scores, num_queries)
    pairs = zip(occurring_rows(hits).tolist(), json.loads(entries), strict=True)
    return Answer(hits, {row: (image_id, metadata) for row, (image_id, metadata) in pairs})


def read_hits(rows: bytes, scores: bytes, num_queries: int) -> Hits:
    """Hits [num_queries, k] from the bytes of their rows and scores."""
    shape = (num_queries, -1)
    return Hits(np.frombuffer(rows, "<i8").reshape(shape), np.frombuffer(scores, "<f4").reshape(shape))


def merge(answers: Sequence[Answer], k: int) -> Answer:
    """The ``k`` best of several shards' answers to the same queries."""
    if len(answers) == 1 and answers[0].hits.rows.shape[1] == k:
        return answers[0]
    entries = {row: entry for answer in answers for row, entry in answer.entries.items()}
    return Answer(merge_hits([answer.hits for answer in answers], k), entries)
