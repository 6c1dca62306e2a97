"""What one caller may have under way in a listener: calls, and bytes of their messages."""

import asyncio
from collections import deque

import grpc

from lookalike.serve.wire.bounds import SMALL_BYTES
from lookalike.serve.wire.errors import RetrievalError

WAIT_S = 2.0
"""Longest wait for room for a message, in seconds; then the caller is told to come back."""
PACED_BYTES = 4 << 20
"""Smaller messages go on at once: 256 vectors of 2048 floats, most pictures."""
WATCHED_S = 10.0
"""Seconds for which a caller has one call at a time, of the methods that take large messages, after a message beyond a
bound."""
REFUSED_COST = 4
"""Times that a second one counts in the caller's bytes per second."""
RETRY_MS = 100


class Share:
    """The calls of one tenant, or of one source without tenants, and the bytes of their messages.

    A message is counted at the largest size of its method until it has been read, and then at its own until its call is
    answered. Messages of at most ``SMALL_BYTES`` never wait for others.
    """

    def __init__(self, name: str) -> None:
        self.name, self.calls, self.size_bytes = name, 0, 0
        self._most = 0
        self._paid, self._watched = 0.0, 0.0
        """Times of the loop's clock until which the messages read so far take up the caller's bytes per second, and
        until which one is read at a time."""
        self._waiting: deque[tuple[asyncio.Future[None], int]] = deque()

    @property
    def is_idle(self) -> bool:
        """Whether nothing is lost with this object."""
        return not self.calls and self._paid < asyncio.get_running_loop().time()

    def enter(self, most: int) -> None:
        """Count a call; raises RESOURCE_EXHAUSTED if ``most`` are under way."""
        if self.calls >= most:
            raise RetrievalError(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"{most} calls of {self.name} are under way; retry after {RETRY_MS} ms",
            )
        self.calls += 1

    def leave(self, size: int) -> None:
        """End a call and give its bytes back."""
        self.calls -= 1
        self.release(size)

    async def reserve(self, size: int, most: int) -> None:
        """Count ``size`` bytes, as soon as ``most`` leave room for them; raises RESOURCE_EXHAUSTED if others stay."""
        self._most = most
        if size <= SMALL_BYTES or not self.size_bytes or (not self._waiting and self.size_bytes + size <= most):
            self.size_bytes += size
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((turn, size))
        try:
            async with asyncio.timeout(WAIT_S):
                await turn
        except BaseException as error:
            if turn.done() and not turn.cancelled():  # the room came at the same moment
                self.size_bytes -= size
            self.release(0)
            if not isinstance(error, TimeoutError):
                raise
            raise RetrievalError(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"{self.size_bytes} bytes of requests of {self.name} are under way, and {size} more would exceed the "
                f"{most} it may have; send fewer large ones at a time, and retry after {RETRY_MS} ms",
            ) from None

    def release(self, size: int) -> None:
        """Give ``size`` bytes back; those who wait for them go on in the order in which they came."""
        self.size_bytes -= size
        while self._waiting:
            turn, own = self._waiting[0]
            if not turn.done():
                if self.size_bytes and self.size_bytes + own > self._most:
                    return
                self.size_bytes += own
                turn.set_result(None)
            self._waiting.popleft()

    @property
    def is_watched(self) -> bool:
        """Whether a message of this caller was beyond a bound a short while ago."""
        return self._watched > 0 and asyncio.get_running_loop().time() < self._watched

    def watch(self, size: int, bytes_per_s: int) -> None:
        """Take one message at a time for a while, since one of ``size`` bytes was beyond a bound; later ones cost."""
        now = asyncio.get_running_loop().time()
        if self.is_watched:
            self._paid = max(now, self._paid) + REFUSED_COST * size / bytes_per_s
        self._watched = now + WATCHED_S

    async def wait_if_watched(self) -> None:
        """Wait until what was refused is paid off."""
        if self.is_watched and (wait_s := self._paid - asyncio.get_running_loop().time()) > 0:
            await asyncio.sleep(wait_s)

    async def pay(self, size: int, bytes_per_s: int) -> None:
        """Wait until the caller's earlier messages above ``PACED_BYTES`` have had their time at ``bytes_per_s``."""
        if size <= PACED_BYTES:
            return
        now = asyncio.get_running_loop().time()
        wait_s, self._paid = self._paid - now, max(now, self._paid) + size / bytes_per_s
        if wait_s > 0:
            await asyncio.sleep(wait_s)
