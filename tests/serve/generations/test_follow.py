"""Writer and followers in one process: what happens when they fail, fall behind or start anew."""

import asyncio
import threading
from typing import TYPE_CHECKING, Any

import pytest

from lookalike.artifacts import Artifact
from lookalike.serve.generations import followers
from lookalike.serve.generations.news import News, Poll
from lookalike.serve.proto import retrieval_pb2 as pb
from lookalike.serve.settings.config import ServeConfig
from lookalike.serve.wire.errors import RetrievalError
from tests.serve.generations.following import (
    Handle,
    broken,
    follow,
    holds,
    ids,
    open_writer,
    run,
    status,
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
        writer.close()
        assert await all_seen()
        handle.target = again = open_writer(config)
        assert await again.delete(pb.DeleteRequest(ids=["n1"]).SerializeToString()) == 6

        async def one_less() -> bool:
            return "n1" not in await ids(worker, name, 5)

        await until(one_less)
        late = await follow(handle)
        assert sorted(await ids(late, name, 4)) == ["n0", "n2", "n3", "n4"]
        again.close()

    run(work)


def test_a_switch_waits_for_all_and_fails_for_all(config: ServeConfig, world: "World", indexes: list[str]) -> None:
    async def work() -> None:
        writer = open_writer(config)
        workers = [await follow(Handle(writer), group, 2) for group in range(2)]
        before = world.searcher.meta.generation
        moved = pb.Generation.FromString(await writer.switch(switch_to(indexes[0])))
        assert moved.num_rows == 40
        assert all([await holds(worker, moved.name) for worker in workers])
        workers[1].open = broken  # type: ignore[method-assign]
        with pytest.raises(RetrievalError, match=r"FAILED_PRECONDITION.*shard-001: no memory.*nothing has changed"):
            await writer.switch(switch_to(indexes[1]))
        now = await status(writer)
        assert (now.current, now.previous) == (moved.name, before)
        assert pb.Generation.FromString(await writer.rollback()).name == before
        assert pb.Generation.FromString(await writer.rollback()).name == moved.name  # and back
        writer.close()
        again = open_writer(config)
        assert (await status(again)).current == moved.name
        again.close()

    run(work)


def test_a_replaced_generation_is_let_go(config: ServeConfig, world: "World", indexes: list[str]) -> None:
    async def work() -> None:
        writer = open_writer(config)
        worker = await follow(Handle(writer))
        for index in indexes:
            await writer.switch(switch_to(index))

        async def is_gone() -> bool:
            return not await holds(worker, world.searcher.meta.generation)

        await until(is_gone)
        assert all([await holds(worker, Artifact.open(index).manifest.fingerprint) for index in indexes])
        writer.close()

    run(work)


def test_a_write_that_comes_at_the_end_of_loading_is_not_passed_over(
    config: ServeConfig, world: "World", indexes: list[str]
) -> None:
    model, new_goes, old_goes = world.encoder.fingerprint, threading.Event(), threading.Event()

    async def work() -> None:
        writer = open_writer(config)
        worker = await follow(Handle(writer))
        apply, old, new_waits, old_waits = worker.apply, [], asyncio.Event(), asyncio.Event()
        loop = asyncio.get_running_loop()

        def slow(opened: Any, records: Any) -> None:
            if not old:  # the first write
                old.append(opened)
                loop.call_soon_threadsafe(first_taken.set)
            elif opened is old[0]:
                loop.call_soon_threadsafe(old_waits.set)
                assert old_goes.wait(10)
            else:
                loop.call_soon_threadsafe(new_waits.set)
                assert new_goes.wait(10)
            apply(opened, records)
            if new_goes.is_set() and opened is not old[0]:
                loop.call_soon_threadsafe(given.set)

        first_taken, given = asyncio.Event(), asyncio.Event()
        worker.apply = slow  # type: ignore[method-assign]
        await writer.upsert(upsert("n1", model=model))
        await first_taken.wait()
        switching = asyncio.ensure_future(writer.switch(switch_to(indexes[0])))
        await new_waits.wait()  # the new one is being given the first write
        await writer.upsert(upsert("n2", model=model))
        await old_waits.wait()  # the old one is being given the second
        new_goes.set()
        await given.wait()
        old_goes.set()
        moved = pb.Generation.FromString(await switching)
        assert {"n1", "n2"} <= set(await ids(worker, moved.name, 5))
        writer.close()

    run(work)


def test_another_plan_may_be_tried_again_after_one_could_not_be_held(config: ServeConfig, world: "World") -> None:
    async def work() -> None:
        writer = open_writer(config)
        worker = await follow(Handle(writer))
        whole, worker.open = worker.open, broken  # type: ignore[method-assign]
        with pytest.raises(RetrievalError, match="no memory"):
            await writer.switch(switch_to(world.index, plan=world.plan))
        worker.open = whole  # type: ignore[method-assign]
        assert pb.Generation.FromString(await writer.switch(switch_to(world.index, plan=world.plan))).plan == world.plan
        writer.close()

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
        writer.close()

    run(work)


def test_replicas_that_come_and_go_are_not_remembered(config: ServeConfig) -> None:
    async def work() -> None:
        writer = open_writer(config)
        handles = [Handle(writer) for _ in range(3)]
        for handle in handles:
            await follow(handle)
        assert [role.replicas for role in (await status(writer)).followers] == [3]
        for handle in handles:
            handle.target = None
        await follow(Handle(writer))

        async def is_alone() -> bool:
            return [role.replicas for role in (await status(writer)).followers] == [1]

        await until(is_alone)
        writer.close()

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
        writer.close()

    run(work)


def test_a_writer_whose_clock_goes_back_is_followed(
    config: ServeConfig, indexes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work() -> None:
        handle = Handle(before := open_writer(config))
        worker = await follow(handle)
        await before.switch(switch_to(indexes[0]))
        handle.target = None
        before.close()
        monkeypatch.setattr(followers.time, "time_ns", lambda: 1)
        handle.target = again = open_writer(config)
        moved = pb.Generation.FromString(await again.switch(switch_to(indexes[1], timeout_s=5)))
        assert len(await ids(worker, moved.name)) == 3
        polls = 0
        poll = again.follow

        async def count(sent: Poll) -> News:
            nonlocal polls
            polls += 1
            return await poll(sent)

        again.follow = count  # type: ignore[method-assign]
        await asyncio.sleep(1)
        assert polls <= 10  # it waits for news
        again.close()

    run(work)
