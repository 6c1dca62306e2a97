"""How replicas follow the writer: which generations to hold, which one answers, and all writes in order.

A replica polls the writer again and again; the answer comes when there is news, or after ``POLL_S``. A generation is
opened in a thread, gets the writes it lacks, and only then answers. One that is no longer held is dropped after
``drain_s``, when no request that began with it can be under way. While the writer is away replicas answer as before.
"""

import asyncio
import uuid
from collections.abc import Sequence
from typing import Any, Protocol

from lookalike.serve.generations import news
from lookalike.serve.generations.generation import Generation, read_generation
from lookalike.serve.generations.news import News, Poll, Version
from lookalike.serve.generations.state import GenerationRef
from lookalike.serve.generations.write_record import WriteRecord
from lookalike.serve.wire.handles import by_grpc
from lookalike.telemetry import fields, get_logger

log = get_logger(__name__)
RETRY_S = 0.5
"""Seconds before the next poll after the writer failed to answer."""


class Member(Protocol):
    """What follows the writer: a worker, or the ingress."""

    def open(self, generation: Generation) -> Any:
        """Open everything needed to answer for ``generation``; called in a thread, may take minutes."""

    def apply(self, opened: Any, records: Sequence[WriteRecord]) -> None:
        """Take in writes that ``opened`` lacks; called in a thread."""

    def add(self, generation: Generation, opened: Any) -> None:
        """Answer for ``generation`` from now on."""

    def drop(self, name: str) -> None:
        """Forget a generation."""

    def switch(self, name: str) -> None:
        """Requests that begin now belong to this generation."""


class Follows:
    """A member as a deployment: Serve calls ``reconfigure`` before a replica takes traffic."""

    writer: Any = None
    """Handle of the writer; None if nothing changes while it is served."""
    follower: "Follower | None" = None

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Catch up with the writer, and follow it from now on; ``user_config`` has ``role`` and ``drain_s``."""
        if self.writer is not None and self.follower is None:
            member: Any = self
            self.follower = Follower(member, by_grpc(self.writer), **user_config)
            await self.follower.start()

    async def check_health(self) -> None:
        """Raise ``RuntimeError`` when the replica no longer follows; Serve then starts another."""
        if self.follower is not None and self.follower.is_broken:
            raise RuntimeError("this replica has stopped following the writer")

    def apply(self, opened: Any, records: Sequence[WriteRecord]) -> None:
        """Do nothing: writes are the shards' business."""

    def switch(self, name: str) -> None:
        """Do nothing: every call names its generation."""


