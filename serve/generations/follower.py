"""How replicas keep to what the writer says: which generations to hold, which one answers, and all writes in order.

A replica asks the writer again and again; the answer comes when there is news, or after ``POLL_S``. A generation is
opened in a thread, is given the writes it lacks, and only then answers; one that is no longer held is let go after
``drain_s``, when no request can be under way that began with it. While the writer is away replicas answer as before.
"""

import asyncio
import json
import uuid
from collections.abc import Sequence
from typing import Any, Protocol

from lookalike.serve.generations.generation import Generation, read_generation
from lookalike.serve.generations.journal import Record, read_frame
from lookalike.serve.generations.state import Held
from lookalike.telemetry import fields, get_logger

log = get_logger(__name__)
POLL_S = 2.0
"""How long the writer lets a replica wait for news."""
RETRY_S = 0.5
"""Pause before the writer is asked again after it failed to answer."""


class Member(Protocol):
    """What can follow: a worker, or the ingress."""

    def open(self, generation: Generation) -> Any:
        """Everything needed to answer for ``generation``; called in a thread, may take minutes."""

    def apply(self, opened: Any, records: Sequence[Record]) -> None:
        """Take in writes that ``opened`` does not hold; called in a thread."""

    def add(self, generation: Generation, opened: Any) -> None:
        """Answer for ``generation`` from now on."""

    def drop(self, name: str) -> None:
        """Let go of a generation."""

    def switch(self, name: str) -> None:
        """Requests that begin now belong to this generation."""


class Follows:
    """A member as a deployment: Serve calls ``reconfigure`` before a replica takes traffic."""

    writer: Any = None
    """Handle of the writer; None where nothing changes while it is served."""
    follower: "Follower | None" = None

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Catch up with the writer, and follow it from now on; ``user_config`` has ``role`` and ``drain_s``."""
        if self.writer is not None and self.follower is None:
            member: Any = self
            self.follower = Follower(member, self.writer, **user_config)
            await self.follower.start()

    async def check_health(self) -> None:
        """Raise ``RuntimeError`` when the replica no longer follows; Serve then starts another."""
        if self.follower is not None and self.follower.is_broken:
            raise RuntimeError("this replica has stopped following the writer")

    def apply(self, opened: Any, records: Sequence[Record]) -> None:
        """Nothing: writes are the shards' business."""

    def switch(self, name: str) -> None:
        """Nothing: every call names its generation."""


