"""A writer and followers in one process, for tests of either."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from lookalike.artifacts import Artifact
from lookalike.retrieval.plan import Plan
from lookalike.serve.generations.compaction import ROOT, find_embeddings, merge_embeddings
from lookalike.serve.generations.follower import Follower
from lookalike.serve.generations.generation import Generation, read_generation
from lookalike.serve.generations.write_record import WriteRecord
from lookalike.serve.generations.writer import Writer
from lookalike.serve.proto import retrieval_pb2 as pb
from lookalike.serve.search.router import Router
from lookalike.serve.search.workers import ShardWorker
from lookalike.serve.settings.config import ServeConfig
from lookalike.serve.wire.ask import Ask
from lookalike.serve.wire.errors import RetrievalError
from tests.serve.conftest import publish_index

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


def upsert(*ids: str, model: str, vector: np.ndarray = VECTOR) -> bytes:
    rows = [pb.Row(id=image_id, vector=vector.tobytes()) for image_id in ids]
    return pb.UpsertRequest(rows=rows, model_fingerprint=model).SerializeToString()


async def ids(worker: ShardWorker, name: str, k: int = 3) -> list[str]:
    """What a search in generation ``name`` finds."""
    ask = Ask(name, VECTOR[None], k, Plan.exact(64))
    deadline = asyncio.get_running_loop().time() + 10
    outcome = await Router([worker]).search(ask, deadline=deadline, allow_partial=False)
    return [outcome.answer.entries[row][0] for row in outcome.answer.hits.rows[0].tolist() if row >= 0]


def published(folder: str) -> set[str]:
    """Artifacts of compactions that are still there."""
    return {str(path.parent) for path in Path(folder, ROOT).glob("*/*/*/manifest.json")}


async def holds(worker: ShardWorker, name: str) -> bool:
    """Whether ``worker`` answers for generation ``name``."""
    try:
        await ids(worker, name)
    except RetrievalError as error:
        if "is not loaded here" not in str(error):
            raise
        return False
    return True


async def status(writer: Writer) -> pb.StatusResponse:
    return pb.StatusResponse.FromString(await writer.status())


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    """Return when ``condition`` is met; it fails after 4 s."""
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


def other_model(index: str) -> Generation:
    """The generation of ``index``, as if another model had made its vectors."""
    generation = read_generation(index, None, "none")
    encoder = generation.meta.encoder.model_copy(update={"fingerprint": "another"})
    return replace(generation, meta=generation.meta.model_copy(update={"encoder": encoder}))


async def compact_here(index: str, records: Sequence[WriteRecord], folder: str) -> str:
    """A compaction in this process, by the tests' own way to build an index."""
    base, root = Artifact.open(index, "index", check=False), f"{folder}/{ROOT}"
    merged = merge_embeddings(find_embeddings(base), records, root)
    rows = [row for part in merged.files("part-", ".parquet") for row in pq.read_table(part).to_pylist()]
    vectors = {row["image_id"]: np.array(row["vector"], np.float32) for row in rows}
    model = read_generation(index, None, "none").meta.model_fingerprint
    return publish_index(root, merged, vectors, model, fingerprint=f"{records[-1].number:020d}").uri
