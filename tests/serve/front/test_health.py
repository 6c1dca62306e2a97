"""Health tells whether searches are answered; a caller's gRPC deadline reaches the service."""

import asyncio
import math
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from lookalike.serve.app import read_service
from lookalike.serve.front import health
from lookalike.serve.front.deadline import HEADER, TimedContext, pass_deadlines
from lookalike.serve.front.fused import open_workers
from lookalike.serve.front.health import Pulse
from lookalike.serve.front.overload import read_time_left
from lookalike.serve.front.service import Service
from lookalike.serve.proto import retrieval_pb2 as pb
from lookalike.serve.settings.config import ServeConfig
from lookalike.serve.watch.trace import Trace
from lookalike.serve.wire.errors import RetrievalError

if TYPE_CHECKING:
    from tests.serve.conftest import World


class Searches:
    """Are answered, fail, or hang."""

    def __init__(self) -> None:
        self.trouble: Exception | float | None = None
        self.made = 0

    async def search(self) -> None:
        self.made += 1
        if isinstance(self.trouble, Exception):
            raise self.trouble
        await asyncio.sleep(self.trouble or 0)


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("FRESH_S", 0.05), ("SILENT_S", 0.2), ("ANSWER_S", 0.1)):
        monkeypatch.setattr(health, name, seconds)


@pytest.mark.parametrize(
    ("trouble", "is_serving"),
    [
        (None, True),
        (RetrievalError(grpc.StatusCode.UNAVAILABLE, "gone"), False),
        (60.0, False),
        (RetrievalError(grpc.StatusCode.RESOURCE_EXHAUSTED, "busy with others"), True),
    ],
)
def test_health_is_whether_searches_are_answered(trouble: Exception | float | None, is_serving: bool) -> None:
    async def run() -> None:
        searches = Searches()
        pulse = Pulse(searches.search)
        assert await pulse.is_serving()
        assert not searches.made  # the start is fresh
        searches.trouble = trouble
        await asyncio.sleep(0.3)
        assert await asyncio.wait_for(pulse.is_serving(), 5) == is_serving
        assert (await asyncio.gather(pulse.is_serving(), pulse.is_serving())) == [is_serving] * 2
        assert searches.made <= 3
        pulse.answered = health.time.monotonic()  # as after a caller's search
        assert await pulse.is_serving()

    asyncio.run(run())


def test_a_service_makes_a_search_for_health(world: "World") -> None:
    config = ServeConfig(index=world.index, encoder="none")
    held = read_service(config)

    async def run() -> None:
        service = Service(config, held, open_workers(config, held, [held]))
        service.pulse.answered = -math.inf
        assert await service.pulse.is_serving()
        service.router.shards[0].generations.clear()
        service.pulse.answered = -math.inf
        assert not await service.pulse.is_serving()

    asyncio.run(run())


def context(left_s: float | None) -> Any:
    return SimpleNamespace(
        invocation_metadata=lambda: (("authorization", "Bearer x"),), time_remaining=lambda: left_s, peer=lambda: "me"
    )


@pytest.mark.parametrize(("left_s", "expected"), [(1.5, 1.5), (None, math.inf), (9e15, math.inf), (-1.0, 0.0)])
def test_the_listener_hands_on_the_callers_deadline(left_s: float | None, expected: float) -> None:
    seen: list[Any] = []

    async def handler(request: Any, given: Any) -> bytes:
        seen.append(given)
        return b"answer"

    server = SimpleNamespace(service_handler_factory=lambda service_method, streaming_type: handler)
    pass_deadlines(None, server)
    unary, stream = SimpleNamespace(name="UNARY_UNARY"), SimpleNamespace(name="STREAM_STREAM")
    timed = server.service_handler_factory(service_method="/x", streaming_type=unary)
    assert asyncio.run(timed("request", context(left_s))) == b"answer"
    assert read_time_left(seen[0].invocation_metadata()) == expected
    assert (seen[0].peer(), seen[0].invocation_metadata()[0]) == ("me", ("authorization", "Bearer x"))
    assert server.service_handler_factory(service_method="/x", streaming_type=stream) is handler


def test_what_a_caller_claims_about_its_time_only_shortens_it() -> None:
    metadata = TimedContext(context(2.0)).invocation_metadata()
    for text in ("5000", "many", "-1", "9" * 20, b"1"):
        assert read_time_left([*metadata, (HEADER, text)]) == 2.0
    assert read_time_left([*metadata, (HEADER, "7")]) == 0.007


def test_a_search_ends_at_the_callers_deadline(world: "World", monkeypatch: pytest.MonkeyPatch) -> None:
    config = ServeConfig(index=world.index, encoder="none", timeout_s=60)
    held = read_service(config)

    async def hang(*_: Any) -> None:
        await asyncio.sleep(60)

    async def run() -> None:
        service = Service(config, held, open_workers(config, held, [held]))
        for shard in service.router.shards:
            monkeypatch.setattr(shard, "search", hang)
        request = pb.SearchRequest(query=pb.Query(vector=world.vectors["img-004"].tobytes()))
        with pytest.raises(RetrievalError, match="DEADLINE_EXCEEDED"):
            await asyncio.wait_for(service.search(request, Trace(method="Search", allowed_s=0.1)), 10)

    asyncio.run(run())
