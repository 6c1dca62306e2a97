"""The callers of the soak: they search and write, and record what was answered and acknowledged."""

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
"""Further callers that search for a while."""
SCALED_WITHIN_S = 240.0
PROMISED = {"UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED"}
STORED = ["front", "side", "back"]
"""Views of the rows in the indexes; written rows have another view, so that each kind can be searched alone."""


@dataclass
class SoakOutcome:
    """What the callers recorded."""

    counts: Counter[str] = field(default_factory=Counter)
    replies: list[tuple[str, int, list[str]]] = field(default_factory=list)
    """(generation, number of the query, ids)."""
    errors: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    late_ms: list[float] = field(default_factory=list)
    ingresses: list[int] = field(default_factory=list)


async def search(address: str, queries: np.ndarray, outcome: SoakOutcome, stop: asyncio.Event, seed: int) -> None:
    """Search for stored rows until told to stop."""
    rng = random.Random(seed)
    async with AsyncClient(address, timeout_s=10) as client:
        while not stop.is_set():
            number = rng.randrange(len(queries))
            try:
                result = await client.search(vector=queries[number], k=K, where={"view": STORED})
            except RetrievalError as error:
                outcome.errors[error.code.name] += 1
                if error.code.name not in PROMISED:
                    outcome.wrong.append(f"search: {error}"[:300])
                continue
            outcome.counts["searches"] += 1
            outcome.replies.append((result.info.generation, number, result.ids))


async def surge(address: str, queries: np.ndarray, outcome: SoakOutcome, pause_s: float, seed: int) -> None:
    """Let ``SURGE`` more callers search; count the ingresses before, meanwhile and afterwards."""
    outcome.ingresses.append(await until(1, SCALED_WITHIN_S))
    await asyncio.sleep(pause_s)
    stop = asyncio.Event()
    callers = [asyncio.ensure_future(search(address, queries, outcome, stop, seed + number)) for number in range(SURGE)]
    outcome.ingresses.append(await until(3, SCALED_WITHIN_S))
    await asyncio.sleep(pause_s)
    stop.set()
    await asyncio.gather(*callers)
    outcome.ingresses.append(await until(1, SCALED_WITHIN_S))


class Book:
    """The writes that were acknowledged."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.rows: dict[str, np.ndarray | None] = {}
        """Id -> vector, None for a deleted row."""
        self.unsure: set[str] = set()
        """Ids whose last write failed, so that it may be stored or not."""


async def write(address: str, book: Book, outcome: SoakOutcome, stop: asyncio.Event) -> None:
    """Upsert, overwrite and delete, one write at a time, and search for each written row."""
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
                outcome.errors[f"write {error.code.name}"] += 1
                book.unsure.add(image_id)
                if error.code.name not in PROMISED:
                    outcome.wrong.append(f"write: {error}"[:300])
                await asyncio.sleep(0.1)
                continue
            acknowledged = time.monotonic()
            book.rows[image_id] = vector
            book.unsure.discard(image_id)
            outcome.counts["writes"] += 1
            if vector is not None and not await find(client, vector, image_id, outcome):
                outcome.wrong.append(f"{image_id} is not found")
            outcome.late_ms.append((time.monotonic() - acknowledged) * 1000)
            await asyncio.sleep(0.02)


async def find(
    client: AsyncClient, vector: np.ndarray, image_id: str, outcome: SoakOutcome, within_s: float = 20.0
) -> bool:
    """Whether a written row is found within ``within_s``; replicas that start anew take their time."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            result = await client.search(vector=vector, k=1, where={"view": ["written"]})
            if result.ids == [image_id]:
                return True
        except RetrievalError as error:
            outcome.errors[f"find {error.code.name}"] += 1
        await asyncio.sleep(0.01)
    return False


async def check_written(address: str, book: Book, wrong: list[str]) -> int:
    """Compare what is stored with what was acknowledged; return the number of rows."""
    checked = 0
    async with AsyncClient(address, timeout_s=30) as client:
        for image_id, vector in book.rows.items():
            if image_id in book.unsure:
                continue
            checked += 1
            try:
                result = await client.search(image_id=image_id, k=1, where={"view": ["written"]})
                unit = None if vector is None else vector / np.linalg.norm(vector)
                nearest = None if unit is None else await client.search(vector=unit, k=1, where={"view": ["written"]})
                if nearest is None or result.ids != [image_id] or nearest.hits[0].score < 0.9999:
                    wrong.append(f"after the restart {image_id} is not what was acknowledged: {result.ids}")
            except RetrievalError as error:
                if error.code != grpc.StatusCode.NOT_FOUND or vector is not None:
                    wrong.append(f"after the restart {image_id}: {error}"[:200])
    return checked
