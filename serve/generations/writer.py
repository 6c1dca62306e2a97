"""The writer: the one process of a service that changes what is served. It keeps the log of writes and the state, tells
the replicas that follow, and moves them from one generation to the next.

There is one at a time (the folder's lock sees to that). Without it searches go on; writes and switches are UNAVAILABLE
until Serve has started it again, and it then knows everything it has acknowledged.
"""

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache

import grpc
from ray.util.metrics import Counter, Gauge

from lookalike import storage
from lookalike.artifacts import Artifact
from lookalike.errors import LookalikeError, UsageError
from lookalike.serve.generations.adoption import adopt
from lookalike.serve.generations.compaction import compact_in_task, held_writes
from lookalike.serve.generations.follower import POLL_S
from lookalike.serve.generations.generation import Generation, read_generation
from lookalike.serve.generations.journal import DELETE, UPSERT, Journal
from lookalike.serve.generations.pruning import prune
from lookalike.serve.generations.state import Held, State, load_state, save_state
from lookalike.serve.generations.write_log import WriteLog, find_foreign
from lookalike.serve.proto import retrieval_pb2 as pb
from lookalike.serve.settings.config import ServeConfig
from lookalike.serve.wire.errors import RetrievalError, invalid
from lookalike.telemetry import fields, get_logger

log = get_logger(__name__)
SILENCE_S = 4 * POLL_S
"""A follower that has not asked for so long is gone."""
COMPACT_PAUSE_S = 60.0
"""Pause before the writer compacts by itself again after it could not, in seconds."""


@dataclass
class Seen:
    """What a follower said last, and when (seconds of the monotonic clock)."""

    role: str
    version: tuple[int, int]
    holds: set[str]
    failed: dict[str, str]
    at: float = field(default_factory=time.monotonic)

    def knows(self, version: tuple[int, int]) -> bool:
        """Whether it has taken in that version of this writer, or a later one."""
        return self.version[0] == version[0] and self.version >= version