class Follower:
    """One replica's following; ``start`` returns when it has caught up, and goes on by itself."""

    def __init__(self, member: Member, writer: Any, *, role: str, drain_s: float) -> None:
        self._member, self._writer, self._role, self._drain_s = member, writer, role, drain_s
        self._id = uuid.uuid4().hex
        self._version, self._last = (0, -1), 0
        self._past: set[int] = set()
        """Writers before the one that is followed."""
        self._records: list[Record] = []
        """Writes that some generation held may lack: those after ``_since``."""
        self._since, self._target = 0, 0
        self._opened: dict[str, tuple[Generation, Any]] = {}
        self._loading: dict[str, asyncio.Task[None]] = {}
        self._leaving: dict[str, asyncio.TimerHandle] = {}
        self._failed: dict[str, str] = {}
        """Key of what could not be opened -> why."""
        self._taking = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Hold what the writer says, with all writes; raises ``RuntimeError`` when the current generation cannot be."""
        while True:
            try:
                current = await self._poll(0)
                break
            except Exception as error:  # noqa: BLE001  # whatever it is, the writer may be back soon
                log.warning("no writer yet %s", fields(role=self._role, error=repr(error)[:200]))
                await asyncio.sleep(RETRY_S)
        await asyncio.gather(*self._loading.values())
        if current not in self._opened:
            raise RuntimeError(f"{self._role} cannot open index {current}: {'; '.join(self._failed.values())}")
        self._member.switch(current)
        self._task = asyncio.ensure_future(self._run())

    @property
    def is_broken(self) -> bool:
        """Whether it has ended, which it should not."""
        return self._task is not None and self._task.done()

    async def _run(self) -> None:
        silent = False
        while True:
            try:
                await self._poll(POLL_S)
                silent = False
            except Exception as error:  # noqa: BLE001  # the replica goes on with what it has
                if not silent:
                    log.warning("no news from the writer %s", fields(role=self._role, error=repr(error)[:200]))
                silent = True
                await asyncio.sleep(RETRY_S)

    async def _poll(self, wait_s: float) -> str:
        """Ask until all writes are here, and do what the answers say; the name of the current generation."""
        while True:
            asked = {
                "id": self._id,
                "role": self._role,
                "version": self._version,
                "last": self._last,
                "wait_s": wait_s,
                "failed": self._failed,
                "holds": [Held.of(generation).key for generation, _ in self._opened.values()],
            }
            answer, frames = await self._writer.follow.remote(json.dumps(asked))
            news = json.loads(answer)
            async with self._taking:
                self._last = max(self._last, news["since"])  # what is before that, every generation holds
                self._target = max(self._target, news["last"])  # first: what is being loaded waits for these writes
                await self._take_writes(frames)
                if self._is_news(version := tuple(news["version"])):
                    self._hold([Held.model_validate(one) for one in news["held"]])
                    if news["current"] in self._opened:
                        self._member.switch(news["current"])
                    self._version = version
            if self._last >= self._target:
                return str(news["current"])

    def _is_news(self, version: tuple[int, int]) -> bool:
        """Whether an answer was not overtaken on its way; a new writer's is news, whatever its clock says."""
        if version[0] == self._version[0]:
            return version >= self._version
        if version[0] in self._past:
            return False
        self._past.add(self._version[0])
        return True

    async def _take_writes(self, frames: Sequence[bytes]) -> None:
        found = [read_frame(frame) for frame in frames]
        records = [one[0] for one in found if one is not None and one[0].number > self._last]
        if records and records[0].number == self._last + 1:  # else some before it were asked for anew
            before = self._records, self._last
            self._records, self._last = [*self._records, *records], records[-1].number
            try:
                for generation, opened in list(self._opened.values()):
                    await self._give(generation, opened, records)
            except Exception:  # asked for once more: who has them passes them over
                self._records, self._last = before
                raise

    async def _give(self, generation: Generation, opened: Any, records: Sequence[Record]) -> None:
        lacking = [record for record in records if record.number > generation.includes_writes]
        if lacking:
            await asyncio.to_thread(self._member.apply, opened, lacking)

    def _hold(self, held: Sequence[Held]) -> None:
        wanted = {one.name: one for one in held}
        for name in set(self._opened) - set(wanted) - set(self._leaving):
            self._leaving[name] = asyncio.get_running_loop().call_later(self._drain_s, self._let_go, name)
        for name in set(self._leaving) & set(wanted):
            self._leaving.pop(name).cancel()
        keys = {one.key for one in held}
        self._failed = {key: reason for key, reason in self._failed.items() if key in keys}
        for name, one in wanted.items():
            is_here = name in self._opened and Held.of(self._opened[name][0]).key == one.key
            if not is_here and name not in self._loading and one.key not in self._failed:
                self._loading[name] = asyncio.ensure_future(self._load(one))
        oldest = min(one.includes_writes for one in held)
        if oldest == self._since:
            return
        if oldest > self._since:
            self._records = [record for record in self._records if record.number > oldest]
        else:  # one is new that lacks writes which all others have: from there on anew
            self._records, self._last = [], oldest
        self._since = oldest

    def _let_go(self, name: str) -> None:
        self._leaving.pop(name, None)
        self._opened.pop(name, None)
        self._member.drop(name)

    async def _load(self, one: Held) -> None:
        name = one.name
        try:
            generation, opened = await asyncio.to_thread(self._open, one)
            given = 0
            while given < self._target:  # writes go on arriving
                given, records = self._last, self._records
                await self._give(generation, opened, records)
                if given < self._target:
                    await asyncio.sleep(0.02)
            self._member.add(generation, opened)
            self._opened[name] = (generation, opened)
        except Exception as error:  # noqa: BLE001  # the writer is told
            log.warning("cannot hold %s", fields(role=self._role, index=one.index, error=repr(error)[:300]))
            self._failed[one.key] = f"{self._role}: {error}"[:500]
        finally:
            self._loading.pop(name, None)
            if self._task is not None:
                self._telling = asyncio.ensure_future(self._tell())  # kept: a task nobody holds may vanish

    def _open(self, one: Held) -> tuple[Generation, Any]:
        generation = read_generation(
            one.index, one.plan, one.encoder or "none", includes_writes=one.includes_writes, check=False
        )
        return generation, self._member.open(generation)

    async def _tell(self) -> None:
        try:
            await self._poll(0)
        except Exception as error:  # noqa: BLE001  # the next poll tells it
            log.debug("not told %s", fields(error=repr(error)[:200]))
