"""Those who use the service in the soak: they search and write, and keep what was answered and acknowledged."""

import asyncio
import random
import time
from collections import Counter
from dataclasses import dataclass, field

import grpc
import numpy as np

from lookalike.serve.client import AsyncClient, StoredRow
from lookalike.serve.wire.errors import RetrievalError
from tests.serve.scaling import until

DIM, K = 64, 5
SURGE = 16
"""Callers that come for a while."""
SCALED_WITHIN_S = 240.0
PROMISED = {"UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED"}
STORED = ["front", "side", "back"]
"""Views of the rows that the indexes are built with; written rows have another, so that each can be searched alone."""


@dataclass
class Seen:
    """What the callers saw."""

    counts: Counter[str] = field(default_factory=Counter)
    replies: list[tuple[str, int, list[str]]] = field(default_factory=list)
    """(generation, number of the query, ids)."""
    errors: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    late_ms: list[float] = field(default_factory=list)
    ingresses: list[int] = field(default_factory=list)


async def search(address: str, queries: np.ndarray, seen: Seen, stop: asyncio.Event, seed: int) -> None:
    """Search for stored rows until told to stop."""
    rng = random.Random(seed)
    async with AsyncClient(address, timeout_s=10) as client:
        while not stop.is_set():
            number = rng.randrange(len(queries))
            try:
                result = await client.search(vector=queries[number], k=K, where={"view": STORED})
            except RetrievalError as error:
                seen.errors[error.code.name] += 1
                if error.code.name not in PROMISED:
                    seen.wrong.append(f"search: {error}"[:300])
                continue
            seen.counts["searches"] += 1
            seen.replies.append((result.info.generation, number, result.ids))


async def surge(address: str, queries: np.ndarray, seen: Seen, pause_s: float, seed: int) -> None:
    """Let many more search, and count the ingresses before they come, while they search and after they have left."""
    seen.ingresses.append(await until(1, SCALED_WITHIN_S))
    await asyncio.sleep(pause_s)
    stop = asyncio.Event()
    callers = [asyncio.ensure_future(search(address, queries, seen, stop, seed + number)) for number in range(SURGE)]
    seen.ingresses.append(await until(3, SCALED_WITHIN_S))
    await asyncio.sleep(pause_s)
    stop.set()
    await asyncio.gather(*callers)
    seen.ingresses.append(await until(1, SCALED_WITHIN_S))


class Book:
    """What was written and acknowledged: id -> vector, None for a deleted one."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.kept: dict[str, np.ndarray | None] = {}
        self.unsure: set[str] = set()
        """Ids whose last write failed: it may be stored or not."""


async def write(address: str, book: Book, seen: Seen, stop: asyncio.Event) -> None:
    """Upsert, overwrite and delete, one write at a time, and look whether it can be found."""
    async with AsyncClient(address, timeout_s=15) as client:
        while not stop.is_set():
            image_id = f"new-{int(book.rng.integers(60)):03d}"
            vector = None if book.rng.random() < 0.2 else book.rng.normal(size=DIM).astype(np.float32)
            try:
                if vector is None:
                    await client.delete([image_id])
                else:
                    await client.upsert([StoredRow(image_id, vector, {"view": "written"})])
            except RetrievalError as error:
                seen.errors[f"write {error.code.name}"] += 1
                book.unsure.add(image_id)
                if error.code.name not in PROMISED:
                    seen.wrong.append(f"write: {error}"[:300])
                await asyncio.sleep(0.1)
                continue
            acknowledged = time.monotonic()
            book.kept[image_id] = vector
            book.unsure.discard(image_id)
            seen.counts["writes"] += 1
            if vector is not None and not await find(client, vector, image_id, seen):
                seen.wrong.append(f"{image_id} is not found")
            seen.late_ms.append((time.monotonic() - acknowledged) * 1000)
            await asyncio.sleep(0.02)


async def find(client: AsyncClient, vector: np.ndarray, image_id: str, seen: Seen, within_s: float = 20.0) -> bool:
    """Whether a written row is found soon; replicas that start anew take their time."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            result = await client.search(vector=vector, k=1, where={"view": ["written"]})
            if result.ids == [image_id]:
                return True
        except RetrievalError as error:
            seen.errors[f"find {error.code.name}"] += 1
        await asyncio.sleep(0.01)
    return False


async def check_written(address: str, book: Book, wrong: list[str]) -> int:
    """Compare what is stored with what was acknowledged; how many rows that is."""
    checked = 0
    async with AsyncClient(address, timeout_s=30) as client:
        for image_id, vector in book.kept.items():
            if image_id in book.unsure:
                continue
            checked += 1
            try:
                result = await client.search(image_id=image_id, k=1, where={"view": ["written"]})
                unit = None if vector is None else vector / np.linalg.norm(vector)
                again_ = None if unit is None else await client.search(vector=unit, k=1, where={"view": ["written"]})
                if again_ is None or result.ids != [image_id] or again_.hits[0].score < 0.9999:
                    wrong.append(f"after the restart {image_id} is not what was acknowledged: {result.ids}")
            except RetrievalError as error:
                if error.code != grpc.StatusCode.NOT_FOUND or vector is not None:
                    wrong.append(f"after the restart {image_id}: {error}"[:200])
    return checked
