"""Asking again: a call that failed because its replica, process or node is gone is repeated, and Serve takes another.

A wrong request is not repeated, nor is one that a full queue refused.
"""

import asyncio
from collections.abc import Awaitable, Callable
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
from ray.serve.exceptions import DeploymentUnavailableError, ReplicaUnavailableError
from ray.util.metrics import Counter

from lookalike.serve.errors import NotLoadedError
from lookalike.serve.tuning import Retries

GONE = (RayActorError, WorkerCrashedError, NodeDiedError, LocalRayletDiedError, ObjectLostError, RpcError,
        ReplicaUnavailableError, DeploymentUnavailableError, NotLoadedError)  # fmt: skip
"""What a call fails with that another replica may answer."""


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


@lru_cache(1)
def _counter() -> Counter:
    return Counter("lookalike_retries_total", "Calls repeated because a process was gone.", ("who",))
