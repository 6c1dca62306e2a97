"""Fan-out under failure: lost, late and overloaded shards."""

import asyncio
from typing import Any

import grpc
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.serve.exceptions import BackPressureError

from lookalike.retrieval.plan import Plan
from lookalike.retrieval.ranking import Hits
from lookalike.serve.search.router import Router, SearchOutcome
from lookalike.serve.wire.answers import merge, occurring_rows, pack, unpack
from lookalike.serve.wire.ask import Ask
from lookalike.serve.wire.errors import RetrievalError

QUERY = np.ones((1, 4), np.float32)


class Shard:
    """Answers with one row, or fails as told."""

    def __init__(self, row: int, trouble: Exception | float | None = None) -> None:
        self.row, self.trouble, self.cancelled = row, trouble, False

    async def search(self, ask: Ask) -> Any:
        await self._suffer()
        score = 1.0 / (1 + self.row)
        return pack(Hits(np.array([[self.row]]), np.array([[score]], np.float32)), ["image_id"], [[f"id{self.row}"]])

    async def vectors(self, generation: str, image_ids: list[str]) -> dict[str, bytes]:
        await self._suffer()
        return {name: QUERY.tobytes() for name in image_ids if name == f"id{self.row}"}

    async def _suffer(self) -> None:
        if isinstance(self.trouble, Exception):
            raise self.trouble
        if self.trouble is not None:
            try:
                await asyncio.sleep(self.trouble)
            except asyncio.CancelledError:
                self.cancelled = True
                raise


def search(shards: list[Shard], allow_partial: bool, timeout_s: float = 0.5) -> SearchOutcome:
    async def run() -> SearchOutcome:
        deadline = asyncio.get_running_loop().time() + timeout_s
        ask = Ask("g", QUERY, 3, Plan.exact(4))
        return await Router(shards).search(ask, deadline=deadline, allow_partial=allow_partial)

    return asyncio.run(run())


def ids(outcome: SearchOutcome) -> list[str]:
    return [outcome.answer.entries[row][0] for row in outcome.answer.hits.rows[0].tolist() if row >= 0]


def test_all_shards_answer() -> None:
    outcome = search([Shard(1), Shard(0)], allow_partial=False)
    assert (ids(outcome), outcome.shards_answered) == (["id0", "id1"], 2)


@pytest.mark.parametrize(
    ("trouble", "code"),
    [
        (OSError("gone"), grpc.StatusCode.UNAVAILABLE),
        (60.0, grpc.StatusCode.DEADLINE_EXCEEDED),
        (BackPressureError(num_queued_requests=3, max_queued_requests=3), grpc.StatusCode.RESOURCE_EXHAUSTED),
    ],
)
def test_a_bad_shard_fails_the_request_or_lowers_coverage(trouble: Exception | float, code: grpc.StatusCode) -> None:
    shards = [Shard(0), Shard(1, trouble)]
    with pytest.raises(RetrievalError) as caught:
        search(shards, allow_partial=False)
    assert caught.value.code == code
    assert "shard 1 of 2" in caught.value.message
    outcome = search(shards, allow_partial=True)
    assert (ids(outcome), outcome.shards_answered) == (["id0"], 1)
    with pytest.raises(RetrievalError) as caught:
        search([Shard(0, trouble), Shard(1, trouble)], allow_partial=True)
    assert caught.value.code == code


def test_a_late_shard_is_cancelled() -> None:
    late = Shard(1, 60.0)
    search([Shard(0), late], allow_partial=True)
    assert late.cancelled


def test_an_id_that_a_lost_shard_may_hold_is_not_reported_missing() -> None:
    async def look(shards: list[Shard], name: str) -> list[Any]:
        return await Router(shards).stored_vectors("g", [name], deadline=asyncio.get_running_loop().time() + 1)

    assert len(asyncio.run(look([Shard(0), Shard(1, OSError())], "id0"))) == 1
    with pytest.raises(RetrievalError, match="UNAVAILABLE"):
        asyncio.run(look([Shard(0), Shard(1, OSError())], "id1"))
    with pytest.raises(RetrievalError, match="NOT_FOUND"):
        asyncio.run(look([Shard(0), Shard(1)], "id2"))


def test_the_error_survives_pickling() -> None:
    import pickle

    error = pickle.loads(pickle.dumps(RetrievalError(grpc.StatusCode.NOT_FOUND, "gone")))
    assert (error.code, error.message, str(error)) == (grpc.StatusCode.NOT_FOUND, "gone", "NOT_FOUND: gone")


@given(st.lists(st.lists(st.integers(-50, 50), max_size=6), min_size=1, max_size=4), st.integers(1, 8))
def test_packed_answers_merge_to_the_best_of_all(shards: list[list[int]], k: int) -> None:
    everything, answers = [], []
    for number, values in enumerate(shards):
        scores = sorted(values, reverse=True)
        rows = [100 * number + place for place in range(len(scores))]
        everything += [(-score, row) for score, row in zip(scores, rows, strict=True)]
        padded = Hits(np.array([[*rows, -1]]), np.array([[*scores, -np.inf]], np.float32))
        columns = [[str(row) for row in occurring_rows(padded).tolist()], [None] * len(rows)]
        answers.append(unpack(pack(padded, ["image_id", "n"], columns), 1))
    merged = merge(answers, k)
    best = [row for _, row in sorted(everything)[:k]]
    assert [row for row in merged.hits.rows[0].tolist() if row >= 0] == best
    assert [merged.entries[row] for row in best] == [(str(row), None) for row in best]
