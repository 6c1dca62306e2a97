"""A writer and followers in one process, for tests of either."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from lookalike.serve.generations.compaction import ROOT
from lookalike.serve.generations.follower import Follower
from lookalike.serve.generations.generation import Generation, read_generation
from lookalike.serve.generations.writer import Writer
from lookalike.serve.proto import retrieval_pb2 as pb
from lookalike.serve.search.router import Router
from lookalike.serve.search.workers import ShardWorker
from lookalike.serve.settings.config import ServeConfig

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


def broken(generation: Generation) -> Any:
    raise MemoryError("no memory")


def switch_to(index: str, **settings: Any) -> bytes:
    return pb.SwitchRequest(index=index, encoder="none", **settings).SerializeToString()


def other_model(world: "World") -> Generation:
    from dataclasses import replace

    generation = read_generation(world.index, None, "none")
    encoder = generation.meta.encoder.model_copy(update={"fingerprint": "another"})
    return replace(generation, meta=generation.meta.model_copy(update={"encoder": encoder}))
