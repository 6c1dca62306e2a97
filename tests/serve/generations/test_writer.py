"""The writer: what it refuses, so that no acknowledged write is lost, and what compaction leaves."""

import asyncio
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from lookalike.errors import UsageError
from lookalike.serve.generations import journal
from lookalike.serve.generations import writer as module
from lookalike.serve.generations.compaction import ROOT, compact
from lookalike.serve.generations.writer import Writer
from lookalike.serve.proto import retrieval_pb2 as pb
from lookalike.serve.settings.config import ServeConfig, Writes
from lookalike.serve.wire.errors import RetrievalError
from tests.serve.generations.following import (
    VECTOR,
    Handle,
    follow,
    ids,
    leave,
    open_writer,
    other_model,
    published,
    run,
    switch_to,
    upsert,
)

if TYPE_CHECKING:
    from tests.serve.conftest import World

pytestmark = pytest.mark.usefixtures("soon")


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
    monkeypatch.setattr(
        "lookalike.serve.index.build.map_tasks", lambda function, tasks, _: [function(*t) for t in tasks]
    )

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
