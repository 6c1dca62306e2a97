"""The writer: the one process of a service that changes what is served. It keeps the writes and the state, tells the
replicas that follow, and moves them from one generation to the next.

There is one at a time (the folder's lock sees to that). Without it searches go on; writes and switches are UNAVAILABLE
until Serve has started it again, and it then knows everything it has acknowledged.
"""

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import grpc
from ray.util.metrics import Counter, Gauge

from lookalike import storage
from lookalike.errors import LookalikeError
from lookalike.serve.generations.activity import Activities, Activity
from lookalike.serve.generations.adoption import adopt, check_includes
from lookalike.serve.generations.compaction import check_kept, compact_in_task, held_writes, read_where
from lookalike.serve.generations.database import Database
from lookalike.serve.generations.followers import Followers
from lookalike.serve.generations.generation import Generation, read_generation
from lookalike.serve.generations.news import News, Poll
from lookalike.serve.generations.pruning import prune, prune_drafts
from lookalike.serve.generations.roots import artifact_roots, backup_roots, check_below
from lookalike.serve.generations.staging import Staging
from lookalike.serve.generations.state import GenerationRef, State
from lookalike.serve.generations.write_log import WriteLog
from lookalike.serve.generations.write_record import WriteKind, WriteRecord, count_foreign
from lookalike.serve.proto import retrieval_pb2 as pb
from lookalike.serve.settings.config import ServeConfig
from lookalike.serve.wire.errors import RetrievalError, invalid, refused
from lookalike.telemetry import fields, get_logger

log = get_logger(__name__)
SWITCH_S, COMPACT_S = 600.0, 3600.0
"""Seconds that a switch, and a compaction, may take if the request names none; waiting for its turn is part of it."""
COMPACT_PAUSE_S = 60.0
"""Seconds before the writer compacts by itself again after that has failed."""


