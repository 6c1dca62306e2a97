"""Writes of several portions, compactions that fail, and followers that know more than the log."""

import asyncio
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from lookalike import storage
from lookalike.artifacts import Artifact
from lookalike.errors import ArtifactError, LookalikeError
from lookalike.serve.front.fused import open_workers
from lookalike.serve.front.service import Service
from lookalike.serve.generations import adoption, compaction
from lookalike.serve.generations import writer as module
from lookalike.serve.generations.acknowledged import FILE as ACKNOWLEDGED
from lookalike.serve.generations.compaction import COMPACTING, ROOT, check_space, compact, estimate_bytes
from lookalike.serve.generations.database import Database
from lookalike.serve.generations.generation import read_generation
from lookalike.serve.generations.pruning import prune_drafts
from lookalike.serve.generations.write_record import WriteKind, WriteRecord
from lookalike.serve.generations.writer import Writer
from lookalike.serve.proto import retrieval_pb2 as pb
from lookalike.serve.settings.config import ServeConfig
from lookalike.serve.watch.trace import Trace
from lookalike.serve.wire import writes
from lookalike.serve.wire.errors import RetrievalError
from tests.serve.generations.following import (
    VECTOR,
    Handle,
    compact_here,
    follow,
    ids,
    open_writer,
    published,
    run,
    status,
    upsert,
)

if TYPE_CHECKING:
    from tests.serve.conftest import World

pytestmark = pytest.mark.usefixtures("soon")


def serving(config: ServeConfig, writer: Writer) -> Service:
    generation = read_generation(config.index, None, "none")
    return Service(config, generation, open_workers(config, generation, []), writer)


def rows_of(num: int) -> pb.UpsertRequest:
    return pb.UpsertRequest(rows=[pb.Row(id=f"new-{number:03d}", vector=VECTOR.tobytes()) for number in range(num)])


def test_an_upsert_of_several_portions_is_stored_whole_or_not_at_all(
    config: ServeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writes, "PORTION_BYTES", 1000)
    append, sizes = Database.append, []

    def full(self: Database, written: Any) -> int:
        sizes.append(len(written))
        raise LookalikeError("the disk is full")

    async def work() -> None:
        writer = open_writer(config)
        service = serving(config, writer)
        worker, name = await follow(Handle(writer)), service.current.name
        with monkeypatch.context() as broken:
            broken.setattr(Database, "append", full)
            with pytest.raises(RetrievalError, match=r"UNAVAILABLE.*the disk is full.*nothing of it was kept"):
                await service.upsert(rows_of(20), Trace(method="Upsert"))
        assert sizes[0] > 3
        assert (await status(writer)).last_write == 0
        assert not [each for each in await ids(worker, name, 20) if each.startswith("new")]
        assert (await service.upsert(rows_of(20), Trace(method="Upsert"))).write == sizes[0]
        assert Database.append is append
        writer.close()

    run(work)


def test_portions_that_went_with_a_writer_are_sent_again(config: ServeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writes, "PORTION_BYTES", 1000)

    async def work() -> None:
        writer = open_writer(config)
        service, staged, stage = serving(config, writer), [], writer.stage

        async def forget(upsert: str, place: int, content: bytes) -> None:
            staged.append(upsert)
            if len(set(staged)) > 1:  # the first ones go with the writer
                await stage(upsert, place, content)

        monkeypatch.setattr(writer, "stage", forget)
        assert (await service.upsert(rows_of(20), Trace(method="Upsert"))).write == len(staged) // 2 + 1
        assert (await status(writer)).pending_rows == 20
        writer.close()

    run(work)


def test_a_follower_that_knows_more_than_the_log_is_not_passed_over(config: ServeConfig, world: "World") -> None:
    model, folder = world.encoder.fingerprint, Path(config.writes.state or "")

    async def work() -> None:
        writer = open_writer(config)
        await writer.upsert(upsert("new-000", model=model))
        writer.close()
        shutil.copytree(folder, older := folder.with_name("older"))
        handle = Handle(writer := open_writer(config))
        worker, name = await follow(handle), world.searcher.meta.generation
        await writer.upsert(upsert("new-001", model=model))
        for _ in range(100):
            if "new-001" in await ids(worker, name):
                break
            await asyncio.sleep(0.02)
        writer.close()
        shutil.rmtree(folder)
        (older / ACKNOWLEDGED).unlink()  # the operator takes the older copy as it is
        older.rename(folder)
        handle.target = writer = open_writer(config)
        await until_heard(writer)
        for change in (
            writer.upsert(upsert("new-002", model=model)),
            writer.delete(pb.DeleteRequest(ids=["new-000"]).SerializeToString()),
            writer.compact(0),
            writer.rollback(),
        ):
            with pytest.raises(
                RetrievalError,
                match=r"FAILED_PRECONDITION.*shard-000 has the writes up to 2, .* up to 1.*start it again",
            ):
                await change
        late = await follow(Handle(again := writer))
        assert "new-000" in await ids(late, name)
        again.close()

    run(work)


