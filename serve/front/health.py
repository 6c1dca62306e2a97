"""Whether searches are answered: what ``grpc.health.v1`` tells.

Every search that all shards answered is proof. If there was none of late, one is made, of the whole way but for the
caller's checks. A service whose searches fail or hang is NOT_SERVING although its ingress answers.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable

import grpc

from lookalike.serve.wire.errors import RetrievalError

FRESH_S = 3.0
"""Seconds for which an answered search is proof enough."""
SILENT_S = 10.0
"""Seconds without an answered search after which the service does not serve."""
ANSWER_S = 0.5
"""Longest time that a caller who asks for health waits for a search."""


class Pulse:
    """When a search was last answered; ``search`` makes one."""

    def __init__(self, search: Callable[[], Awaitable[object]]) -> None:
        self._search = search
        self._asking: asyncio.Task[None] | None = None
        self.answered = time.monotonic()
        """When a search was last answered; at first the start, where a replica makes some to warm up."""

    async def is_serving(self) -> bool:
        """Whether a search was answered within ``SILENT_S``; makes one if none was within ``FRESH_S``."""
        if self._silent_s > FRESH_S:
            if self._asking is None or self._asking.done():
                self._asking = asyncio.get_running_loop().create_task(self._ask())
            await asyncio.wait([self._asking], timeout=ANSWER_S)
        return self._silent_s <= SILENT_S

    @property
    def _silent_s(self) -> float:
        return time.monotonic() - self.answered

    async def _ask(self) -> None:
        try:
            await self._search()
        except RetrievalError as error:
            if error.code != grpc.StatusCode.RESOURCE_EXHAUSTED:  # then others are being answered
                return
        self.answered = time.monotonic()
