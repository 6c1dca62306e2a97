"""Writer and followers in one process: what happens when they fail, fall behind or start anew."""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from lookalike.artifacts import Artifact
from lookalike.errors import UsageError
from lookalike.serve import follower, journal
from lookalike.serve import writer as module
from lookalike.serve.compaction import ROOT, compact
from lookalike.serve.config import ServeConfig, Writes
from lookalike.serve.errors import RetrievalError
from lookalike.serve.follower import Follower
from lookalike.serve.generation import Generation, read_generation
from lookalike.serve.proto import retrieval_pb2 as pb
from lookalike.serve.router import Router
from lookalike.serve.workers import ShardWorker
from lookalike.serve.writer import Writer
from tests.serve.conftest import publish_embeddings, publish_index

if TYPE_CHECKING:
    from tests.serve.conftest import World

VECTOR = np.arange(1, 65, dtype=np.float32)


class Handle:
    """Calls an object as a Serve handle does; ``target`` None is a process that is gone."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def __getattr__(self, name: str) -> Any:
        class Method:
            def __init__(self, handle: Handle) -> None:
                self.handle = handle

            async def remote(self, *args: Any) -> Any:
                if self.handle.target is None:
                    raise ConnectionError("gone")
                return await getattr(self.handle.target, name)(*args)

        return Method(self)


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Polls short enough for tests."""
    for place in (follower, module):
        monkeypatch.setattr(place, "POLL_S", 0.2)
    monkeypatch.setattr(module, "SILENCE_S", 0.6)
    monkeypatch.setattr(follower, "RETRY_S", 0.02)


@pytest.fixture
def config(world: "World", tmp_path: Path) -> ServeConfig:
    return ServeConfig(index=world.index, encoder="none", writes=Writes(state=str(tmp_path / "state")))


@pytest.fixture(scope="module")
def indexes(world: "World") -> list[str]:
    """Two more indexes of the same model, of forty and of thirty pictures."""
    encoder, uris = Artifact.open(world.encoder_uri), []
    for number, size in enumerate((40, 30)):
        vectors = dict(list(world.vectors.items())[:size])
        embeddings = publish_embeddings(world.root, encoder, vectors, fingerprint=f"{number:04d}" + "b" * 16)
        uris.append(publish_index(world.root, embeddings, vectors, encoder.manifest.fingerprint,
                                  fingerprint=f"{number:04d}" + "c" * 16).uri)  # fmt: skip
    return uris


def open_writer(config: ServeConfig) -> Writer:
    return Writer(config, read_generation(config.index, config.plan, config.encoder))


async def follow(handle: Handle, group: int = 0, num_groups: int = 1) -> ShardWorker:
    worker = ShardWorker(group, num_groups, [], handle)
    worker.follower = Follower(worker, handle, role=f"shard-{group:03d}", drain_s=0.2)  # type: ignore[arg-type]
    await worker.follower.start()
    return worker


async def leave(*workers: ShardWorker) -> None:
    for worker in workers:
        task = worker.follower._task  # type: ignore[union-attr]
        assert task is not None
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


def upsert(*ids: str, model: str, vector: np.ndarray = VECTOR) -> bytes:
    rows = [pb.Row(id=image_id, vector=vector.tobytes()) for image_id in ids]
    return pb.UpsertRequest(rows=rows, model_fingerprint=model).SerializeToString()


async def ids(worker: ShardWorker, name: str, k: int = 3) -> list[str]:
    plan = read_plan()
    deadline = asyncio.get_running_loop().time() + 10
    found = await Router([worker]).search(name, VECTOR[None], k, plan, {}, deadline=deadline, allow_partial=False)
    return [found.answer.entries[row][0] for row in found.answer.hits.rows[0].tolist() if row >= 0]


def published(folder: str) -> set[str]:
    """What compactions made that is still there."""
    return {str(path.parent) for path in Path(folder, ROOT).glob("*/*/*/manifest.json")}


def read_plan() -> Any:
    from lookalike.retrieval.plan import Plan

    return Plan.exact(64)


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    for _ in range(200):
        if await condition():
            return
        await asyncio.sleep(0.02)
    raise AssertionError("it does not happen")


def run(work: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(work(), 60))


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


def broken(generation: Generation) -> Any:
    raise MemoryError("no memory")


def switch_to(index: str, **settings: Any) -> bytes:
    return pb.SwitchRequest(index=index, encoder="none", **settings).SerializeToString()


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