async def until_heard(writer: Writer) -> None:
    for _ in range(200):
        if (await status(writer)).followers:
            return
        await asyncio.sleep(0.02)


def drafts(folder: Path) -> set[str]:
    return {path.parent.name for path in (folder / ROOT).glob("*/*/*") if not (path / "manifest.json").exists()}


def test_what_failed_and_killed_compactions_left_is_removed(
    config: ServeConfig, world: "World", monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(config.writes.state or "")
    left = folder / ROOT / "index" / "half" / "0"

    async def work() -> None:
        left.mkdir(parents=True)
        (left / "block").write_bytes(bytes(1000))
        with storage.exclusive(str(folder / ROOT / COMPACTING), lambda: None):  # as one that is under way
            assert prune_drafts(str(folder), []) == []
        writer = open_writer(config)
        assert not left.exists()
        await writer.upsert(upsert("new-000", model=world.encoder.fingerprint))

        async def fail(index: str, records: Any, where: str) -> str:
            left.mkdir(parents=True)
            base = Artifact.open(index, "index")
            compaction.merge_embeddings(compaction.find_embeddings(base), records, f"{where}/{ROOT}")
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(module, "compact_in_task", fail)
        with pytest.raises(RetrievalError, match=r"FAILED_PRECONDITION.*not compacted.*No space"):
            await writer.compact(0)
        assert not left.exists()
        assert published(str(folder)) == set()
        monkeypatch.setattr(module, "compact_in_task", compact_here)
        await writer.compact(0)
        assert len(published(str(folder))) == 2
        assert prune_drafts(str(folder), []) == []
        writer.close()

    run(work)


def test_a_compaction_without_room_does_not_begin(
    config: ServeConfig, world: "World", monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, base = config.writes.state or "", Artifact.open(world.index, "index")
    Path(folder).mkdir()
    embeddings = compaction.find_embeddings(base)
    few = [WriteRecord(1, WriteKind.UPSERT, upsert("a", model="m"))]
    many = [WriteRecord(1, WriteKind.UPSERT, upsert(*world.images, model="m"))]
    size = sum(file.size_bytes for artifact in (base, embeddings) for file in artifact.manifest.files)
    assert 0 < estimate_bytes(base, embeddings, few) < estimate_bytes(base, embeddings, many) < 4 * size
    check_space(base, embeddings, many, folder)
    monkeypatch.setattr(storage, "free_bytes", lambda where: compaction.SPARE_BYTES)
    with pytest.raises(LookalikeError, match=r"compaction needs about \d+ MiB.*has 16 MiB; free some"):
        compact(world.index, few, folder)
    assert published(folder) == set()


def test_a_service_whose_compacted_index_is_damaged_goes_on_from_the_one_before(
    config: ServeConfig, world: "World", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "compact_in_task", compact_here)

    async def work() -> None:
        writer = open_writer(config)
        await writer.upsert(upsert("new-000", model=world.encoder.fingerprint))
        compacted = pb.Generation.FromString(await writer.compact(0))
        await writer.upsert(upsert("new-001", model=world.encoder.fingerprint))
        writer.close()
        path = Path(compacted.index, "shard-00000", "norms.npy")
        good = path.read_bytes()
        path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        writer = open_writer(config)
        worker, now = await follow(Handle(writer)), await status(writer)
        assert (now.current, len(now.generations), now.last_write) == (world.searcher.meta.generation, 1, 2)
        assert {"new-000", "new-001"} <= set(await ids(worker, now.current, 3))
        await writer.switch(pb.SwitchRequest(index=config.index, encoder="none").SerializeToString())
        writer.close()
        damaged = Artifact.open(world.index, check=False)
        monkeypatch.setattr(adoption, "find_damage", lambda index: f"{damaged.uri} is damaged")
        with pytest.raises(ArtifactError, match=r"is damaged; it is the index that answers, .*restore it from a copy"):
            open_writer(config)

    run(work)
