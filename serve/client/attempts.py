"""When a client repeats a call, within its deadline: after its replica died, and after ``retry after N ms``.

Searches are reads and writes may be made twice, so every call may be repeated. The gRPC channel itself repeats calls
that found no server.
"""

import random
import re
import time

import grpc

from lookalike.arguments import check_seconds
from lookalike.serve.wire.backoff import backoff_s
from lookalike.serve.wire.errors import RetrievalError

MAX_ATTEMPTS = 5
"""Most attempts of a call, including the first."""
AT_DEADLINE_S = 0.05
"""Seconds before the deadline from which a call that the service cancelled has met it: HTTP/2 has no word for that."""
PAUSE_S = 0.05
"""Pause after the first lost attempt, in seconds; it doubles each time."""
_DEAD = re.compile(
    r"actor( \w+)? (died|is dead|is unavailable)|ActorDiedError|ActorUnavailableError|node (died|has died)|"
    r"worker (died|crashed)",
    re.IGNORECASE,
)
_LARGE_ANSWER = re.compile(r"CLIENT: Received message larger than max|Sent message larger than max")
_RETRY_AFTER = re.compile(r"retry after (\d+) ms")


def to_error(error: grpc.RpcError) -> RetrievalError:
    """Return the error of a failed call; UNAVAILABLE for a replica that died or was stopped.

    In Serve's words these are INTERNAL and CANCELLED.
    """
    code, details = error.code(), error.details() or "no details"
    if code == grpc.StatusCode.INTERNAL and _DEAD.search(details):
        reason = details.strip().splitlines()[0][:200]
        return RetrievalError(
            grpc.StatusCode.UNAVAILABLE, f"the replica that worked on this is gone ({reason}); try again"
        )
    if code == grpc.StatusCode.RESOURCE_EXHAUSTED and _LARGE_ANSWER.search(details):
        return RetrievalError(code, f"{details}; ask for a smaller k, or fewer queries at once")
    if code == grpc.StatusCode.CANCELLED:  # these clients cancel no call that they wait for
        return RetrievalError(
            grpc.StatusCode.UNAVAILABLE, f"the replica was stopped while it worked on this ({details[:200]}); try again"
        )
    return RetrievalError(code, details)


class Attempts:
    """The attempts of one call, which may take ``timeout_s`` seconds in all."""

    def __init__(self, timeout_s: float) -> None:
        self._deadline, self._num_failed = time.monotonic() + check_seconds("timeout_s", timeout_s), 0

    @property
    def left_s(self) -> float:
        """Seconds until the deadline."""
        return max(0.001, self._deadline - time.monotonic())

    def failed(self, error: grpc.RpcError) -> float:
        """Return the seconds to wait before the next attempt; raise the call's error if there is none."""
        self._num_failed += 1
        reason = to_error(error)
        if error.code() == grpc.StatusCode.CANCELLED and self.left_s < AT_DEADLINE_S:  # the service's clock was first
            reason = RetrievalError(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded")
        pause_s = self._pause_s(error, reason)
        if pause_s is None or self._num_failed >= MAX_ATTEMPTS or pause_s >= self.left_s:
            raise reason from None
        return pause_s

    def _pause_s(self, error: grpc.RpcError, reason: RetrievalError) -> float | None:
        if reason.code != error.code():  # the replica died
            return backoff_s(self._num_failed, PAUSE_S)
        wait = _RETRY_AFTER.search(reason.message) if reason.code == grpc.StatusCode.RESOURCE_EXHAUSTED else None
        return int(wait[1]) / 1000 * random.uniform(1.0, 1.5) if wait else None  # not all callers at once