class Writer:
    """State and writes of one service. Methods raise ``RetrievalError``."""

    def __init__(self, config: ServeConfig, generation: Generation) -> None:
        assert config.writes.state is not None, "without a folder there is nothing to write to"
        self._config, self._folder = config, storage.local_path(config.writes.state)
        self._roots = artifact_roots(config, generation)
        """Where ``switch`` finds artifacts."""
        database = Database(self._folder)
        try:
            self._state = adopt(config, generation, database)
            database.save_state(self._state)  # which takes no write if nothing has changed
            self._log = WriteLog(database, self._state.includes_writes, self._stored)
        except BaseException:
            database.close()
            raise
        self._pending = 0
        """Rows of the writes that the current index does not hold."""
        self._pending_rows = Gauge("lookalike_pending_rows", "Written and deleted rows that wait for compaction.")
        self._failures = Counter("lookalike_compactions_failed_total", "Compactions begun by themselves that failed.")
        self._count_pending()
        self._is_changing_model = False
        self._followers = Followers()
        self._staging = Staging()
        self._activities = Activities()
        self._compaction_failure = ""
        self._compacting: asyncio.Task[None] | None = None
        self._prune_drafts()
        self._compact_after = 0.0
        """Time of the monotonic clock before which the writer does not compact by itself."""

    def close(self) -> None:
        """Let another writer open the folder; writes that have begun are stored first."""
        self._log.close()

    async def check_health(self) -> None:
        """Answer in the loop that answers calls: without this method Serve answers in another one, and would replace a
        writer whose own loop stands still after a quarter of an hour."""

    async def follow(self, poll: Poll) -> News:
        """The answer to a follower; see ``follower.py``."""
        await self._followers.hear(poll, self._log.last, self._explain_conflict(poll))
        return News(
            version=self._followers.version,
            held=self._state.held,
            current=self._state.current,
            last_write=self._log.last,
            since=self._log.since,
            records=tuple(self._log.news_after(poll.last_write)),
        )

    def _explain_conflict(self, poll: Poll) -> str:
        """Return why a follower's writes are not those of this log; empty if they are."""
        if poll.last_write > self._log.last:
            return f"{poll.role} has the writes up to {poll.last_write}, this log has those up to {self._log.last}"
        digest = self._log.digest_at(poll.last_write) if poll.last_digest else ""
        if digest and digest != poll.last_digest:
            return f"{poll.role} has another write {poll.last_write} than this log"
        return ""

    def _check_followers(self) -> None:
        """Refuse changes that followers would pass over, because they have later or other writes than this log."""
        if conflict := self._followers.conflict():
            raise refused(
                f"{conflict}: an older copy of {self._folder} was put in its place while the service ran; stop the "
                "service, restore the newest copy and start it again, or start it again without those writes"
            )

    async def stage(self, upsert: str, place: int, content: bytes) -> None:
        """Keep a portion of an upsert in memory until its last one comes; nothing is stored yet."""
        self._staging.add(upsert, place, content)

    async def upsert(self, content: bytes, upsert: str = "", num_staged: int = 0) -> int:
        """Store an ``UpsertRequest`` whose rows have vectors; return the write's number once it is on the disk.

        Its first portions may have been staged as ``upsert``: all are stored in one transaction, or none.
        """
        contents = [*(self._staging.take(upsert, num_staged) if upsert else ()), content]
        for message in map(pb.UpsertRequest.FromString, contents):
            self._check_upsert(message)
        return await self._store(WriteKind.UPSERT, *contents)

    def _check_upsert(self, message: pb.UpsertRequest) -> None:
        serving = self._state.serving
        if message.model_fingerprint != serving.model_fingerprint:
            raise refused(
                f"the vectors are of model {message.model_fingerprint}, the index of {serving.model_fingerprint}"
            )
        for row in message.rows:
            check_kept(row, read_where(serving.index))
        if self._is_changing_model:
            raise RetrievalError(
                grpc.StatusCode.UNAVAILABLE,
                "an index of another model is being loaded, to which these vectors would be lost; write again once it "
                "is served",
            )

    async def delete(self, content: bytes) -> int:
        """Store a ``DeleteRequest``; return the write's number once it is on the disk."""
        return await self._store(WriteKind.DELETE, content)

    async def _store(self, kind: int, *contents: bytes) -> int:
        self._check_followers()
        if self._pending >= (limit := self._config.writes.max_pending_rows):
            raise RetrievalError(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"{self._pending} rows wait for compaction, the limit is {limit}; compact, or raise "
                "writes.max_pending_rows of the service",
            )
        return await self._log.store(kind, *contents)

    def _stored(self) -> None:
        """Tell the followers, and compact if enough rows wait."""
        self._count_pending()
        self._followers.wake()
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
            self._compaction_failure = str(error)[:500]
            log.warning("not compacted %s", fields(reason=str(error)[:500], again_after_s=COMPACT_PAUSE_S))

    async def switch(self, content: bytes) -> bytes:
        """Serve the index of a ``SwitchRequest``; return the ``Generation`` that answers now."""
        request = pb.SwitchRequest.FromString(content)
        allowed_s = request.timeout_s or SWITCH_S
        async with self._activities.begin("switch", allowed_s) as activity:
            self._check_followers()
            given = (request.index, request.plan or None, request.encoder or None)
            check_below("not switched: artifact", [uri for uri in given if uri not in ("auto", "none")], self._roots)
            if request.HasField("includes_writes") and request.includes_writes > self._log.last:
                raise invalid(f"includes_writes={request.includes_writes} is beyond the last write, {self._log.last}")
            activity.step = f"reads index {request.index}"
            try:
                includes = request.includes_writes
                if not request.HasField("includes_writes"):
                    includes = await asyncio.to_thread(held_writes, request.index, self._folder)
                check_includes(request.index, includes, self._log.first, self._state.serving.index)
                plan, encoder = request.plan or None, request.encoder or "auto"
                generation = await asyncio.to_thread(
                    read_generation, request.index, plan, encoder, includes_writes=includes
                )
            except (LookalikeError, OSError) as error:
                raise refused(f"not switched: {error}") from None
            check_below("not switched: encoder", [generation.encoder], self._roots)
            with self._changing_model(generation.meta.model_fingerprint):
                await self._log.settle()  # no write with vectors can arrive after the check
                self._check_writes(generation)
                ref = GenerationRef.of(generation)
                return _message(await self._serve(ref, allowed_s - activity.seconds, activity))

    def _check_writes(self, generation: Generation) -> None:
        """Refuse another model while writes with vectors of the old one would be lost to it."""
        if lost := count_foreign(self._log.after(generation.includes_writes), generation.meta.model_fingerprint):
            raise refused(
                f"not switched: {lost} written rows have vectors of another model than index {generation.index}; embed "
                "them for it and set includes_writes to the last write that it then holds"
            )

    @contextmanager
    def _changing_model(self, model: str) -> Iterator[None]:
        """Refuse vectors while an index of a different model is being loaded."""
        self._is_changing_model = model != self._state.serving.model_fingerprint
        try:
            yield
        finally:
            self._is_changing_model = False

    async def rollback(self) -> bytes:
        """Serve the previous generation again."""
        async with self._activities.begin("rollback", SWITCH_S) as activity:
            self._check_followers()
            previous = self._state.find(self._state.previous)
            if previous is None:
                raise refused("there is no previous index to roll back to")
            return _message(await self._serve(previous, SWITCH_S, activity))

    async def _serve(self, ref: GenerationRef, timeout_s: float, activity: Activity) -> GenerationRef:
        """Have all followers load ``ref``, then let it answer; if that fails, everything stays as it was."""
        if ref == self._state.serving:
            return ref
        activity.step = f"waits until all replicas have loaded index {ref.name}"
        with self._changing_model(ref.model_fingerprint):
            return await self._load_and_move(ref, time.monotonic() + timeout_s)

    async def _load_and_move(self, ref: GenerationRef, deadline: float) -> GenerationRef:
        before = self._state
        await self._log.remember(ref.includes_writes)
        await self._set(before.holding(ref))
        try:
            await self._followers.wait_to_hold(ref, deadline)
        except BaseException:
            await self._set(before)
            raise
        await self._set(self._state.serving_now(ref.name))
        try:
            await self._followers.wait_to_know(ref, deadline)
        finally:
            await self._set(self._state.trimmed())
        log.info("switched %s", fields(index=ref.index, generation=ref.name, includes_writes=ref.includes_writes))
        return ref

    async def _set(self, state: State) -> None:
        try:
            await self._log.save_state(state)
        except (LookalikeError, OSError) as error:
            raise RetrievalError(grpc.StatusCode.UNAVAILABLE, f"the state could not be stored ({error})") from None
        self._state = state
        self._count_pending()
        self._followers.announce()

    async def compact(self, timeout_s: float) -> bytes:
        """Build an index that holds all writes so far, and serve it."""
        allowed_s = timeout_s or COMPACT_S
        async with self._activities.begin("compaction", allowed_s) as activity:
            self._check_followers()
            serving, last = self._state.serving, self._log.last
            records = self._log.after(serving.includes_writes, last)
            if not records:
                return _message(serving)
            if foreign := count_foreign(records, serving.model_fingerprint):
                raise refused(
                    f"not compacted: {foreign} written rows have vectors of another model than the index; serve an "
                    "index of that model"
                )
            activity.step = f"builds an index with the writes up to {last}"
            generation = await self._compact(records, allowed_s, activity)
            try:
                ref = await self._serve(GenerationRef.of(generation), allowed_s, activity)
            except RetrievalError as error:
                raise RetrievalError(
                    error.code, f"{error.message}; index {generation.index} holds all writes"
                ) from None
            self._compaction_failure = ""
            activity.step = "removes what earlier ones made"
            await self._prune()
            return _message(ref)

    async def _compact(self, records: Sequence[WriteRecord], allowed_s: float, activity: Activity) -> Generation:
        serving, last = self._state.serving, records[-1].number
        try:
            left_s = allowed_s - activity.seconds
            index = await asyncio.wait_for(compact_in_task(serving.index, records, self._folder), left_s)
            return await asyncio.to_thread(
                read_generation, index, serving.plan, serving.encoder or "none", includes_writes=last, check=False
            )
        except TimeoutError:
            raise RetrievalError(
                grpc.StatusCode.DEADLINE_EXCEEDED,
                f"not compacted in {allowed_s:g} s; nothing has changed, and the next attempt goes on from there",
            ) from None
        except Exception as error:
            await asyncio.to_thread(self._prune_drafts)
            if isinstance(error, (LookalikeError, OSError)) and not isinstance(error, RetrievalError):
                raise refused(f"not compacted: {error}") from None
            raise

    def _prune_drafts(self) -> None:
        try:
            prune_drafts(self._folder, [ref.index for ref in self._state.held])
        except OSError as error:  # the next start or failure tries again
            log.warning("drafts not pruned %s", fields(folder=self._folder, error=repr(error)[:200]))

    async def _prune(self) -> None:
        await asyncio.to_thread(self._prune_drafts)
        keep_hours, held = self._config.writes.keep_hours, [ref.index for ref in self._state.held]
        if keep_hours is not None:
            try:
                await asyncio.to_thread(prune, self._folder, held, keep_hours * 3600)
            except OSError as error:  # the next compaction tries again
                log.warning("not pruned %s", fields(folder=self._folder, error=repr(error)[:200]))

    async def backup(self, target: str) -> int:
        """Copy the writes and the state to the new file ``target``; return the number of the last write in it."""
        async with self._activities.begin("backup", SWITCH_S) as activity:  # no compaction runs during the copy
            check_below("no backup was made:", [target], backup_roots(self._config))
            activity.step = f"copies to {target}"
            try:
                return await self._log.backup(target)
            except (LookalikeError, OSError) as error:
                raise refused(f"no backup was made: {error}") from None

    async def status(self) -> bytes:
        """A ``StatusResponse``."""
        state = self._state
        response = pb.StatusResponse(
            generations=[_generation(ref) for ref in state.held],
            current=state.current,
            previous=state.previous or "",
            last_write=self._log.last,
            pending_rows=self._pending,
            followers=self._followers.count(state.serving),
            activities=self._activities.messages(),
            compaction_failure=self._compaction_failure,
        )
        return bytes(response.SerializeToString())


def _message(ref: GenerationRef) -> bytes:
    return bytes(_generation(ref).SerializeToString())


def _generation(ref: GenerationRef) -> pb.Generation:
    return pb.Generation(**{**ref.model_dump(), "plan": ref.plan or "", "encoder": ref.encoder or ""})
