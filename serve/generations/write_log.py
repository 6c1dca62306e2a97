"""The writes of a service: on the disk, and in memory as far as a held generation lacks them.

Writes that arrive during one sync are stored with the next, so many writers cost little more than one. One thread uses
the database.
"""

import asyncio
import bisect
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import grpc

from lookalike.serve.generations.database import Database, UncertainError
from lookalike.serve.generations.state import State
from lookalike.serve.generations.write_record import WriteKind, WriteRecord
from lookalike.serve.wire.errors import RetrievalError

NEWS_BYTES = 1 << 20
"""Approximate size of the writes in one answer to a follower: calls between replicas take 4 MiB at most."""

DIGESTS_KEPT = 64


class WaitingWrites(NamedTuple):
    """The writes of one call, and what its caller waits for: the number of the last."""

    kind: int
    contents: Sequence[bytes]
    done: asyncio.Future[int]


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
        self._digests: dict[int, str] = {}
        """Those that were asked for."""
        self._waiting: list[WaitingWrites] = []
        self._begun: set[asyncio.Future[int]] = set()
        """Writes that are being stored, or wait for it."""
        self._committing: asyncio.Task[None] | None = None

    @property
    def first(self) -> int:
        """Number of the oldest write that is kept."""
        return self._database.first

    async def store(self, kind: int, *contents: bytes) -> int:
        """Store one or more writes together; return the number of the last once they are on the disk.

        UNAVAILABLE if they could not be stored; the message says whether some of it may have been kept.
        """
        done: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._begun.add(done)
        done.add_done_callback(self._begun.discard)
        self._waiting.append(WaitingWrites(kind, contents, done))
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
            error = await self._append(batch)
            deletes = [call for call in batch if call.kind == WriteKind.DELETE]
            if error is not None and len(deletes) < len(batch):  # a full disk has room left for these alone
                _refuse([call for call in batch if call.kind != WriteKind.DELETE], error)
                batch = deletes
                error = await self._append(deletes) if deletes else None
            if error is not None:
                _refuse(batch, error)

    async def _append(self, batch: Sequence[WaitingWrites]) -> Exception | None:
        """Store the writes of all calls in one transaction and tell the callers, or return why they are not stored."""
        writes = [(call.kind, content) for call in batch for content in call.contents]
        first = self.last + 1
        try:
            await self._run(self._database.append, writes)
        except Exception as error:  # noqa: BLE001  # whatever it is, the callers who wait are told
            return error
        records = [WriteRecord(number, kind, content) for number, (kind, content) in enumerate(writes, first)]
        self._records += records
        self._rows += [record.num_rows for record in records]
        self.last = records[-1].number
        number = first - 1
        for call in batch:
            number += len(call.contents)
            if not call.done.done():
                call.done.set_result(number)
        self._stored()
        return None

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

    def digest_at(self, number: int) -> str:
        """Digest of that write as hexadecimal digits; empty if it is not in memory."""
        if number not in self._digests:
            place = self._place(number)
            if not place or self._records[place - 1].number != number:
                return ""
            while len(self._digests) >= DIGESTS_KEPT:
                del self._digests[next(iter(self._digests))]
            self._digests[number] = self._records[place - 1].digest.hex()
        return self._digests[number]

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


def _refuse(calls: Sequence[WaitingWrites], error: Exception) -> None:
    kept = "nothing of it was kept"
    if isinstance(error, UncertainError):
        kept = "some of it may be kept if the service ends before the disk works again: write again, or delete"
    reason = f"the write could not be stored ({error}); {kept}"
    for call in calls:
        if not call.done.done():
            call.done.set_exception(RetrievalError(grpc.StatusCode.UNAVAILABLE, reason))
