"""What the writer knows of the replicas that follow it, and how it waits for them."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

import grpc

from lookalike.serve.generations import news
from lookalike.serve.generations.news import Poll, Version
from lookalike.serve.generations.state import GenerationRef
from lookalike.serve.proto import retrieval_pb2 as pb
from lookalike.serve.wire.errors import RetrievalError, refused
from lookalike.telemetry import fields, get_logger

log = get_logger(__name__)
SILENT_POLLS = 4
"""A follower that has not polled for this many times ``POLL_S`` is gone."""


@dataclass
class FollowerStatus:
    """A follower's last poll, and when it came (seconds of the monotonic clock)."""

    poll: Poll
    conflict: str
    """Why its writes are not those of the log; empty if they are."""
    at: float

    def holds(self, ref: GenerationRef) -> bool:
        """Whether it can answer for ``ref``."""
        return ref.key in self.poll.holds

    def knows(self, version: Version) -> bool:
        """Whether it has taken in that version of this writer, or a later one."""
        return self.poll.version.writer == version.writer and self.poll.version >= version


class Followers:
    """The followers of one writer."""

    def __init__(self) -> None:
        self.version = Version(time.time_ns(), 0)
        """Version of the writer's state."""
        self._status: dict[str, FollowerStatus] = {}
        self._changed, self._progress = asyncio.Event(), asyncio.Event()
        self._started = time.monotonic()

    async def hear(self, poll: Poll, last_write: int, conflict: str = "") -> None:
        """Note ``poll``, and return when there is news for it or it has waited long enough."""
        if conflict and conflict != self.conflict():
            log.error("follower and log differ %s", fields(reason=conflict))
        if poll.id not in self._status:
            self._drop_silent()  # only as many are known as there are replicas, however many come and go
        self._status[poll.id] = FollowerStatus(poll, conflict, at=time.monotonic())
        self._progress.set()
        if poll.version == self.version and poll.last_write >= last_write and poll.wait_s:
            await _wait(self._changed, poll.wait_s)

    def conflict(self) -> str:
        """Why the writes of a follower are not those of the log; empty if all are."""
        if any(status.conflict for status in self._status.values()):
            self._drop_silent()
        return next((status.conflict for status in self._status.values() if status.conflict), "")

    def announce(self) -> None:
        """Tell of a new version of the state."""
        self.version = self.version._replace(change=self.version.change + 1)
        self.wake()

    def wake(self) -> None:
        """Answer the polls that wait."""
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def wait_to_hold(self, ref: GenerationRef, deadline: float) -> None:
        """Return when all followers hold ``ref``; raises if one cannot load it, or at the deadline."""
        await self._wait_until(lambda status: status.holds(ref), ref, deadline)

    async def wait_to_know(self, ref: GenerationRef, deadline: float) -> None:
        """Return when all followers know the present version, in which ``ref`` answers; raises likewise."""
        version = self.version
        await self._wait_until(lambda status: status.knows(version), ref, deadline)

    async def _wait_until(self, ready: Callable[[FollowerStatus], bool], ref: GenerationRef, deadline: float) -> None:
        while True:
            now = time.monotonic()
            self._drop_silent()
            polls = [status.poll for status in self._status.values()]
            if failed := [poll.failed[ref.key] for poll in polls if ref.key in poll.failed]:
                raise refused(f"not switched: {failed[0]}; nothing has changed")
            all_have_polled = now - self._started > news.POLL_S + 1
            if all_have_polled and all(map(ready, self._status.values())):
                return
            if now > deadline:
                late = sorted({status.poll.role for status in self._status.values() if not ready(status)})
                raise RetrievalError(
                    grpc.StatusCode.DEADLINE_EXCEEDED,
                    f"index {ref.name} is not loaded by all in time ({', '.join(late)}); allow more with timeout_s",
                )
            self._progress.clear()
            await _wait(self._progress, 0.5)

    def count(self, ref: GenerationRef) -> list[pb.Followers]:
        """For each role its replicas, and how many of them hold ``ref``."""
        self._drop_silent()
        alive = list(self._status.values())
        roles = sorted({status.poll.role for status in alive})
        return [
            pb.Followers(
                role=role,
                replicas=sum(status.poll.role == role for status in alive),
                current=sum(status.poll.role == role and status.holds(ref) for status in alive),
            )
            for role in roles
        ]

    def _drop_silent(self) -> None:
        oldest = time.monotonic() - SILENT_POLLS * news.POLL_S
        self._status = {key: status for key, status in self._status.items() if status.at > oldest}


async def _wait(event: asyncio.Event, seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):  # wait_for of Python 3.11 may pass over being cancelled
            await event.wait()
    except TimeoutError:
        return
