"""The writes of a service: on the disk, and in memory as far as some generation that is held lacks them.

Writes that come during one sync are stored with the next, so many writers cost little more than one.
"""

import asyncio
import bisect
from collections.abc import Callable
from typing import Any

import grpc

from lookalike.errors import UsageError
from lookalike.serve.generations.journal import Journal, Record
from lookalike.serve.proto import retrieval_pb2 as pb
from lookalike.serve.wire.errors import RetrievalError

NEWS_BYTES = 1 << 20
"""Writes that one answer to a follower holds, about: calls between replicas take 4 MiB at most."""


class WriteLog:
    """The log in ``folder``; ``stored`` is called after writes have been."""

    def __init__(self, journal: Journal, after: int, stored: Callable[[], Any]) -> None:
        if after + 1 < journal.first:
            raise UsageError(
                f"{journal.folder} has the writes from {journal.first} on, the index needs those from "
                f"{after + 1} on; say which it holds, or restore the folder from a copy"
            )
        self.journal, self._stored = journal, stored
        self.last = journal.last
        """Number of the last write that is stored and in memory: the journal is ahead of it while its thread ends."""
        self.since = after
        """The writes after this one are in memory."""
        self._records = list(journal.read(after))
        self._rows = [count_rows(record) for record in self._records]
        self._waiting: list[tuple[int, bytes, asyncio.Future[int]]] = []
        self._begun: set[asyncio.Future[int]] = set()
        """Writes that are being stored, or wait for it."""
        self._committing: asyncio.Task[None] | None = None

    async def store(self, kind: int, content: bytes) -> int:
        """The write's number, once it is on the disk. UNAVAILABLE when it could not be stored; nothing of it is."""
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
                await asyncio.to_thread(self.journal.append, [(kind, content) for kind, content, _ in batch])
            except Exception as error:  # noqa: BLE001  # whatever it is, those who wait are told
                reason = f"the write could not be stored ({error}); nothing of it was kept"
                for _, _, done in batch:
                    done.set_exception(RetrievalError(grpc.StatusCode.UNAVAILABLE, reason))
                continue
            records = [Record(first + place, kind, content) for place, (kind, content, _) in enumerate(batch)]
            self._records += records
            self._rows += map(count_rows, records)
            self.last = records[-1].number
            for record, (_, _, done) in zip(records, batch, strict=True):
                if not done.done():
                    done.set_result(record.number)
            self._stored()

    def after(self, number: int, through: int | None = None) -> list[Record]:
        """The writes in memory with larger numbers, in order, up to ``through``."""
        end = len(self._records) if through is None else self._place(through)
        return self._records[self._place(number) : end]

    def num_rows_after(self, number: int) -> int:
        """Rows that those writes store or delete."""
        return sum(self._rows[self._place(number) :])

    def frames_after(self, number: int) -> list[bytes]:
        """Those writes as they travel, as many as one answer holds."""
        frames, size = [], 0
        for record in self._records[self._place(number) :]:
            frames.append(record.to_bytes())
            size += len(frames[-1])
            if size > NEWS_BYTES:
                break
        return frames

    def _place(self, number: int) -> int:
        return bisect.bisect_right(self._records, number, key=lambda record: record.number)

    async def remember(self, after: int) -> None:
        """Have the writes after that one in memory."""
        if after < self.since:
            read = await asyncio.to_thread(lambda: list(self.journal.read(after)))
            older = [record for record in read if record.number <= self.since]
            self._records[:0], self._rows[:0] = older, [count_rows(record) for record in older]
            self.since = after

    def forget(self, through: int) -> None:
        """Drop the writes up to that one, which no generation lacks."""
        self.since = max(self.since, through)
        place = self._place(through)
        del self._records[:place], self._rows[:place]
        self.journal.forget(through)


def count_rows(record: Record) -> int:
    """Rows that a write stores or deletes."""
    message = record.message
    return len(message.rows) if isinstance(message, pb.UpsertRequest) else len(message.ids)


def find_foreign(records: list[Record], model: str) -> int:
    """How many rows are written with vectors of another model than ``model``."""
    messages = (record.message for record in records)
    return sum(
        len(message.rows)
        for message in messages
        if isinstance(message, pb.UpsertRequest) and message.model_fingerprint != model
    )