class Writer:
    """State and log of one service. Methods raise ``RetrievalError``."""

    def __init__(self, config: ServeConfig, generation: Generation) -> None:
        assert config.writes.state is not None, "without a folder there is nothing to write to"
        self._config, self._folder = config, storage.local_path(config.writes.state)
        journal = Journal(self._folder)
        self._state = adopt(load_state(self._folder), config, generation, journal)
        save_state(self._folder, self._state)
        self._log = WriteLog(journal, min(one.includes_writes for one in self._state.held), self._stored)
        self._pending = 0
        """Rows of the writes that the current index does not hold."""
        self._pending_rows = Gauge("lookalike_pending_rows", "Written and deleted rows that wait for compaction.")
        self._failures = Counter("lookalike_compactions_failed_total", "Compactions begun by themselves that failed.")
        self._count_pending()
        self._is_changing_model = False
        self._version, self._changed, self._progress = (time.time_ns(), 0), asyncio.Event(), asyncio.Event()
        self._followers: dict[str, Seen] = {}
        self._started = time.monotonic()
        self._moving = asyncio.Lock()
        self._compacting: asyncio.Task[None] | None = None
        self._compact_after = 0.0
        """Time of the monotonic clock before which the writer does not compact by itself."""

    async def follow(self, asked: str) -> tuple[str, list[bytes]]:
        """News for a follower (JSON) and the writes that it lacks; see ``follower.py``."""
        ask = json.loads(asked)
        version = tuple(ask["version"])
        seen = Seen(ask["role"], (version[0], version[1]), set(ask["holds"]), ask["failed"])
        if ask["id"] not in self._followers:
            self._drop_silent()  # as many as there are replicas, however many come and go
        self._followers[ask["id"]] = seen
        self._progress.set()
        if version == self._version and ask["last"] >= self._log.last and ask["wait_s"]:
            await _wait(self._changed, ask["wait_s"])
        state = self._state
        news = {
            "version": self._version,
            "held": [one.model_dump() for one in state.held],
            "current": state.current,
            "last": self._log.last,
            "since": self._log.since,
        }
        return json.dumps(news), self._log.frames_after(ask["last"])

    def _tell(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def upsert(self, content: bytes) -> int:
        """Store an ``UpsertRequest`` whose rows have vectors; the write's number, once it is on the disk."""
        message = pb.UpsertRequest.FromString(content)
        serving = self._state.serving
        if message.model_fingerprint != serving.model_fingerprint:
            raise RetrievalError(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"the vectors are of model {message.model_fingerprint}, the index of {serving.model_fingerprint}",
            )
        for row in message.rows:
            check_kept(row, read_where(serving.index))
        if self._is_changing_model:
            raise RetrievalError(
                grpc.StatusCode.UNAVAILABLE,
                "an index of another model is being loaded, for which "
                "vectors of this one would be lost; write again when it is served",
            )
        return await self._store(UPSERT, content)

    async def delete(self, content: bytes) -> int:
        """Store a ``DeleteRequest``; the write's number, once it is on the disk."""
        return await self._store(DELETE, content)

    async def _store(self, kind: int, content: bytes) -> int:
        if self._pending >= self._config.writes.max_pending_rows:
            raise RetrievalError(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"{self._pending} rows wait for compaction, "
                f"the limit is {self._config.writes.max_pending_rows}; compact, or raise "
                "writes.max_pending_rows of the service",
            )
        return await self._log.store(kind, content)

    def _stored(self) -> None:
        """Tell who follows, and compact where enough waits."""
        self._count_pending()
        self._tell()
        limit = self._config.writes.compact_rows
        is_free = self._compacting is None or self._compacting.done()
        if limit is not None and self._pending >= limit and is_free and time.monotonic() >= self._compact_after:
            self._compacting = asyncio.ensure_future(self._compact_alone())

    def _count_pending(self) -> None:
        self._pending = self._log.num_rows_after(self._state.serving.includes_writes)
        self._pending_rows.set(self._pending)

    async def _compact_alone(self) -> None:
        try:
            await self.compact(0)
        except Exception as error:  # noqa: BLE001  # whatever it is, the writer goes on
            self._compact_after = time.monotonic() + COMPACT_PAUSE_S
            self._failures.inc(1)
            log.warning("not compacted %s", fields(reason=str(error)[:500], again_after_s=COMPACT_PAUSE_S))

    async def switch(self, content: bytes) -> bytes:
        """Serve another index: a ``SwitchRequest`` to the ``Generation`` that answers now."""
        request = pb.SwitchRequest.FromString(content)
        async with self._moving:
            if request.HasField("includes_writes") and request.includes_writes > self._log.last:
                raise invalid(f"includes_writes={request.includes_writes} is beyond the last write, {self._log.last}")
            try:
                includes = request.includes_writes
                if not request.HasField("includes_writes"):
                    includes = await asyncio.to_thread(held_writes, request.index, self._folder)
                self._check_includes(request.index, includes)
                generation = await asyncio.to_thread(
                    read_generation,
                    request.index,
                    request.plan or None,
                    request.encoder or "auto",
                    includes_writes=includes,
                )
            except (LookalikeError, OSError) as error:
                raise RetrievalError(grpc.StatusCode.FAILED_PRECONDITION, f"not switched: {error}") from None
            with self._changing_model(generation.meta.model_fingerprint):
                await self._log.settle()  # no vectors come any more that the check does not see
                self._check_writes(generation)
                return write_held(await self._serve(Held.of(generation), request.timeout_s or 600))

    def _check_includes(self, index: str, includes: int) -> None:
        """Refuse an index to which acknowledged writes would be lost."""
        compacted = self._state.serving
        if includes + 1 < self._log.journal.first:
            raise UsageError(
                f"index {index} holds the service's writes up to {includes}, those up to "
                f"{self._log.journal.first - 1} are only in {compacted.index} any more; build it from the "
                "embeddings of that one, or set includes_writes if it holds them"
            )

    def _check_writes(self, generation: Generation) -> None:
        """Refuse another model while writes with vectors of the old one would be lost to it."""
        lost = find_foreign(self._log.after(generation.includes_writes), generation.meta.model_fingerprint)
        if lost:
            raise RetrievalError(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"not switched: {lost} written rows have vectors "
                f"of another model than index {generation.index}; embed them for it and set "
                "includes_writes to the last write that it then holds",
            )

    @contextmanager
    def _changing_model(self, model: str) -> Iterator[None]:
        """Take no vectors while an index of another model than theirs is being loaded."""
        self._is_changing_model = model != self._state.serving.model_fingerprint
        try:
            yield
        finally:
            self._is_changing_model = False

    async def rollback(self) -> bytes:
        """Serve the previous generation again."""
        async with self._moving:
            previous = self._state.find(self._state.previous)
            if previous is None:
                raise RetrievalError(grpc.StatusCode.FAILED_PRECONDITION, "there is no previous index to roll back to")
            return write_held(await self._serve(previous, 600))

    async def _serve(self, one: Held, timeout_s: float) -> Held:
        """Have ``one`` loaded by all, then let it answer; what fails leaves all as it was."""
        if one == self._state.serving:
            return one
        with self._changing_model(one.model_fingerprint):
            return await self._load_and_move(one, time.monotonic() + timeout_s)

    async def _load_and_move(self, one: Held, deadline: float) -> Held:
        before = self._state
        await self._log.remember(one.includes_writes)
        await self._set(before.holding(one))
        try:
            await self._wait_until(lambda seen: one.key in seen.holds, one, deadline)
        except BaseException:
            await self._set(before)
            self._forget()
            raise
        await self._set(self._state.serving_now(one.name))
        version = self._version
        try:
            await self._wait_until(lambda seen: seen.knows(version), one, deadline)
        finally:
            await self._set(self._state.trimmed())
            self._forget()
        log.info("switched %s", fields(index=one.index, generation=one.name, includes_writes=one.includes_writes))
        return one

    async def _set(self, state: State) -> None:
        try:
            await asyncio.to_thread(save_state, self._folder, state)
        except (LookalikeError, OSError) as error:
            raise RetrievalError(grpc.StatusCode.UNAVAILABLE, f"the state could not be stored ({error})") from None
        self._state = state
        self._count_pending()
        self._version = (self._version[0], self._version[1] + 1)
        self._tell()

    def _drop_silent(self) -> None:
        """Forget the followers that are gone."""
        now = time.monotonic()
        self._followers = {key: seen for key, seen in self._followers.items() if now - seen.at < SILENCE_S}

    async def _wait_until(self, ready: Callable[[Seen], bool], one: Held, deadline: float) -> None:
        """Return when all followers are ``ready``; raises when one cannot hold ``one``, or at the deadline."""
        while True:
            now = time.monotonic()
            self._drop_silent()
            failed = [seen.failed[one.key] for seen in self._followers.values() if one.key in seen.failed]
            if failed:
                code = grpc.StatusCode.FAILED_PRECONDITION
                raise RetrievalError(code, f"not switched: {failed[0]}; nothing has changed")
            known = now - self._started > POLL_S + 1  # after a start all who are there have asked by then
            if known and all(map(ready, self._followers.values())):
                return
            if now > deadline:
                late = sorted({seen.role for seen in self._followers.values() if not ready(seen)})
                raise RetrievalError(
                    grpc.StatusCode.DEADLINE_EXCEEDED,
                    f"index {one.name} is not loaded by all in time ({', '.join(late)}); allow more with timeout_s",
                )
            self._progress.clear()
            await _wait(self._progress, 0.5)

    def _forget(self) -> None:
        """Drop writes that every generation held includes."""
        self._log.forget(min(one.includes_writes for one in self._state.held))

    async def compact(self, timeout_s: float) -> bytes:
        """Build an index that holds all writes so far, and serve it."""
        allowed_s = timeout_s or 3600
        async with self._moving:
            serving, last = self._state.serving, self._log.last
            records = self._log.after(serving.includes_writes, last)
            if not records:
                return write_held(serving)
            if foreign := find_foreign(records, serving.model_fingerprint):
                raise RetrievalError(
                    grpc.StatusCode.FAILED_PRECONDITION,
                    f"not compacted: {foreign} written rows have "
                    "vectors of another model than the index; serve the one of theirs",
                )
            try:
                index = await asyncio.wait_for(compact_in_task(serving.index, records, self._folder), allowed_s)
                generation = await asyncio.to_thread(
                    read_generation, index, serving.plan, serving.encoder or "none", includes_writes=last, check=False
                )
            except TimeoutError:
                raise RetrievalError(
                    grpc.StatusCode.DEADLINE_EXCEEDED,
                    f"not compacted in {allowed_s:g} s; nothing has changed, and the next attempt goes on from there",
                ) from None
            except (LookalikeError, OSError) as error:
                raise RetrievalError(grpc.StatusCode.FAILED_PRECONDITION, f"not compacted: {error}") from None
            moved = await self._serve(Held.of(generation), allowed_s)
            await self._prune()
            return write_held(moved)

    async def _prune(self) -> None:
        keep_hours, held = self._config.writes.keep_hours, [one.index for one in self._state.held]
        if keep_hours is not None:
            try:
                await asyncio.to_thread(prune, self._folder, held, keep_hours * 3600)
            except OSError as error:  # the next compaction tries again
                log.warning("not pruned %s", fields(folder=self._folder, error=repr(error)[:200]))

    async def status(self) -> bytes:
        """A ``StatusResponse``."""
        self._drop_silent()
        state, alive = self._state, list(self._followers.values())
        roles = sorted({seen.role for seen in alive})
        followers = [
            pb.Followers(
                role=role,
                replicas=sum(seen.role == role for seen in alive),
                current=sum(seen.role == role and state.serving.key in seen.holds for seen in alive),
            )
            for role in roles
        ]
        response = pb.StatusResponse(
            generations=[_message(one) for one in state.held],
            current=state.current,
            previous=state.previous or "",
            last_write=self._log.last,
            pending_rows=self._pending,
            followers=followers,
        )
        return bytes(response.SerializeToString())


@lru_cache(8)
def read_where(index: str) -> dict[str, list[str]]:
    """The conditions that all rows of an index meet."""
    conditions: dict[str, list[str]] = Artifact.open(index, check=False).manifest.config.get("where") or {}
    return conditions


def check_kept(row: pb.Row, where: dict[str, list[str]]) -> None:
    """Refuse a row that the index leaves out: the next compaction would lose it."""
    for column, values in where.items():
        if row.metadata.get(column) not in values:
            raise invalid(
                f"row {row.id!r} has {column}={row.metadata.get(column)!r}; this index holds only rows with "
                f"{column} in {values}: set it in the metadata"
            )


def write_held(one: Held) -> bytes:
    """A ``Generation`` message."""
    return bytes(_message(one).SerializeToString())


def _message(one: Held) -> pb.Generation:
    return pb.Generation(**{**one.model_dump(), "plan": one.plan or "", "encoder": one.encoder or ""})


async def _wait(event: asyncio.Event, seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):  # wait_for of Python 3.11 may pass over being cancelled
            await event.wait()
    except TimeoutError:
        return
