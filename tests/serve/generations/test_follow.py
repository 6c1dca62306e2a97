"""Writer and followers in one process: what happens when they fail, fall behind or start anew."""

import asyncio
import threading
from typing import TYPE_CHECKING, Any

import pytest

from lookalike.artifacts import Artifact
from lookalike.serve.generations import writer as module
from lookalike.serve.proto import retrieval_pb2 as pb
from lookalike.serve.settings.config import ServeConfig
from lookalike.serve.wire.errors import RetrievalError
from tests.serve.generations.following import (
    Handle,
    broken,
    follow,
    ids,
    leave,
    open_writer,
    run,
    switch_to,
    until,
    upsert,
)

if TYPE_CHECKING:
    from tests.serve.conftest import World

pytestmark = pytest.mark.usefixtures("soon")


def test_writes_outlive_the_writer_and_reach_those_who_wait(config: ServeConfig, world: "World") -> None:
    model = world.encoder.fingerprint

    async def work() -> None:
        writer = open_writer(config)
        handle = Handle(writer)
        worker, name = await follow(handle), world.searcher.meta.generation
        assert await asyncio.gather(*(writer.upsert(upsert(f"n{n}", model=model)) for n in range(5))) == [1, 2, 3, 4, 5]

        async def all_seen() -> bool:
            return {"n0", "n1", "n2", "n3", "n4"} == set(await ids(worker, name, 5))

        await until(all_seen)
        handle.target = None  # killed
        writer._log.journal.close()
        await asyncio.sleep(0.1)
        assert await all_seen()
        handle.target = again = open_writer(config)
        assert await again.delete(pb.DeleteRequest(ids=["n1"]).SerializeToString()) == 6

        async def one_less() -> bool:
            return "n1" not in await ids(worker, name, 5)

        await until(one_less)
        late = await follow(handle)
        assert sorted(await ids(late, name, 4)) == ["n0", "n2", "n3", "n4"]
        await leave(worker, late)
        again._log.journal.close()

    run(work)


def test_a_switch_waits_for_all_and_fails_for_all(config: ServeConfig, world: "World", indexes: list[str]) -> None:
    async def work() -> None:
        writer = open_writer(config)
        workers = [await follow(Handle(writer), group, 2) for group in range(2)]
        before = world.searcher.meta.generation
        moved = pb.Generation.FromString(await writer.switch(switch_to(indexes[0])))
        assert moved.num_rows == 40
        assert all(moved.name in worker._held for worker in workers)
        workers[1].open = broken  # type: ignore[method-assign]
        with pytest.raises(RetrievalError, match=r"FAILED_PRECONDITION.*shard-001: no memory.*nothing has changed"):
            await writer.switch(switch_to(indexes[1]))
        status = pb.StatusResponse.FromString(await writer.status())
        assert (status.current, status.previous) == (moved.name, before)
        assert pb.Generation.FromString(await writer.rollback()).name == before
        assert pb.Generation.FromString(await writer.rollback()).name == moved.name  # and back
        await leave(*workers)
        writer._log.journal.close()
        again = open_writer(config)
        assert again._state.current == moved.name
        again._log.journal.close()

    run(work)


def test_a_replaced_generation_is_let_go(config: ServeConfig, world: "World", indexes: list[str]) -> None:
    async def work() -> None:
        writer = open_writer(config)
        worker = await follow(Handle(writer))
        for index in indexes:
            await writer.switch(switch_to(index))

        async def two_left() -> bool:
            return set(worker._held) == {Artifact.open(index).manifest.fingerprint for index in indexes}

        await until(two_left)
        with pytest.raises(RetrievalError, match=r"UNAVAILABLE.*is not loaded here"):
            await ids(worker, world.searcher.meta.generation)
        await leave(worker)
        writer._log.journal.close()

    run(work)


