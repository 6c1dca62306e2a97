"""Micro-batching: concurrent searches with the same generation, k, plan and filters share one call to a shard.

While fewer than ``max_in_flight`` calls to a shard are under way, a query is sent at once. Otherwise queries gather and
go together when a call returns. Each caller keeps its deadline and may leave; a call ends early only when all its
callers have left. The answer to a query does not depend on the others in its batch, so its bits are the same as alone.
"""

import asyncio
import contextvars
from collections.abc import Awaitable, Callable, Hashable, Sequence
from dataclasses import replace
from typing import NamedTuple

import grpc
import numpy as np

from lookalike.retrieval.ranking import Hits
from lookalike.serve.settings.load import Batching
from lookalike.serve.wire.answers import Answer, Packed, occurring_rows, unpack
from lookalike.serve.wire.ask import Ask
from lookalike.serve.wire.errors import RetrievalError


class PendingQuery(NamedTuple):
    """One caller's query and the future of its answer."""

    ask: Ask
    answer: "asyncio.Future[Answer]"


class BatchedShard:
    """Shares calls to one shard; ``search_shard`` makes one."""

    def __init__(self, search_shard: Callable[[Ask], Awaitable[Packed | Answer]], settings: Batching) -> None:
        self._search_shard, self._settings = search_shard, settings
        self._gathered: dict[Hashable, list[PendingQuery]] = {}
        """Kind of ask -> its queries not yet sent; the kind that has waited longest comes first."""
        self._sent: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None

    async def search(self, ask: Ask) -> Answer:
        """The shard's answer to the one query of ``ask``."""
        pending = PendingQuery(ask, asyncio.get_running_loop().create_future())
        self._gathered.setdefault(ask.kind, []).append(pending)
        self._send()
        return await pending.answer

    def _send(self, *, beyond_limit: bool = False) -> None:
        """Send gathered queries as long as another call may be made."""
        while self._gathered and (beyond_limit or len(self._sent) < self._settings.max_in_flight):
            kind = next(iter(self._gathered))
            alive = [pending for pending in self._gathered.pop(kind) if not pending.answer.done()]
            batch, rest = alive[: self._settings.max_batch], alive[self._settings.max_batch :]
            if rest:
                self._gathered[kind] = rest  # behind the others
            if batch:
                self._call(batch)
        if self._gathered and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._settings.max_wait_ms / 1000, self._overdue)

    def _overdue(self) -> None:
        """Send all: no call has returned for long, as when a node is gone, and another replica may answer these."""
        self._timer = None
        self._send(beyond_limit=True)

    def _call(self, batch: Sequence[PendingQuery]) -> None:
        # in a context of its own: when a caller leaves, Serve ends the calls made in its request's context
        task = asyncio.get_running_loop().create_task(self._answer(batch), context=contextvars.Context())
        self._sent.add(task)

        def end_unless_awaited(_: object) -> None:
            if all(pending.answer.done() for pending in batch):
                task.cancel()

        def send_next(_: object) -> None:
            self._sent.discard(task)
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            self._send()

        for pending in batch:
            pending.answer.add_done_callback(end_unless_awaited)
        task.add_done_callback(send_next)

    async def _answer(self, batch: Sequence[PendingQuery]) -> None:
        ask = replace(batch[0].ask, queries=np.concatenate([pending.ask.queries for pending in batch]))
        try:
            answers = split(unpack(await self._search_shard(ask), len(batch)))
        except asyncio.CancelledError:
            message = "the call that this search shared was ended; try again"
            _fail(batch, RetrievalError(grpc.StatusCode.UNAVAILABLE, message))
            raise
        except Exception as error:  # noqa: BLE001  # each caller is told
            _fail(batch, error)
            return
        for pending, answer in zip(batch, answers, strict=True):
            if not pending.answer.done():
                pending.answer.set_result(answer)


def _fail(batch: Sequence[PendingQuery], error: Exception) -> None:
    for pending in batch:
        if not pending.answer.done():
            pending.answer.set_exception(error)


def split(answer: Answer) -> list[Answer]:
    """The answer to each query, with the entries of its own rows."""
    rows, scores = answer.hits
    hits = [Hits(rows[place : place + 1], scores[place : place + 1]) for place in range(len(rows))]
    return [
        answer._replace(hits=own, entries={row: answer.entries[row] for row in occurring_rows(own).tolist()})
        for own in hits
    ]
