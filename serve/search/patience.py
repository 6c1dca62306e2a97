"""How long a request that accepts partial answers waits for shards that are silent while others have answered.

It waits a multiple of what the slowest answer took, but at least as long as a hedged call needs, and at most a share of
the request's time. A shard that was given up on gets less time, until it answers again or a while has passed.
"""

import asyncio
from collections.abc import Sequence
from typing import Any

from lookalike.serve.settings.load import Retries

MULTIPLE = 4.0
"""Times that the slowest answer so far took."""
SHARE = 0.8
"""Share of the request's time; the rest is for the merge, the re-rank and the way back."""
AFTER_HEDGE_S = 0.5
"""Seconds that a second replica gets to answer a hedged call."""
SILENT_S = 0.1
"""Least seconds for a shard that has been given up on."""
SILENT_FOR_S = 5.0
"""Seconds after which one request waits for such a shard as if it were sound."""


class Patience:
    """Waits for shards; remembers which of them were silent. Times are of the running loop's clock, in seconds."""

    def __init__(self, retries: Retries) -> None:
        hedge_s = 0.0 if retries.hedge_ms is None or not retries.hedge_share else retries.hedge_ms / 1000
        self._least_s = hedge_s + AFTER_HEDGE_S
        self._silent: dict[int, float] = {}
        """Number of a shard -> when it was last given up on, or waited for in full."""

    async def wait(self, calls: Sequence[asyncio.Future[Any]], deadline: float) -> None:
        """Return when all ``calls``, one per shard, are done, or enough time has passed for the others."""
        now = asyncio.get_running_loop().time
        start, slowest_s, answered = now(), 0.0, False
        latest, least_s, left = deadline, self._least_for(range(len(calls)), start), set(calls)
        while left and (wait_s := latest - now()) > 0:
            done, left = await asyncio.wait(left, timeout=wait_s, return_when=asyncio.FIRST_COMPLETED)
            if any(not call.cancelled() and call.exception() is None for call in done):
                answered, slowest_s = True, now() - start
            if answered:
                waiting = [number for number, call in enumerate(calls) if call in left]
                least = max((least_s[number] for number in waiting), default=0.0)
                share_s = SHARE * (deadline - start)
                latest = start + min(max(least, MULTIPLE * slowest_s), share_s)
        if answered:
            self._remember(calls, now() - start, start)

    def _least_for(self, numbers: Sequence[int], start: float) -> list[float]:
        """For each shard the least seconds to wait for it."""
        least = []
        for number in numbers:
            silent_since = self._silent.get(number)
            trusted = silent_since is None or start - silent_since > SILENT_FOR_S
            if trusted and silent_since is not None:
                self._silent[number] = start  # this request tries it, the others go on without it
            least.append(self._least_s if trusted else SILENT_S)
        return least

    def _remember(self, calls: Sequence[asyncio.Future[Any]], waited_s: float, start: float) -> None:
        for number, call in enumerate(calls):
            if call.done():
                self._silent.pop(number, None)
            elif waited_s >= self._least_s:
                self._silent.setdefault(number, start)
