"""Calls whose worker is gone: what is asked again, how often, and what the caller is told."""

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError

from lookalike.errors import UsageError
from lookalike.retrieval.plan import Plan
from lookalike.retrieval.shard_searcher import ShardSearcher
from lookalike.serve.app import read_service
from lookalike.serve.front.fused import open_workers
from lookalike.serve.front.service import Service
from lookalike.serve.proto import retrieval_pb2 as pb
from lookalike.serve.search.retries import is_gone
from lookalike.serve.search.router import Router, SearchOutcome
from lookalike.serve.search.workers import ShardWorker
from lookalike.serve.settings.config import ServeConfig
from lookalike.serve.settings.load import Retries
from lookalike.serve.watch.trace import Trace
from lookalike.serve.wire.ask import Ask
from lookalike.serve.wire.backoff import backoff_s
from lookalike.serve.wire.errors import NotLoadedError, RetrievalError, invalid, not_loaded

if TYPE_CHECKING:
    from tests.serve.conftest import World

QUERY = np.ones((1, 4), np.float32)
QUICK = Retries(max_attempts=3, pause_ms=1, max_pause_ms=2)


class RpcGone(grpc.RpcError):
    def __init__(self, code: grpc.StatusCode) -> None:
        self._code = code

    def code(self) -> grpc.StatusCode:
        return self._code


class Failing:
    """Fails its first calls with the given errors, then answers with one row."""

    def __init__(self, *errors: Exception) -> None:
        self.errors, self.calls = list(errors), 0

    async def search(self, *_: Any) -> Any:
        from lookalike.retrieval.ranking import Hits
        from lookalike.serve.wire.answers import pack

        await self._fail()
        return pack(Hits(np.array([[7]]), np.array([[0.5]], np.float32)), ["image_id"], [["seven"]])

    async def upsert(self, content: bytes) -> int:
        await self._fail()
        return 3

    async def _fail(self) -> None:
        self.calls += 1
        if self.calls <= len(self.errors):
            raise self.errors[self.calls - 1]


def search(
    *shards: Any, timeout_s: float = 5.0, retries: Retries = QUICK, allow_partial: bool = False
) -> SearchOutcome:
    async def run() -> SearchOutcome:
        deadline = asyncio.get_running_loop().time() + timeout_s
        router = Router(shards, retries=retries)
        return await router.search(Ask("g", QUERY, 1, Plan.exact(4)), deadline=deadline, allow_partial=allow_partial)

    return asyncio.run(run())


@pytest.mark.parametrize(
    "error",
    [
        RayActorError(),
        ActorDiedError(),
        ActorUnavailableError("gone", None),
        not_loaded("g", ["h"]),
        RayTaskError("f", "trace", not_loaded("g", [])).as_instanceof_cause(),
        RpcGone(grpc.StatusCode.UNAVAILABLE),
    ],
)
def test_a_call_whose_worker_is_gone_is_made_again(error: Exception) -> None:
    shard = Failing(error, error)
    assert search(shard).shards_answered == 1
    assert shard.calls == 3


@pytest.mark.parametrize(
    "error",
    [
        invalid("no such column"),
        UsageError("wrong"),
        BackPressureError(num_queued_requests=1, max_queued_requests=1),
        RpcGone(grpc.StatusCode.RESOURCE_EXHAUSTED),
        ValueError("a fault of ours"),
    ],
)
def test_nothing_else_is(error: Exception) -> None:
    assert not is_gone(error)
    shard = Failing(error)
    with pytest.raises(RetrievalError):
        search(shard)
    assert shard.calls == 1


def test_attempts_are_bounded_and_the_failure_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    shard = Failing(*[RayActorError()] * 9)
    with caplog.at_level("WARNING"), pytest.raises(RetrievalError, match=r"UNAVAILABLE.*RayActorError"):
        search(shard)
    assert shard.calls == 3
    assert len([record for record in caplog.records if "failed" in record.message]) == 1
    assert search(Failing(), Failing(*[RayActorError()] * 9), allow_partial=True).shards_answered == 1


def test_the_deadline_ends_attempts() -> None:
    shard = Failing(*[RayActorError()] * 99)
    with pytest.raises(RetrievalError, match="DEADLINE_EXCEEDED"):
        search(shard, timeout_s=0.2, retries=Retries(max_attempts=99, pause_ms=40, max_pause_ms=40))
    assert 2 <= shard.calls < 99


def test_a_workers_own_refusal_reaches_the_caller() -> None:
    with pytest.raises(RetrievalError, match=r"INVALID_ARGUMENT.*no such column"):
        search(Failing(), Failing(invalid("no such column")))