def test_an_index_without_the_writes_gets_them_and_none_may_be_lost(
    config: ServeConfig, world: "World", indexes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a compaction the log may go on from there only if no index without the writes is to be served."""
    model = world.encoder.fingerprint
    monkeypatch.setattr(journal, "FILE_BYTES", 1)  # every write a file of its own
    folder = config.writes.state or ""

    async def in_process(index: str, records: Any, where: str) -> str:
        return await asyncio.to_thread(compact, index, records, where)

    monkeypatch.setattr(module, "compact_in_task", in_process)
    monkeypatch.setattr("lookalike.serve.index._map_tasks", lambda function, tasks, _: [function(*t) for t in tasks])
    monkeypatch.setattr("lookalike.serve.index.ensure_ray", lambda: None)

    async def work() -> None:
        writer = open_writer(config)
        worker = await follow(Handle(writer))
        for number in range(3):
            await writer.upsert(upsert(f"n{number}", model=model, vector=VECTOR * (-1) ** number))
        compacted = pb.Generation.FromString(await writer.compact(0))
        assert (compacted.includes_writes, compacted.num_rows) == (3, 63)
        assert compacted.index.startswith(f"{folder}/{ROOT}/")
        assert set(await ids(worker, compacted.name, 2)) == {"n0", "n2"}
        # the index before it is still held for a rollback, so the log has all, and another index can get them
        moved = pb.Generation.FromString(await writer.switch(switch_to(indexes[0])))
        assert moved.includes_writes == 0
        assert set(await ids(worker, moved.name, 2)) == {"n0", "n2"}
        assert pb.Generation.FromString(await writer.switch(switch_to(compacted.index))).includes_writes == 3
        await writer.upsert(upsert("n3", model=model))
        again = pb.Generation.FromString(await writer.compact(0))
        assert (again.includes_writes, again.num_rows) == (4, 64)
        assert writer._log.journal.first == 4  # both that are held have the first three
        with pytest.raises(RetrievalError, match=r"holds the service's writes up to 0, those up to 3 are only in"):
            await writer.switch(switch_to(indexes[0]))
        assert pb.Generation.FromString(await writer.switch(switch_to(indexes[0], includes_writes=4))).num_rows == 40
        await writer.rollback()
        assert len(published(folder)) == 4  # two indexes and their embeddings, all young
        await writer.upsert(upsert("n4", model=model))
        writer._config = writer._config.model_copy(update={"writes": Writes(state=folder, keep_hours=0)})
        last = pb.Generation.FromString(await writer.compact(0))
        assert last.num_rows == 65
        kept = published(folder)
        assert len(kept) == 4  # of the one that is served and of the one before it
        assert {again.index, last.index} <= kept
        rolled = pb.Generation.FromString(await writer.rollback())
        assert rolled.index == again.index
        assert "n4" in await ids(worker, rolled.name, 5)
        await leave(worker)
        writer._log.journal.close()

    run(work)


def test_another_model_is_refused_while_writes_wait(config: ServeConfig, world: "World") -> None:
    model = world.encoder.fingerprint

    async def work() -> None:
        writer = open_writer(config)
        await writer.upsert(upsert("n", model=model))
        with pytest.raises(RetrievalError, match=r"FAILED_PRECONDITION.*of model another"):
            await writer.upsert(upsert("m", model="another"))
        writer._is_changing_model = True
        with pytest.raises(RetrievalError, match=r"UNAVAILABLE.*index of another model is being loaded"):
            await writer.upsert(upsert("m", model=model))
        writer._is_changing_model = False
        await writer._log.store(journal.UPSERT, upsert("m", model="another"))  # as after a rollback to another model
        with pytest.raises(RetrievalError, match=r"FAILED_PRECONDITION.*1 written rows have vectors of another model"):
            await writer.compact(0)
        assert pb.StatusResponse.FromString(await writer.status()).pending_rows == 2
        writer._log.journal.close()

    run(work)
    other = config.model_copy(update={"index": world.index + "/"})  # another configuration of the same index
    with pytest.raises(UsageError, match="another model"):
        Writer(other, other_model(world))
    open_writer(other)._log.journal.close()


def other_model(world: "World") -> Generation:
    from dataclasses import replace

    generation = read_generation(world.index, None, "none")
    encoder = generation.meta.encoder.model_copy(update={"fingerprint": "another"})
    return replace(generation, meta=generation.meta.model_copy(update={"encoder": encoder}))


def test_rows_that_compaction_would_lose_are_refused() -> None:
    row = pb.Row(id="a", metadata={"view": "front"})
    module.check_kept(row, {})
    module.check_kept(row, {"view": ["icon", "front"]})
    with pytest.raises(RetrievalError, match=r"INVALID_ARGUMENT.*view='front'.*\['icon'\]"):
        module.check_kept(row, {"view": ["icon"]})


def test_too_many_waiting_rows_are_refused(config: ServeConfig, world: "World") -> None:
    writes = config.writes.model_copy(update={"max_pending_rows": 2, "compact_rows": None})

    async def work() -> None:
        writer = open_writer(config.model_copy(update={"writes": writes}))
        await writer.upsert(upsert("a", "b", model=world.encoder.fingerprint))
        with pytest.raises(RetrievalError, match=r"RESOURCE_EXHAUSTED.*2 rows wait.*compact"):
            await writer.upsert(upsert("c", model=world.encoder.fingerprint))
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


def test_a_write_under_way_keeps_another_model_out(
    config: ServeConfig, world: "World", indexes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stored, go = threading.Event(), threading.Event()

    async def work() -> None:
        writer = open_writer(config)
        append = writer._log.journal.append

        def slow(writes: Any) -> int:
            stored.set()
            go.wait(10)
            return append(writes)

        monkeypatch.setattr(writer._log.journal, "append", slow)
        monkeypatch.setattr(module, "read_generation", lambda *_, **__: other_model(world))
        storing = asyncio.ensure_future(writer.upsert(upsert("n", model=world.encoder.fingerprint)))
        await asyncio.to_thread(stored.wait, 10)
        asyncio.get_running_loop().call_later(0.1, go.set)
        with pytest.raises(RetrievalError, match=r"FAILED_PRECONDITION.*not switched: 1 written rows have vectors"):
            await writer.switch(switch_to(indexes[0]))
        assert await storing == 1
        assert await writer.upsert(upsert("m", model=world.encoder.fingerprint)) == 2
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


def test_a_folder_whose_parts_do_not_fit_is_refused(
    config: ServeConfig, world: "World", monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files restored from copies of different times, or gone: no acknowledged write may be passed over silently."""
    model, folder = world.encoder.fingerprint, Path(config.writes.state or "")
    monkeypatch.setattr(journal, "FILE_BYTES", 1)

    async def work() -> None:
        writer = open_writer(config)
        for number in range(3):
            await writer.upsert(upsert(f"n{number}", model=model))
        await writer.switch(switch_to(world.index, includes_writes=3))
        await writer._set(writer._state.model_copy(update={"held": (writer._state.serving,)}))
        writer._forget()
        writer._log.journal.close()

    run(work)
    state = (folder / "state.json").read_bytes()
    (folder / "state.json").unlink()
    with pytest.raises(UsageError, match=r"no state.json, and its writes before 3 .*restore state.json"):
        open_writer(config)
    (folder / "state.json").write_bytes(state)
    open_writer(config)._log.journal.close()
    for path in folder.glob("writes-*.log"):
        path.unlink()
    with pytest.raises(UsageError, match=r"has the writes up to 0, .*holds those up to 3.*restore all"):
        open_writer(config)


def test_a_failed_compaction_is_not_begun_by_every_write(
    config: ServeConfig, world: "World", monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = 0

    async def full(index: str, records: Any, where: str) -> str:
        nonlocal begun
        begun += 1
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "compact_in_task", full)
    writes = config.writes.model_copy(update={"compact_rows": 1})

    async def work() -> None:
        writer = open_writer(config.model_copy(update={"writes": writes}))
        for number in range(5):
            await writer.upsert(upsert(f"n{number}", model=world.encoder.fingerprint))
            await asyncio.sleep(0.01)
        assert begun == 1
        with pytest.raises(RetrievalError, match=r"FAILED_PRECONDITION.*not compacted.*No space"):
            await writer.compact(0)
        writer._compact_after = 0.0
        await writer.upsert(upsert("later", model=world.encoder.fingerprint))
        await asyncio.sleep(0.01)
        assert begun == 3
        writer._log.journal.close()

    run(work)


def test_a_switch_that_cannot_be_stored_changes_nothing(
    config: ServeConfig, world: "World", indexes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work() -> None:
        writer = open_writer(config)
        worker = await follow(Handle(writer))

        def read_only(folder: str, state: Any) -> None:
            raise PermissionError(30, "Read-only file system")

        with monkeypatch.context() as broken:
            broken.setattr(module, "save_state", read_only)
            with pytest.raises(RetrievalError, match=r"UNAVAILABLE.*could not be stored.*Read-only"):
                await writer.switch(switch_to(indexes[0]))
        assert writer._state.current == world.searcher.meta.generation
        assert pb.Generation.FromString(await writer.switch(switch_to(indexes[0]))).num_rows == 40
        await leave(worker)
        writer._log.journal.close()

    run(work)
