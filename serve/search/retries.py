"""Calls made again: if a call fails because its replica, process or node is gone, Serve may take another replica.

A wrong request is not repeated, nor is a request that a full queue refused. A slow call is hedged (Dean and Barroso,
The Tail at Scale, CACM 2013): it is made a second time beside the first, and the first answer counts. A call that no
replica took is no answer while the other goes on.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from functools import lru_cache
from typing import Any

import grpc
from ray.exceptions import (
    LocalRayletDiedError,
    NodeDiedError,
    ObjectLostError,
    RayActorError,
    RpcError,
    WorkerCrashedError,
)
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.util.metrics import Counter

from lookalike.serve.settings.load import Retries
from lookalike.serve.wire.backoff import backoff_s
from lookalike.serve.wire.errors import CallEndedError, NotLoadedError

GONE = (
    RayActorError,
    WorkerCrashedError,
    NodeDiedError,
    LocalRayletDiedError,
    ObjectLostError,
    RpcError,
    ReplicaUnavailableError,
    DeploymentUnavailableError,
    NotLoadedError,
    CallEndedError,
)
"""Exceptions after which another replica may succeed."""

MOST_HEDGES = 10.0
"""Second calls that may be made at once, before their share of all calls limits them."""
NOT_TAKEN = 2
"""Rank of a call that no replica has taken; an answer is 0."""


def is_gone(error: BaseException) -> bool:
    """Whether a call failed because its process is gone or does not hold the generation."""
    if isinstance(error, grpc.RpcError):
        return bool(error.code() == grpc.StatusCode.UNAVAILABLE)
    return isinstance(error, GONE)


async def repeat(call: Callable[[], Awaitable[Any]], retries: Retries, who: str) -> Any:
    """Return the result of ``call``, made again while it fails with an error that ``is_gone``; cancel it to give up."""
    attempt = 1
    while True:
        try:
            return await call()
        except Exception as error:
            if attempt >= retries.max_attempts or not is_gone(error):
                raise
        _retries_total().inc(1, {"who": who})
        await asyncio.sleep(backoff_s(attempt, retries.pause_ms / 1000, retries.max_pause_ms / 1000))
        attempt += 1


class Hedges:
    """Makes slow calls twice, up to a share of all calls."""

    def __init__(self, retries: Retries) -> None:
        self._after_s = None if retries.hedge_ms is None or not retries.hedge_share else retries.hedge_ms / 1000
        self._share, self._left = retries.hedge_share, MOST_HEDGES

    async def fastest(self, call: Callable[[], Coroutine[Any, Any, Any]], who: str) -> Any:
        """Return the result of ``call``, or of a second ``call`` if the first is slow; the other is cancelled."""
        if self._after_s is None:
            return await call()
        self._left = min(MOST_HEDGES, self._left + self._share)
        calls = [asyncio.ensure_future(call())]
        try:
            done, _ = await asyncio.wait(calls, timeout=self._after_s)
            if not done and self._left >= 1:
                self._left -= 1
                _hedges_total().inc(1, {"who": who})
                calls.append(asyncio.ensure_future(call()))
            return (await _first_answered(calls)).result()
        finally:
            for task in calls:
                task.cancel()

    async def second(self, call: Callable[[], Coroutine[Any, Any, Any]], who: str, patience_s: float) -> Any:
        """Return the result of ``call``; if it takes ``patience_s`` longer than other slow calls, of a second one.

        The first is cancelled before: both never work at the same time.
        """
        self._left = min(MOST_HEDGES, self._left + self._share)
        if self._after_s is None or self._left < 1:
            return await call()
        try:
            async with asyncio.timeout(self._after_s + patience_s) as clock:
                return await call()
        except TimeoutError:
            if not clock.expired():
                raise
        self._left -= 1
        _hedges_total().inc(1, {"who": who})
        return await call()


async def _first_answered(calls: Sequence[asyncio.Future[Any]]) -> asyncio.Future[Any]:
    """The first call that a replica answered or refused; if none did, the last one to finish."""
    left = set(calls)
    while True:
        done, left = await asyncio.wait(left, return_when=asyncio.FIRST_COMPLETED)
        best = min(done, key=_rank)
        if _rank(best) < NOT_TAKEN or not left:
            return best


def _rank(call: asyncio.Future[Any]) -> int:
    if call.cancelled():
        return NOT_TAKEN
    if (error := call.exception()) is None:
        return 0
    return NOT_TAKEN if is_gone(error) or isinstance(error, BackPressureError) else 1


@lru_cache(1)
def _hedges_total() -> Counter:
    return Counter("lookalike_hedges_total", "Calls made a second time because the first was slow.", ("who",))


@lru_cache(1)
def _retries_total() -> Counter:
    return Counter("lookalike_retries_total", "Calls repeated because a process was gone.", ("who",))
