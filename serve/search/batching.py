"""Micro-batching: concurrent searches with the same generation, k, plan and filters share one call to a shard.

No query waits while a call may be made: while ``max_in_flight`` calls to a shard are out, queries that arrive gather,
and go together when one returns. Each caller keeps its own deadline and may leave; a call ends early only when all have
left. The searcher's answer to a query does not depend on the others in its batch, so its bits are those of a call of
its own.
"""

import asyncio
import contextvars
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple

import grpc

from lookalike.retrieval.ranking import Hits
from lookalike.serve.settings.load import Batching
from lookalike.serve.wire.answers import Answer, occurring_rows, unpack
from lookalike.serve.wire.errors import RetrievalError

Key = tuple[str, int, str, str]
"""Generation, k, plan and filters: what searches must have in common."""


class Asked(NamedTuple):
    """One caller's query and where its answer goes."""

    query: bytes
    answer: "asyncio.Future[Answer]"


class BatchedShard:
    """Shares ``search`` calls to one shard; it answers with an ``Answer`` instead of bytes."""

    def __init__(self, shard: Any, settings: Batching, ask: Callable[..., Awaitable[Any]]) -> None:
        self._shard, self._settings, self._ask = shard, settings, ask
        self._gathered: dict[Key, list[Asked]] = {}
        """What has not been sent, the longest waiting first."""
        self._sent: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None

    async def search(self, generation: str, query: bytes, k: int, plan: str, filters: str) -> Answer:
        """As ``ShardWorker.search`` of one query, float32 [1, dim]."""
        asked = Asked(query, asyncio.get_running_loop().create_future())
        self._gathered.setdefault((generation, k, plan, filters), []).append(asked)
        self._send()
        return await asked.answer

    def _send(self, *, all_of_them: bool = False) -> None:
        """Send what has gathered as far as calls may be out."""
        while self._gathered and (all_of_them or len(self._sent) < self._settings.max_in_flight):
            key = next(iter(self._gathered))
            alive = [asked for asked in self._gathered.pop(key) if not asked.answer.done()]
            batch, rest = alive[: self._settings.max_batch], alive[self._settings.max_batch :]
            if rest:
                self._gathered[key] = rest  # behind the others
            if batch:
                self._call(key, batch)
        if self._gathered and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._settings.max_wait_ms / 1000, self._overdue)

    def _overdue(self) -> None:
        """No call has returned for long, as when a node is gone: the queries may find another replica."""
        self._timer = None
        self._send(all_of_them=True)

    def _call(self, key: Key, batch: Sequence[Asked]) -> None:
        # in a context of its own: Serve ends the calls that a request's context made when its caller leaves
        task = asyncio.get_running_loop().create_task(self._answer(key, batch), context=contextvars.Context())
        self._sent.add(task)

        def left(_: Any) -> None:
            if all(asked.answer.done() for asked in batch):
                task.cancel()

        def ended(_: Any) -> None:
            self._sent.discard(task)
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            self._send()

        for asked in batch:
            asked.answer.add_done_callback(left)
        task.add_done_callback(ended)

    async def _answer(self, key: Key, batch: Sequence[Asked]) -> None:
        generation, k, plan, filters = key
        queries = b"".join(asked.query for asked in batch)
        try:
            packed = await self._ask(self._shard, "search", generation, queries, k, plan, filters)
            answers = split(unpack(packed, len(batch)))
        except asyncio.CancelledError:
            for asked in batch:
                if not asked.answer.done():
                    message = "the call that this search shared was ended; try again"
                    asked.answer.set_exception(RetrievalError(grpc.StatusCode.UNAVAILABLE, message))
            raise
        except Exception as error:  # noqa: BLE001  # each caller is told
            for asked in batch:
                if not asked.answer.done():
                    asked.answer.set_exception(error)
            return
        for asked, answer in zip(batch, answers, strict=True):
            if not asked.answer.done():
                asked.answer.set_result(answer)


def split(answer: Answer) -> list[Answer]:
    """The answer to each query, with the entries of its own rows."""
    hits = [
        Hits(answer.hits.rows[place : place + 1], answer.hits.scores[place : place + 1])
        for place in range(len(answer.hits.rows))
    ]
    return [
        answer._replace(hits=one, entries={row: answer.entries[row] for row in occurring_rows(one).tolist()})
        for one in hits
    ]