class Follower:
    """Keeps one replica up to date; ``start`` returns when it has caught up, and the follower goes on by itself."""

    def __init__(self, member: Member, writer: Any, *, role: str, drain_s: float) -> None:
        self._member, self._writer, self._role, self._drain_s = member, writer, role, drain_s
        self._id = uuid.uuid4().hex
        self._version, self._last = Version(0, -1), 0
        self._past: set[int] = set()
        """Earlier writers."""
        self._records: list[WriteRecord] = []
        """Writes after ``_since``: those that a held generation may lack."""
        self._digest = 0, ""
        """Number and digest of the newest of them that was asked for."""
        self._since, self._target = 0, 0
        self._opened: dict[str, tuple[Generation, Any]] = {}
        self._loading: dict[str, asyncio.Task[None]] = {}
        self._leaving: dict[str, asyncio.TimerHandle] = {}
        self._failed: dict[str, str] = {}
        """Key of each generation that could not be opened -> the reason."""
        self._taking = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Load what the writer says, with all writes; ``RuntimeError`` if the current generation cannot be loaded."""
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
        """Whether it has stopped, which it never should."""
        return self._task is not None and self._task.done()

    async def _run(self) -> None:
        silent = False
        while True:
            try:
                await self._poll(news.POLL_S)
                silent = False
            except Exception as error:  # noqa: BLE001  # the replica goes on with what it has
                if not silent:
                    log.warning("no news from the writer %s", fields(role=self._role, error=repr(error)[:200]))
                silent = True
                await asyncio.sleep(RETRY_S)

    async def _poll(self, wait_s: float) -> str:
        """Poll until all writes are here, and do what the answers say; return the name of the current generation."""
        while True:
            poll = Poll(
                id=self._id,
                role=self._role,
                version=self._version,
                last_write=self._last,
                last_digest=self._last_digest(),
                wait_s=wait_s,
                failed=self._failed,
                holds=tuple(GenerationRef.of(generation).key for generation, _ in self._opened.values()),
            )
            answer: News = await self._writer.follow.remote(poll)
            async with self._taking:
                self._last = max(self._last, answer.since)  # every generation holds the writes before it
                self._target = max(self._target, answer.last_write)  # first: what is being loaded waits for these
                await self._take_writes(answer.records)
                if self._is_new(answer.version):
                    self._hold(answer.held)
                    if answer.current in self._opened:
                        self._member.switch(answer.current)
                    self._version = answer.version
            if self._last >= self._target:
                return answer.current

    def _last_digest(self) -> str:
        if not self._records or self._records[-1].number != self._last:
            return ""
        if self._digest[0] != self._last:
            self._digest = self._last, self._records[-1].digest.hex()
        return self._digest[1]

    def _is_new(self, version: Version) -> bool:
        """Whether this answer is the newest so far; the first answer of another writer always is."""
        if version.writer == self._version.writer:
            return version >= self._version
        if version.writer in self._past:
            return False
        self._past.add(self._version.writer)
        return True

    async def _take_writes(self, sent: Sequence[WriteRecord]) -> None:
        records = [record for record in sent if record.number > self._last]
        if records and records[0].number == self._last + 1:  # otherwise earlier writes were asked for meanwhile
            before = self._records, self._last
            self._records, self._last = [*self._records, *records], records[-1].number
            try:
                for generation, opened in list(self._opened.values()):
                    await self._give(generation, opened, records)
            except Exception:  # the next poll asks for them again; members that have them skip them
                self._records, self._last = before
                raise

    async def _give(self, generation: Generation, opened: Any, records: Sequence[WriteRecord]) -> None:
        if lacking := [record for record in records if record.number > generation.includes_writes]:
            await asyncio.to_thread(self._member.apply, opened, lacking)

    def _hold(self, held: Sequence[GenerationRef]) -> None:
        wanted = {ref.name: ref for ref in held}
        for name in set(self._opened) - set(wanted) - set(self._leaving):
            self._leaving[name] = asyncio.get_running_loop().call_later(self._drain_s, self._let_go, name)
        for name in set(self._leaving) & set(wanted):
            self._leaving.pop(name).cancel()
        keys = {ref.key for ref in held}
        self._failed = {key: reason for key, reason in self._failed.items() if key in keys}
        for name, ref in wanted.items():
            is_here = name in self._opened and GenerationRef.of(self._opened[name][0]).key == ref.key
            if not is_here and name not in self._loading and ref.key not in self._failed:
                self._loading[name] = asyncio.ensure_future(self._load(ref))
        oldest = min(ref.includes_writes for ref in held)
        if oldest == self._since:
            return
        if oldest > self._since:
            self._records = [record for record in self._records if record.number > oldest]
        else:  # a new generation lacks writes that all others hold: ask for all from there on
            self._records, self._last = [], oldest
        self._since = oldest

    def _let_go(self, name: str) -> None:
        self._leaving.pop(name, None)
        self._opened.pop(name, None)
        self._member.drop(name)

    async def _load(self, ref: GenerationRef) -> None:
        name = ref.name
        try:
            generation, opened = await asyncio.to_thread(self._open, ref)
            given = 0
            while given < self._target:  # writes keep arriving
                given, records = self._last, self._records
                await self._give(generation, opened, records)
                if given < self._target:
                    await asyncio.sleep(0.02)
            self._member.add(generation, opened)
            self._opened[name] = (generation, opened)
        except Exception as error:  # noqa: BLE001  # the next poll tells the writer
            log.warning("cannot hold %s", fields(role=self._role, index=ref.index, error=repr(error)[:300]))
            self._failed[ref.key] = f"{self._role}: {error}"[:500]
        finally:
            self._loading.pop(name, None)
            if self._task is not None:
                self._telling = asyncio.ensure_future(self._tell())  # a task without a reference may vanish

    def _open(self, ref: GenerationRef) -> tuple[Generation, Any]:
        generation = read_generation(
            ref.index, ref.plan, ref.encoder or "none", includes_writes=ref.includes_writes, check=False
        )
        return generation, self._member.open(generation)

    async def _tell(self) -> None:
        try:
            await self._poll(0)
        except Exception as error:  # noqa: BLE001  # the next poll tells the writer
            log.debug("not told %s", fields(error=repr(error)[:200]))
