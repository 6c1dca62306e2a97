"""What the writer is doing, one thing after the other, and what waits for its turn: for ``status`` and its callers."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import grpc

from lookalike.serve.proto import retrieval_pb2 as pb
from lookalike.serve.wire.errors import RetrievalError


@dataclass
class Activity:
    """A compaction, switch, rollback or backup, under way or waiting."""

    kind: str
    step: str
    """What it does now, or what it waits for."""
    begun: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        """Seconds since it was asked for."""
        return time.monotonic() - self.begun

    def describe(self) -> str:
        """It in words, as in "compaction (12 s: builds the index)"."""
        return f"{self.kind} ({self.seconds:.0f} s: {self.step})"


class Activities:
    """One activity at a time; the others wait, in the order in which they came."""

    def __init__(self) -> None:
        self._turn = asyncio.Lock()
        self._all: list[Activity] = []

    @asynccontextmanager
    async def begin(self, kind: str, allowed_s: float) -> AsyncIterator[Activity]:
        """Wait for a turn and hold it while the block runs.

        Raises DEADLINE_EXCEEDED, which names what is under way, if no turn comes within ``allowed_s``.
        """
        activity = Activity(kind, "waits for its turn")
        self._all.append(activity)
        try:
            await self._wait(activity, allowed_s)
            try:
                activity.step = "begins"
                yield activity
            finally:
                self._turn.release()
        finally:
            self._all.remove(activity)

    async def _wait(self, activity: Activity, allowed_s: float) -> None:
        try:
            async with asyncio.timeout(allowed_s):
                await self._turn.acquire()
        except TimeoutError:
            raise RetrievalError(
                grpc.StatusCode.DEADLINE_EXCEEDED,
                f"no turn for the {activity.kind} in {allowed_s:g} s, nothing has changed: the service is busy with a "
                f"{self._all[0].describe()}; wait for it (`lookalike admin status`), or allow more time",
            ) from None

    def messages(self) -> list[pb.Activity]:
        """All activities, the one under way first."""
        return [pb.Activity(kind=each.kind, step=each.step, seconds=each.seconds) for each in self._all]
