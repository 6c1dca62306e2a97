"""Asking again: a call that failed because its replica, process or node is gone is repeated, and Serve takes another.

A wrong request is not repeated, nor is one that a full queue refused. A call that takes too long is hedged (Dean and
Barroso, The Tail at Scale, CACM 2013): made a second time beside the first, and whichever ends first counts; one that
no replica took says nothing while the other goes on.
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
from lookalike.serve.wire.errors import NotLoadedError

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
)
"""What a call fails with that another replica may answer."""

MOST_HEDGES = 10.0
"""Second calls that may be made at once."""
NOT_TAKEN = 2
"""Rank of a call that no replica has taken; an answer is 0."""


def is_gone(error: BaseException) -> bool:
    """Whether a call failed because its process is gone, or does not hold the generation."""
    if isinstance(error, grpc.RpcError):
        return bool(error.code() == grpc.StatusCode.UNAVAILABLE)
    return isinstance(error, GONE)


async def repeat(call: Callable[[], Awaitable[Any]], retries: Retries, who: str) -> Any:
    """What ``call`` returns, made anew while it fails for ``is_gone``; whoever waits gives up by cancelling."""
    attempt = 1
    while True:
        try:
            return await call()
        except Exception as error:
            if attempt >= retries.max_attempts or not is_gone(error):
                raise
        _counter().inc(1, {"who": who})
        await asyncio.sleep(retries.pause_s(attempt))
        attempt += 1


class Hedges:
    """Makes slow calls twice, as far as their share of all calls allows."""

    def __init__(self, retries: Retries) -> None:
        self._after_s = None if retries.hedge_ms is None or not retries.hedge_share else retries.hedge_ms / 1000
        self._share, self._left = retries.hedge_share, MOST_HEDGES

    async def fastest(self, call: Callable[[], Coroutine[Any, Any, Any]], who: str) -> Any:
        """What ``call`` returns, or a second one of it where the first is slow; the other is cancelled."""
        if self._after_s is None:
            return await call()
        self._left = min(MOST_HEDGES, self._left + self._share)
        calls = [asyncio.ensure_future(call())]
        try:
            done, _ = await asyncio.wait(calls, timeout=self._after_s)
            if not done and self._left >= 1:
                self._left -= 1
                _hedged().inc(1, {"who": who})
                calls.append(asyncio.ensure_future(call()))
            return (await _first_told(calls)).result()
        finally:
            for one in calls:
                one.cancel()


async def _first_told(calls: Sequence[asyncio.Future[Any]]) -> asyncio.Future[Any]:
    """The first of ``calls`` that some replica has answered, or refused; the last to end where none has."""
    left = set(calls)
    while True:
        done, left = await asyncio.wait(left, return_when=asyncio.FIRST_COMPLETED)
        best = min(done, key=_rank)
        if _rank(best) < NOT_TAKEN or not left:
            return best


def _rank(call: asyncio.Future[Any]) -> int:
    if call.cancelled() or (error := call.exception()) is None:
        return 0
    return NOT_TAKEN if is_gone(error) or isinstance(error, BackPressureError) else 1


@lru_cache(1)
def _hedged() -> Counter:
    return Counter("lookalike_hedges_total", "Calls made a second time because the first was slow.", ("who",))


@lru_cache(1)
def _counter() -> Counter:
    return Counter("lookalike_retries_total", "Calls repeated because a process was gone.", ("who",))
