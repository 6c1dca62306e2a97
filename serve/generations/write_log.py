"""The writes of a service: on the disk, and in memory as far as a held generation lacks them.

Writes that arrive during one sync are stored with the next, so many writers cost little more than one. One thread uses
the database.
"""

import asyncio
import bisect
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc

from lookalike.serve.generations.database import Database
from lookalike.serve.generations.state import State
from lookalike.serve.generations.write_record import WriteRecord
from lookalike.serve.wire.errors import RetrievalError

NEWS_BYTES = 1 << 20
"""Approximate size of the writes in one answer to a follower: calls between replicas take 4 MiB at most."""


class WriteLog:
    """The writes and the state in ``database``; calls ``stored`` after writes are stored."""

    def __init__(self, database: Database, after: int, stored: Callable[[], Any]) -> None:
        self._database, self._stored = database, stored
        self._thread = ThreadPoolExecutor(1, "writes")
        self._records = database.read(after)
        self.last = database.last
        """Number of the last write that is stored and in memory; the database is ahead of it until its thread ends."""
        self.since = after
        """The writes after this one are in memory."""
        self._rows = [record.num_rows for record in self._records]
        self._waiting: list[tuple[int, bytes, asyncio.Future[int]]] = []
        self._begun: set[asyncio.Future[int]] = set()
        """Writes that are being stored, or wait for it."""
        self._committing: asyncio.Task[None] | None = None

    @property
    def first(self) -> int:
        """Number of the oldest write that is kept."""
        return self._database.first

    async def store(self, kind: int, content: bytes) -> int:
        """Return the write's number once it is on the disk. UNAVAILABLE if it could not be stored: nothing of it is."""
        done: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._begun.add(done)
        done.add_done_callback(self._begun.discard)
        self._waiting.append((kind, content, done))
        if self._committing is None or self._committing.done():
            self._committing = asyncio.ensure_future(self._commit())
        return await asyncio.shield(done)

    async def settle(self) -> None:
        """Return when the writes that have begun are stored, or have failed."""
        if self._begun:
            await asyncio.wait(set(self._begun))

    async def _commit(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting, []
            first = self.last + 1
            try:
                await self._run(self._database.append, [(kind, content) for kind, content, _ in batch])
            except Exception as error:  # noqa: BLE001  # whatever it is, the callers who wait are told
                reason = f"the write could not be stored ({error}); nothing of it was kept"
                for _, _, done in batch:
                    done.set_exception(RetrievalError(grpc.StatusCode.UNAVAILABLE, reason))
                continue
            records = [WriteRecord(number, kind, content) for number, (kind, content, _) in enumerate(batch, first)]
            self._records += records
            self._rows += [record.num_rows for record in records]
            self.last = records[-1].number
            for record, (_, _, done) in zip(records, batch, strict=True):
                if not done.done():
                    done.set_result(record.number)
            self._stored()

    async def _run(self, function: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *args)

    def after(self, number: int, through: int | None = None) -> list[WriteRecord]:
        """The writes in memory with larger numbers, in order, up to ``through``."""
        end = len(self._records) if through is None else self._place(through)
        return self._records[self._place(number) : end]

    def num_rows_after(self, number: int) -> int:
        """Rows that the writes after that number store or delete."""
        return sum(self._rows[self._place(number) :])

    def news_after(self, number: int) -> list[WriteRecord]:
        """The first writes after that number, up to the size of one answer to a follower."""
        records, size = [], 0
        for record in self._records[self._place(number) :]:
            records.append(record)
            size += len(record.content)
            if size > NEWS_BYTES:
                break
        return records

    def _place(self, number: int) -> int:
        return bisect.bisect_right(self._records, number, key=lambda record: record.number)

    async def remember(self, after: int) -> None:
        """Load the writes after that number into memory."""
        if after < self.since:
            records = await self._run(self._database.read, after)
            older = [record for record in records if record.number <= self.since]
            self._records[:0], self._rows[:0] = older, [record.num_rows for record in older]
            self.since = after

    async def save_state(self, state: State) -> None:
        """Store ``state``, and drop the writes that every generation it holds includes."""
        await self._run(self._database.save_state, state)
        self.since = max(self.since, state.includes_writes)
        place = self._place(state.includes_writes)
        del self._records[:place], self._rows[:place]

    async def backup(self, target: str) -> int:
        """:meth:`Database.backup`, between two transactions."""
        return int(await self._run(self._database.backup, target))

    def close(self) -> None:
        """Let others write; what is being stored ends first."""
        self._thread.shutdown()
        self._database.close()
