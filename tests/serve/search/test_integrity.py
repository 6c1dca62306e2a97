"""Indexes are checked before they answer, and while they do: a damaged one is not answered from."""

import asyncio
import gc
import shutil
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from lookalike.artifacts import Artifact
from lookalike.errors import ArtifactError
from lookalike.retrieval.plan import Plan
from lookalike.serve.generations.generation import Generation, read_generation
from lookalike.serve.search import integrity
from lookalike.serve.search.router import Router
from lookalike.serve.search.workers import RerankWorker, ShardWorker
from lookalike.serve.settings.config import ServeConfig
from lookalike.serve.wire.ask import Ask
from lookalike.serve.wire.errors import RetrievalError
from tests.serve.generations.following import Handle, follow, open_writer, run, status, switch_to

if TYPE_CHECKING:
    from tests.serve.conftest import World

QUERY = np.ones((1, 64), np.float32)


@pytest.fixture
def copied(world: "World", tmp_path: Path) -> Generation:
    """An index that may be damaged."""
    uri = tmp_path / "index" / "copy" / Artifact.open(world.index).manifest.fingerprint
    shutil.copytree(world.index, uri)
    return read_generation(str(uri), None, "none")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def files_of(generation: Generation) -> list[Path]:
    return [Path(generation.index, entry.path) for entry in Artifact.open(generation.index).manifest.files]


def search(workers: list[ShardWorker], generation: Generation, reranker: RerankWorker | None = None) -> list[int]:
    async def ask() -> list[int]:
        deadline = asyncio.get_running_loop().time() + 10
        question = Ask(generation.name, QUERY, 5, Plan.exact(64))
        outcome = await Router(workers, reranker).search(question, deadline=deadline, allow_partial=False)
        rows: list[int] = outcome.answer.hits.rows[0].tolist()
        return rows

    return asyncio.run(ask())


def test_a_flipped_byte_in_any_file_of_a_shard_keeps_the_index_from_answering(copied: Generation) -> None:
    for path in files_of(copied):
        if path.parent.name.startswith("shard-") and path.name != "shard.json":
            good = path.read_bytes()
            flip(path)
            with pytest.raises(ArtifactError, match=rf"is damaged.*{path.parent.name}/{path.name}.*restore the file"):
                [ShardWorker(group, 2, [copied]) for group in range(2)]
            with pytest.raises(ArtifactError, match=path.name):
                RerankWorker([copied])
            path.write_bytes(good)
    assert ShardWorker(0, 1, [copied])


def test_damage_while_it_serves_is_told_and_not_answered_from(copied: Generation) -> None:
    worker, reranker = ShardWorker(0, 1, [copied]), RerankWorker([copied])
    whole = search([worker], copied)
    path = next(path for path in files_of(copied) if path.name == "norms.npy")
    good = path.read_bytes()
    flip(path)
    worker._integrity.read_all()  # noqa: SLF001
    with pytest.raises(RetrievalError, match=rf"UNAVAILABLE.*index {copied.name} is damaged: shard-00000/norms.npy"):
        search([worker], copied)
    with pytest.raises(RetrievalError, match=r"UNAVAILABLE.*damaged"):
        asyncio.run(worker.vectors(copied.name, ["img-000"]))
    reranker._integrity.read_all()  # noqa: SLF001
    with pytest.raises(RetrievalError, match=r"UNAVAILABLE.*damaged.*serve another index"):
        asyncio.run(reranker.rerank(Ask(copied.name, QUERY, 5, Plan.exact(64)), {}))
    path.write_bytes(good)
    worker._integrity.read_all()  # noqa: SLF001
    assert search([worker], copied) == whole
    path.unlink()  # the worker has it open, and nobody else needs it
    worker._integrity.read_all()  # noqa: SLF001
    assert search([worker], copied) == whole
    flip(path.with_name("rows.arrow"))
    worker.drop(copied.name)
    worker._integrity.read_all()  # noqa: SLF001
    worker._integrity.require_sound(copied.name)  # noqa: SLF001


def test_a_large_index_is_checked_by_size_first_and_read_at_once(
    copied: Generation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(integrity, "FULL_CHECK_BYTES", 10)
    told = threading.Event()
    note = integrity.Integrity._note  # noqa: SLF001
    monkeypatch.setattr(
        integrity.Integrity, "_note", lambda self, name, problem: (note(self, name, problem), told.set())
    )
    path = next(path for path in files_of(copied) if path.name == "norms.npy")
    good = path.read_bytes()
    path.write_bytes(good[:-1])
    with pytest.raises(ArtifactError, match=r"norms\.npy"):
        ShardWorker(0, 1, [copied])
    path.write_bytes(good)
    flip(path)
    worker = ShardWorker(0, 1, [copied])
    assert told.wait(30)
    with pytest.raises(RetrievalError, match=r"norms\.npy does not match its SHA-256"):
        search([worker], copied)


def test_reading_takes_its_time_and_ends_with_the_worker(copied: Generation, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    stop = threading.Event()
    monkeypatch.setattr(stop, "wait", waits.append)
    pause = integrity.Pause(stop)
    for _ in range(5):
        pause.after(integrity.RATE)
    assert sum(waits) > 4
    worker = ShardWorker(0, 1, [copied])
    thread = worker._integrity._thread  # noqa: SLF001
    assert thread is not None
    del worker
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()


@pytest.mark.usefixtures("soon")
def test_a_damaged_index_is_not_switched_to_and_not_started_with(config: ServeConfig, copied: Generation) -> None:
    roots = (str(Path(copied.index).parents[2]),)
    config = config.model_copy(update={"writes": config.writes.model_copy(update={"roots": roots})})

    async def work() -> None:
        writer = open_writer(config)
        worker = await follow(Handle(writer))
        before = (await status(writer)).current
        sound = read_generation(config.index, None, "none")
        path = next(path for path in files_of(copied) if path.name == "norms.npy")
        flip(path)
        with pytest.raises(RetrievalError, match=r"FAILED_PRECONDITION.*not switched.*norms.npy"):
            await writer.switch(switch_to(copied.index))
        assert (await status(writer)).current == before == sound.name
        flip(path)
        assert worker.generations
        writer.close()
        moved = open_writer(config.model_copy(update={"index": copied.index}))
        flip(path)
        with pytest.raises(RuntimeError, match=r"cannot open index.*norms.npy does not match its SHA-256.*restore"):
            await follow(Handle(moved))
        moved.close()

    run(work)