def test_a_write_is_repeated_and_a_switch_is_not() -> None:
    async def run(writer: Failing, again: bool) -> Any:
        deadline = asyncio.get_running_loop().time() + 5
        return await Router([], retries=QUICK).ask_one(
            writer, "upsert", b"", deadline=deadline, who="writer", again=again
        )

    assert asyncio.run(run(Failing(RayActorError()), True)) == 3
    once = Failing(RayActorError())
    with pytest.raises(RetrievalError, match="UNAVAILABLE"):
        asyncio.run(run(once, False))
    assert once.calls == 1


def test_a_service_without_an_encoder_says_so_whatever_it_was_switched_to(world: "World") -> None:
    config = ServeConfig(index=world.index, encoder="none", retries=QUICK)
    held = read_service(config)
    service = Service(config, replace(held, encoder=world.encoder_uri), open_workers(config, held, [held]))
    assert not asyncio.run(service.describe(pb.DescribeRequest(), Trace(method="Describe"))).has_encoder
    with pytest.raises(RetrievalError, match=r"FAILED_PRECONDITION.*without an encoder"):
        asyncio.run(service.embed(pb.EmbedRequest(images=[world.images["img-000"]]), Trace(method="Embed")))


class Noting:
    """A shard that notes the generations it is asked for."""

    def __init__(self, shard: ShardWorker, names: set[str]) -> None:
        self._shard, self._names = shard, names

    async def search(self, ask: Ask) -> Any:
        self._names.add(ask.generation)
        return await self._shard.search(ask)

    async def vectors(self, generation: str, image_ids: list[str]) -> Any:
        self._names.add(generation)
        return await self._shard.vectors(generation, image_ids)


@pytest.mark.parametrize("kind", ["vector", "image_id"])
def test_a_generation_that_nobody_holds_any_more_gives_way_to_the_current_one(world: "World", kind: str) -> None:
    config = ServeConfig(index=world.index, encoder="none", retries=QUICK)
    query = {"vector": pb.Query(vector=world.vectors["img-004"].tobytes()), "image_id": pb.Query(image_id="img-004")}
    request = pb.SearchRequest(query=query[kind])

    async def run() -> pb.SearchResponse:
        held = read_service(config)
        old = replace(held, meta=held.meta.model_copy(update={"generation": "old"}))
        service = Service(config, old, open_workers(config, held, [held]))
        with pytest.raises(NotLoadedError):  # nothing else is current
            await service.search(request, Trace(method="Search"))
        asyncio.get_running_loop().call_later(0.002, setattr, service, "current", held)
        names = set[str]()
        service.router.shards = [Noting(shard, names) for shard in service.router.shards]
        response = await service.search(request, Trace(method="Search"))
        assert names == {"old", held.name}
        assert response.info.index_generation == held.name
        return response

    assert asyncio.run(run()).hits[0].id == "img-004"


def test_a_cancelled_call_whose_thread_is_queued_never_runs(world: "World", monkeypatch: pytest.MonkeyPatch) -> None:
    generation = read_service(ServeConfig(index=world.index, encoder="none"))
    worker, ran = ShardWorker(0, 1, [generation]), []
    monkeypatch.setattr(ShardSearcher, "search", lambda *args: ran.append(args))
    ask, release = Ask(generation.name, np.ones((1, 64), np.float32), 1, Plan.exact(64)), threading.Event()

    async def run() -> None:
        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(1))
        busy = asyncio.create_task(asyncio.to_thread(release.wait))
        await asyncio.sleep(0)
        router = Router([worker])
        with pytest.raises(RetrievalError, match="DEADLINE_EXCEEDED"):
            await router.search(ask, deadline=loop.time() + 0.05, allow_partial=False)
        caller = asyncio.create_task(router.search(ask, deadline=loop.time() + 50, allow_partial=False))
        await settle()
        caller.cancel()
        await settle()
        release.set()
        await busy
        await asyncio.to_thread(time.sleep, 0)  # the one thread is free again: whatever was queued before has run

    asyncio.run(run())
    assert not ran


async def settle() -> None:
    """Let tasks run as far as they can."""
    for _ in range(20):
        await asyncio.sleep(0)


def test_pauses_grow_to_their_bound() -> None:
    assert 0.005 <= backoff_s(1, 0.010, 0.035) <= 0.010
    assert 0.010 <= backoff_s(2, 0.010, 0.035) <= 0.020
    assert 0.0175 <= backoff_s(9, 0.010, 0.035) <= 0.035


def test_details_of_dead_replicas() -> None:
    from lookalike.serve.client.attempts import to_error

    died = "The actor died unexpectedly before finishing this task.\n\tclass_name: X"
    dead = SimpleNamespace(code=lambda: grpc.StatusCode.INTERNAL, details=lambda: died)
    other = SimpleNamespace(code=lambda: grpc.StatusCode.INTERNAL, details=lambda: "KeyError: 'x'")
    assert to_error(dead).code == grpc.StatusCode.UNAVAILABLE  # type: ignore[arg-type]
    assert to_error(other).code == grpc.StatusCode.INTERNAL  # type: ignore[arg-type]