def test_a_write_that_comes_at_the_end_of_loading_is_not_passed_over(
    config: ServeConfig, world: "World", indexes: list[str]
) -> None:
    model, new_goes, old_goes, old_waits = world.encoder.fingerprint, threading.Event(), threading.Event(), []

    async def work() -> None:
        writer = open_writer(config)
        worker = await follow(Handle(writer))
        await writer.upsert(upsert("n1", model=model))
        apply, old = worker.apply, worker._held[world.searcher.meta.generation]
        while old.delta.last < 1:
            await asyncio.sleep(0.01)

        def slow(opened: Any, records: Any) -> None:
            old_waits.append(opened is old)
            assert (old_goes if opened is old else new_goes).wait(10)
            apply(opened, records)

        worker.apply = slow  # type: ignore[method-assign]
        switching = asyncio.ensure_future(writer.switch(switch_to(indexes[0])))
        while not old_waits:  # the new one is being given the first write
            await asyncio.sleep(0.01)
        await writer.upsert(upsert("n2", model=model))
        while True not in old_waits:  # the old one is being given the second
            await asyncio.sleep(0.01)
        new_goes.set()
        await asyncio.sleep(0.1)
        old_goes.set()
        moved = pb.Generation.FromString(await switching)
        assert {"n1", "n2"} <= set(await ids(worker, moved.name, 5))
        await leave(worker)
        writer._log.journal.close()

    run(work)


def test_another_plan_may_be_tried_again_after_one_could_not_be_held(config: ServeConfig, world: "World") -> None:
    async def work() -> None:
        writer = open_writer(config)
        worker = await follow(Handle(writer))
        whole, worker.open = worker.open, broken  # type: ignore[method-assign]
        with pytest.raises(RetrievalError, match="no memory"):
            await writer.switch(switch_to(world.index, plan=world.plan))
        worker.open = whole  # type: ignore[method-assign]
        await asyncio.sleep(0.5)
        assert pb.Generation.FromString(await writer.switch(switch_to(world.index, plan=world.plan))).plan == world.plan
        await leave(worker)
        writer._log.journal.close()

    run(work)


def test_what_an_index_is_said_to_hold_can_be_put_right(config: ServeConfig, world: "World") -> None:
    async def work() -> None:
        writer = open_writer(config)
        worker, name = await follow(Handle(writer)), world.searcher.meta.generation
        await writer.upsert(upsert("n", model=world.encoder.fingerprint))
        await writer.switch(switch_to(world.index, includes_writes=1))
        assert "n" not in await ids(worker, name)
        await writer.switch(switch_to(world.index, includes_writes=0))
        assert "n" in await ids(worker, name)
        await leave(worker)
        writer._log.journal.close()

    run(work)


def test_replicas_that_come_and_go_are_not_remembered(config: ServeConfig) -> None:
    async def work() -> None:
        writer = open_writer(config)
        for _ in range(3):
            await leave(await follow(Handle(writer)))
        await asyncio.sleep(1)  # longer than a silent one is waited for
        worker = await follow(Handle(writer))
        assert len(writer._followers) == 1
        await leave(worker)
        writer._log.journal.close()

    run(work)


def test_a_write_that_could_not_be_taken_in_is_asked_for_again(config: ServeConfig, world: "World") -> None:
    model, name = world.encoder.fingerprint, world.searcher.meta.generation

    async def work() -> None:
        writer = open_writer(config)
        worker = await follow(Handle(writer))
        taken, failures = worker.apply, [MemoryError()]

        def apply(*args: Any) -> None:
            if failures:
                raise failures.pop()
            taken(*args)

        worker.apply = apply  # type: ignore[method-assign]
        await writer.upsert(upsert("n0", model=model))

        async def is_found() -> bool:
            return await ids(worker, name, 1) == ["n0"]

        await until(is_found)
        assert not failures
        await leave(worker)
        writer._log.journal.close()

    run(work)


def test_a_writer_whose_clock_goes_back_is_followed(
    config: ServeConfig, indexes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work() -> None:
        handle = Handle(before := open_writer(config))
        worker = await follow(handle)
        await before.switch(switch_to(indexes[0]))
        handle.target = None
        before._log.journal.close()
        monkeypatch.setattr(module.time, "time_ns", lambda: 1)
        handle.target = again = open_writer(config)
        moved = pb.Generation.FromString(await again.switch(switch_to(indexes[1], timeout_s=5)))
        assert len(await ids(worker, moved.name)) == 3
        asked = 0
        poll = again.follow

        async def count(text: str) -> Any:
            nonlocal asked
            asked += 1
            return await poll(text)

        again.follow = count  # type: ignore[method-assign]
        await asyncio.sleep(1)
        assert asked <= 10  # it waits for news
        await leave(worker)
        again._log.journal.close()

    run(work)
