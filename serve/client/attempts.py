"""When a client asks again, within the deadline of the call: after the replica that worked on it died, and after the
service said ``retry after N ms``. Searches are reads and a write may be made twice, so all may be repeated.

Calls that found no server are repeated below this, by the gRPC channel.
"""

import random
import re
import time

import grpc

from lookalike.serve.wire.backoff import backoff_s
from lookalike.serve.wire.errors import RetrievalError

MAX_ATTEMPTS = 5
"""Calls made at most, the first included."""
PAUSE_S = 0.05
"""Pause after the first one that died, in seconds; doubles each time."""
_DEAD = re.compile(
    r"actor (died|is dead|is unavailable)|ActorDiedError|ActorUnavailableError|node (died|has died)|"
    r"worker (died|crashed)",
    re.IGNORECASE,
)
_RETRY_AFTER = re.compile(r"retry after (\d+) ms")


def to_error(error: grpc.RpcError) -> RetrievalError:
    """The error of a failed call. A dead replica is UNAVAILABLE, where Serve's proxy says INTERNAL."""
    code, details = error.code(), error.details() or "no details"
    if code == grpc.StatusCode.INTERNAL and _DEAD.search(details):
        reason = details.strip().splitlines()[0][:200]
        return RetrievalError(
            grpc.StatusCode.UNAVAILABLE, f"the replica that worked on this is gone ({reason}); try again"
        )
    return RetrievalError(code, details)


class Attempts:
    """The attempts of one call that may take ``timeout_s`` seconds in all."""

    def __init__(self, timeout_s: float) -> None:
        self._deadline, self._made = time.monotonic() + timeout_s, 0

    @property
    def left_s(self) -> float:
        """Seconds until the deadline."""
        return max(0.001, self._deadline - time.monotonic())

    def failed(self, error: grpc.RpcError) -> float:
        """Seconds to wait before the next attempt; raises the call's error when there is to be none."""
        self._made += 1
        told = to_error(error)
        pause_s = self._pause_s(error, told)
        if pause_s is None or self._made >= MAX_ATTEMPTS or pause_s >= self.left_s:
            raise told from None
        return pause_s

    def _pause_s(self, error: grpc.RpcError, told: RetrievalError) -> float | None:
        if told.code != error.code():
            return backoff_s(self._made, PAUSE_S)
        found = _RETRY_AFTER.search(told.message) if told.code == grpc.StatusCode.RESOURCE_EXHAUSTED else None
        return int(found[1]) / 1000 * random.uniform(1.0, 1.5) if found else None  # not all callers at once
