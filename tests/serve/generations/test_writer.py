"""The writer: what it refuses, so that no acknowledged write is lost, and what compaction leaves."""

import asyncio
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from lookalike.errors import UsageError
from lookalike.retrieval.searcher import Searcher
from lookalike.serve.generations import database
from lookalike.serve.generations import writer as module
from lookalike.serve.generations.compaction import ROOT, check_kept
from lookalike.serve.generations.database import Database
from lookalike.serve.generations.database_files import FILE
from lookalike.serve.generations.generation import Generation
from lookalike.serve.generations.state import State
from lookalike.serve.generations.writer import Writer
from lookalike.serve.proto import retrieval_pb2 as pb
from lookalike.serve.settings.config import ServeConfig, Writes
from lookalike.serve.wire.errors import RetrievalError
from tests.serve.generations.following import (
    VECTOR,
    Handle,
    compact_here,
    follow,
    ids,
    open_writer,
    other_model,
    published,
    run,
    status,
    switch_to,
    upsert,
)

if TYPE_CHECKING:
    from tests.serve.conftest import World

pytestmark = pytest.mark.usefixtures("soon")


@pytest.fixture
def no_spare_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compactions in this process, after which only the writes that are lacked are kept."""
    monkeypatch.setattr(database, "KEPT_WRITES", 1)
    monkeypatch.setattr(module, "compact_in_task", compact_here)


def generation(message: bytes) -> pb.Generation:
    return pb.Generation.FromString(message)


@pytest.mark.usefixtures("no_spare_writes")
def test_an_index_without_the_writes_gets_them_and_none_may_be_lost(
    config: ServeConfig, world: "World", indexes: list[str]
) -> None:
    """After a compaction the log may go on from there only if no index without the writes is to be served."""
    model, folder = world.encoder.fingerprint, config.writes.state or ""

    async def work() -> None:
        handle = Handle(writer := open_writer(config))
        worker = await follow(handle)
        for number in range(3):
            await writer.upsert(upsert(f"new-{number:03d}", model=model, vector=VECTOR * (-1) ** number))
        compacted = generation(await writer.compact(0))
        assert (compacted.includes_writes, compacted.num_rows) == (3, 63)
        assert compacted.index.startswith(f"{folder}/{ROOT}/")
        assert set(await ids(worker, compacted.name, 2)) == {"new-000", "new-002"}
        # the index before it is still held for a rollback, so the log has all, and another index can get them
        moved = generation(await writer.switch(switch_to(indexes[0])))
        assert moved.includes_writes == 0
        assert set(await ids(worker, moved.name, 2)) == {"new-000", "new-002"}
        assert generation(await writer.switch(switch_to(compacted.index))).includes_writes == 3
        await writer.upsert(upsert("new-003", model=model))
        again = generation(await writer.compact(0))
        assert (again.includes_writes, again.num_rows) == (4, 64)
        with pytest.raises(RetrievalError, match=r"holds the service's writes up to 0, those up to 3 are only in"):
            await writer.switch(switch_to(indexes[0]))
        assert generation(await writer.switch(switch_to(indexes[0], includes_writes=4))).num_rows == 40
        await writer.rollback()
        assert len(published(folder)) == 4  # two indexes and their embeddings, all young
        await writer.upsert(upsert("new-004", model=model))
        writer.close()
        handle.target = writer = open_writer(config.model_copy(update={"writes": Writes(state=folder, keep_hours=0)}))
        last = generation(await writer.compact(0))
        assert last.num_rows == 65
        left = published(folder)
        assert len(left) == 4  # of the index that is served and of the one before it
        assert {again.index, last.index} <= left
        rolled = generation(await writer.rollback())
        assert rolled.index == again.index
        assert "new-004" in await ids(worker, rolled.name, 5)
        writer.close()

    run(work)


def test_another_model_is_refused_while_writes_wait(
    config: ServeConfig, world: "World", indexes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, loading, go = world.encoder.fingerprint, threading.Event(), threading.Event()
    other = other_model(indexes[0])
    monkeypatch.setattr(module, "read_generation", lambda *_, **__: other)

    async def work() -> None:
        writer = open_writer(config)
        worker = await follow(Handle(writer))
        with pytest.raises(RetrievalError, match=r"FAILED_PRECONDITION.*of model another"):
            await writer.upsert(upsert("m", model="another"))
        whole = worker.open

        def slow(wanted: Generation) -> Any:
            loading.set()
            go.wait(10)
            return whole(wanted)

        worker.open = slow  # type: ignore[method-assign]
        switching = asyncio.ensure_future(writer.switch(switch_to(indexes[0])))
        await asyncio.to_thread(loading.wait, 10)
        with pytest.raises(RetrievalError, match=r"UNAVAILABLE.*index of another model is being loaded"):
            await writer.upsert(upsert("m", model=model))
        go.set()
        await switching
        await writer.upsert(upsert("m", model="another"))
        await writer.rollback()
        with pytest.raises(RetrievalError, match=r"FAILED_PRECONDITION.*1 written rows have vectors of another model"):
            await writer.compact(0)
        assert (await status(writer)).pending_rows == 1
        writer.close()

    run(work)
    moved = config.model_copy(update={"index": world.index + "/"})  # another configuration of the same index
    with pytest.raises(UsageError, match="another model"):
        Writer(moved, other_model(world.index))
    open_writer(moved).close()


def test_rows_that_compaction_would_lose_are_refused() -> None:
    row = pb.Row(id="a", metadata={"view": "front"})
    check_kept(row, {})
    check_kept(row, {"view": ["icon", "front"]})
    with pytest.raises(RetrievalError, match=r"INVALID_ARGUMENT.*view='front'.*\['icon'\]"):
        check_kept(row, {"view": ["icon"]})


def test_too_many_waiting_rows_are_refused(config: ServeConfig, world: "World") -> None:
    writes = config.writes.model_copy(update={"max_pending_rows": 2, "compact_rows": None})

    async def work() -> None:
        writer = open_writer(config.model_copy(update={"writes": writes}))
        await writer.upsert(upsert("a", "b", model=world.encoder.fingerprint))
        with pytest.raises(RetrievalError, match=r"RESOURCE_EXHAUSTED.*2 rows wait.*compact"):
            await writer.upsert(upsert("c", model=world.encoder.fingerprint))
        writer.close()

    run(work)


def test_a_write_under_way_keeps_another_model_out(
    config: ServeConfig, world: "World", indexes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stored, go = threading.Event(), threading.Event()

    async def work() -> None:
        writer = open_writer(config)
        append = Database.append

        def slow(self: Database, writes: Any) -> int:
            stored.set()
            go.wait(10)
            return append(self, writes)

        monkeypatch.setattr(Database, "append", slow)
        monkeypatch.setattr(module, "read_generation", lambda *_, **__: other_model(world.index))
        storing = asyncio.ensure_future(writer.upsert(upsert("n", model=world.encoder.fingerprint)))
        await asyncio.to_thread(stored.wait, 10)
        asyncio.get_running_loop().call_later(0.1, go.set)
        with pytest.raises(RetrievalError, match=r"FAILED_PRECONDITION.*not switched: 1 written rows have vectors"):
            await writer.switch(switch_to(indexes[0]))
        assert await storing == 1
        assert await writer.upsert(upsert("m", model=world.encoder.fingerprint)) == 2
        writer.close()

    run(work)


@pytest.mark.usefixtures("no_spare_writes")
def test_a_folder_whose_parts_do_not_fit_is_refused(config: ServeConfig, world: "World", indexes: list[str]) -> None:
    """A database that is gone, or older than an index of the service: no acknowledged write may be passed over."""
    model, folder = world.encoder.fingerprint, Path(config.writes.state or "")

    async def work() -> None:
        writer = open_writer(config)
        await writer.upsert(upsert("new-000", model=model))
        assert await writer.backup(f"{folder}/older") == 1
        for number in (1, 2):
            await writer.upsert(upsert(f"new-{number:03d}", model=model))
        for number in (3, 4):
            await writer.compact(0)
            await writer.upsert(upsert(f"new-{number:03d}", model=model))
        writer.close()

    run(work)
    with pytest.raises(UsageError, match=r"up to 0, those up to 3 are only in.*switch to it with includes_writes"):
        open_writer(config.model_copy(update={"index": indexes[0]}))
    (folder / FILE).rename(folder / "newest")
    with pytest.raises(UsageError, match=r"has the writes up to 0, .*holds those up to 4: .*newer backup"):
        open_writer(config)
    (folder / "older").replace(folder / FILE)
    with pytest.raises(UsageError, match=r"has the writes up to 1, .*holds those up to 4: .*newer backup"):
        open_writer(config)
    (folder / "newest").replace(folder / FILE)
    open_writer(config).close()


@pytest.mark.usefixtures("no_spare_writes")
def test_a_service_goes_on_from_a_restored_backup(config: ServeConfig, world: "World", tmp_path: Path) -> None:
    model, restored = world.encoder.fingerprint, tmp_path / "restored"
    restored.mkdir()
    roots = config.writes.model_copy(update={"roots": (str(restored),)})
    config = config.model_copy(update={"writes": roots})

    async def work() -> None:
        writer = open_writer(config)
        with pytest.raises(RetrievalError, match=r"FAILED_PRECONDITION: no backup was made: .* looks only below"):
            await writer.backup(str(tmp_path / FILE))
        with pytest.raises(
            RetrievalError, match=r"FAILED_PRECONDITION: not switched: artifact '/etc': .* looks only below"
        ):
            await writer.switch(pb.SwitchRequest(index="/etc").SerializeToString())
        await writer.upsert(upsert("new-000", model=model))
        await writer.compact(0)
        await writer.upsert(upsert("new-001", model=model))
        assert await writer.backup(str(restored / FILE)) == 2
        with pytest.raises(RetrievalError, match=r"FAILED_PRECONDITION.*no backup was made.*exists; name a new file"):
            await writer.backup(str(restored / FILE))
        await writer.upsert(upsert("new-002", model=model))
        before = await status(writer)
        writer.close()
        writer = open_writer(config.model_copy(update={"writes": Writes(state=str(restored))}))
        now = await status(writer)
        assert (now.last_write, now.pending_rows, now.current) == (2, 1, before.current)
        assert set(await ids(await follow(Handle(writer)), now.current, 2)) == {"new-000", "new-001"}
        writer.close()

    run(work)


@pytest.mark.usefixtures("no_spare_writes")
def test_a_database_that_is_removed_takes_no_writes_and_a_compaction_keeps_them(
    config: ServeConfig, world: "World"
) -> None:
    async def work() -> None:
        writer = open_writer(config)
        await writer.upsert(upsert("new-000", model=world.encoder.fingerprint))
        Path(config.writes.state or "", FILE).unlink()
        with pytest.raises(RetrievalError, match=r"UNAVAILABLE.*was removed or replaced.*compact"):
            await writer.delete(pb.DeleteRequest(ids=["img-000"]).SerializeToString())
        with pytest.raises(RetrievalError, match=r"UNAVAILABLE.*index .* holds all writes") as refused:
            await writer.compact(0)
        index = str(refused.value).rpartition("; index ")[2].split()[0]
        assert "new-000" in Searcher.open(index).ids(Searcher.open(index).search(VECTOR[None], 1).rows[0])
        writer.close()

    run(work)


def test_a_failed_compaction_is_not_begun_by_every_write(
    config: ServeConfig, world: "World", monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, tried = 0, asyncio.Event()

    async def full(index: str, records: Any, where: str) -> str:
        nonlocal begun
        begun += 1
        tried.set()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "compact_in_task", full)
    writes = config.writes.model_copy(update={"compact_rows": 1})

    async def work() -> None:
        writer = open_writer(config.model_copy(update={"writes": writes}))
        for number in range(5):
            await writer.upsert(upsert(f"n{number}", model=world.encoder.fingerprint))
            await tried.wait()
        assert begun == 1
        with pytest.raises(RetrievalError, match=r"FAILED_PRECONDITION.*not compacted.*No space"):
            await writer.compact(0)
        monkeypatch.setattr(module, "COMPACT_PAUSE_S", 0.0)
        writer.close()
        writer = open_writer(config.model_copy(update={"writes": writes}))
        number = 0
        while begun < 4:  # each write after a failed compaction begins another
            await writer.upsert(upsert(f"m{number}", model=world.encoder.fingerprint))
            number += 1
        writer.close()

    run(work)


def test_a_switch_that_cannot_be_stored_changes_nothing(
    config: ServeConfig, world: "World", indexes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work() -> None:
        writer = open_writer(config)
        await follow(Handle(writer))

        def read_only(self: Database, state: State) -> None:
            raise PermissionError(30, "Read-only file system")

        with monkeypatch.context() as broken:
            broken.setattr(Database, "save_state", read_only)
            with pytest.raises(RetrievalError, match=r"UNAVAILABLE.*could not be stored.*Read-only"):
                await writer.switch(switch_to(indexes[0]))
        assert (await status(writer)).current == world.searcher.meta.generation
        assert pb.Generation.FromString(await writer.switch(switch_to(indexes[0]))).num_rows == 40
        writer.close()

    run(work)
