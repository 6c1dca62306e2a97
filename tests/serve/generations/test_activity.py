"""What a writer is busy with: seen in its status, waited for no longer than asked, named by who gives up."""

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING

import pytest

from lookalike.serve.generations import writer as module
from lookalike.serve.generations.write_record import WriteRecord
from lookalike.serve.settings.config import ServeConfig
from lookalike.serve.wire.errors import RetrievalError
from tests.serve.generations.following import Handle, compact_here, follow, open_writer, run, status, switch_to, upsert

if TYPE_CHECKING:
    from tests.serve.conftest import World

pytestmark = pytest.mark.usefixtures("soon")


def test_a_switch_behind_a_compaction_is_seen_to_wait_and_gives_up_in_time(
    config: ServeConfig, world: "World", indexes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def build(index: str, records: Sequence[WriteRecord], folder: str) -> str:
        begun.set()
        await go_on.wait()
        return await compact_here(index, records, folder)

    monkeypatch.setattr(module, "compact_in_task", build)

    async def work() -> None:
        writer = open_writer(config)
        await follow(Handle(writer))
        await writer.upsert(upsert("new-000", model=world.encoder.fingerprint))
        assert not (await status(writer)).activities
        compaction = asyncio.create_task(writer.compact(0))
        await begun.wait()
        words = r"DEADLINE_EXCEEDED: no turn for the switch in 1 s, nothing has changed.*compaction \(\d+ s: builds"
        with pytest.raises(RetrievalError, match=words):
            await writer.switch(switch_to(indexes[0], timeout_s=1))
        queued = asyncio.create_task(writer.switch(switch_to(indexes[0])))
        await asyncio.sleep(0)
        first, second = (await status(writer)).activities
        assert (first.kind, first.step) == ("compaction", "builds an index with the writes up to 1")
        assert (second.kind, second.step) == ("switch", "waits for its turn")
        assert first.seconds >= second.seconds >= 0
        assert (await status(writer)).pending_rows == 1
        go_on.set()
        await asyncio.gather(compaction, queued)
        assert not (await status(writer)).activities
        writer.close()

    run(work)


def test_why_a_compaction_that_began_by_itself_failed_is_told_until_one_succeeds(
    config: ServeConfig, world: "World", monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(index: str, records: Sequence[WriteRecord], folder: str) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "compact_in_task", fail)
    writes = config.writes.model_copy(update={"compact_rows": 1})

    async def work() -> None:
        writer = open_writer(config.model_copy(update={"writes": writes}))
        await follow(Handle(writer))
        await writer.upsert(upsert("new-000", model=world.encoder.fingerprint))
        while not (told := (await status(writer)).compaction_failure):
            await asyncio.sleep(0.01)
        assert "No space left" in told
        monkeypatch.setattr(module, "compact_in_task", compact_here)
        await writer.compact(0)
        assert not (await status(writer)).compaction_failure
        writer.close()

    run(work)
