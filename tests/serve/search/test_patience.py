"""Partial answers come soon, queries by id ask the shard that holds it, and calls that a replica ends say so."""

import asyncio
import time
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import pytest

from lookalike.retrieval.plan import Plan
from lookalike.retrieval.ranking import Hits
from lookalike.serve.client.attempts import Attempts, to_error
from lookalike.serve.search import patience
from lookalike.serve.search.retries import is_gone
from lookalike.serve.search.router import Router, SearchOutcome
from lookalike.serve.settings.load import Batching, Retries
from lookalike.serve.wire.answers import pack
from lookalike.serve.wire.ask import Ask
from lookalike.serve.wire.errors import CallEndedError, RetrievalError

QUERY = np.ones((1, 4), np.float32)
FOREVER = 3600.0
QUICK = Retries(hedge_ms=50, max_attempts=2, pause_ms=1)


class Shard:
    """Answers after ``delay_s``, or ends the call by itself if that is None."""

    def __init__(self, row: int, delay_s: float | None = 0.0) -> None:
        self.row, self.delay_s, self.calls = row, delay_s, 0

    async def _answer(self) -> None:
        self.calls += 1
        if self.delay_s is None:
            raise asyncio.CancelledError
        await asyncio.sleep(self.delay_s)

    async def search(self, ask: Ask) -> Any:
        await self._answer()
        return pack(Hits(np.array([[self.row]]), np.array([[0.5]], np.float32)), ["image_id"], [[f"id{self.row}"]])

    async def vectors(self, generation: str, image_ids: list[str]) -> dict[str, bytes]:
        await self._answer()
        return {name: QUERY.tobytes() for name in image_ids if name == f"id{self.row}"}


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "AFTER_HEDGE_S", 0.25)
    monkeypatch.setattr(patience, "SILENT_S", 0.02)


async def search(router: Router, timeout_s: float = 10.0, *, allow_partial: bool = True) -> tuple[int, float]:
    """The number of shards that answered, and the seconds it took."""
    ask, start = Ask("g", QUERY, 1, Plan.exact(4)), time.monotonic()
    deadline = asyncio.get_running_loop().time() + timeout_s
    outcome: SearchOutcome = await router.search(ask, deadline=deadline, allow_partial=allow_partial)
    return outcome.shards_answered, time.monotonic() - start


@pytest.mark.parametrize("batching", [None, Batching()])
def test_a_dead_shard_costs_a_partial_answer_little_and_the_next_ones_less(batching: Batching | None) -> None:
    async def run() -> None:
        dead = Shard(1, FOREVER)
        router = Router([Shard(0), dead], retries=QUICK, batching=batching)
        answered, first_s = await search(router)
        assert (answered, 0.3 <= first_s < 5) == (1, True)
        assert (await search(router))[1] < first_s
        dead.delay_s = 0.0
        for _ in range(3):
            answered, _ = await search(router)
        assert answered == 2

    asyncio.run(run())


def test_a_slow_shard_is_waited_for_as_the_others_are_slow() -> None:
    async def run(delays_s: list[float], timeout_s: float) -> int:
        return (await search(Router([Shard(n, each) for n, each in enumerate(delays_s)], retries=QUICK), timeout_s))[0]

    assert asyncio.run(run([0.0, 0.1], 10)) == 2  # within what a hedge takes
    assert asyncio.run(run([0.3, 0.8], 10)) == 2  # within four times the other's time
    assert asyncio.run(run([0.0, 0.7], 10)) == 1
    assert asyncio.run(run([0.0, 0.25], 0.2)) == 1  # in time for the caller


def test_a_shard_that_comes_back_slowly_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> list[int]:
        slow = Shard(1, FOREVER)
        router = Router([Shard(0), slow], retries=QUICK)
        seen = [(await search(router))[0]]
        slow.delay_s = 0.1  # more than a silent shard gets
        seen.append((await search(router))[0])
        monkeypatch.setattr(patience, "SILENT_FOR_S", 0.0)
        seen.append((await search(router))[0])
        monkeypatch.undo()
        return [*seen, (await search(router))[0]]

    assert asyncio.run(run()) == [1, 1, 2, 2]


def test_a_whole_answer_waits_for_all() -> None:
    async def run() -> None:
        router = Router([Shard(0), Shard(1, 0.6)], retries=QUICK)
        assert (await search(router, allow_partial=False))[0] == 2
        with pytest.raises(RetrievalError, match="DEADLINE_EXCEEDED"):
            await search(Router([Shard(0), Shard(1, FOREVER)], retries=QUICK), 0.2, allow_partial=False)

    asyncio.run(run())


def test_an_id_is_asked_of_the_shard_that_holds_it() -> None:
    shards = [Shard(0), Shard(1, FOREVER)]

    async def look(*ids: str, allow_partial: bool = False) -> int:
        router, deadline = Router(shards, retries=QUICK), asyncio.get_running_loop().time() + 0.5
        groups = [int(name[-1]) % 2 for name in ids]
        found = await router.stored_vectors("g", ids, deadline=deadline, groups=groups, allow_partial=allow_partial)
        return len(found)

    assert asyncio.run(look("id0")) == 1
    assert shards[1].calls == 0
    with pytest.raises(RetrievalError, match=r"NOT_FOUND.*'id2'"):
        asyncio.run(look("id0", "id2"))
    with pytest.raises(RetrievalError, match=r"DEADLINE_EXCEEDED.*shard 1 of 2"):
        asyncio.run(look("id1"))
    start = time.monotonic()
    with pytest.raises(RetrievalError, match=r"UNAVAILABLE: shard 1 of 2, which would hold 'id1'"):
        asyncio.run(look("id0", "id1", allow_partial=True))
    assert time.monotonic() - start < 0.5


def test_a_call_that_the_replica_ends_is_unavailable_and_never_cancelled() -> None:
    ending = Shard(1, None)

    async def run(*, allow_partial: bool) -> int:
        return (await search(Router([Shard(0), ending], retries=QUICK), allow_partial=allow_partial))[0]

    with pytest.raises(RetrievalError, match=r"UNAVAILABLE.*ended there"):
        asyncio.run(run(allow_partial=False))
    assert asyncio.run(run(allow_partial=True)) == 1
    assert is_gone(CallEndedError("search"))


def test_a_client_repeats_a_call_that_the_service_cancelled() -> None:
    error = SimpleNamespace(
        code=lambda: grpc.StatusCode.CANCELLED, details=lambda: "Client for request x disconnected."
    )
    assert to_error(error).code == grpc.StatusCode.UNAVAILABLE  # type: ignore[arg-type]
    assert Attempts(10).failed(error) < 1  # type: ignore[arg-type]
    with pytest.raises(RetrievalError, match="DEADLINE_EXCEEDED"):  # both ends watch the deadline, and HTTP/2 just ends
        Attempts(0.01).failed(error)  # type: ignore[arg-type]
