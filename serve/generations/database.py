"""The database of a service: its writes and its state in one SQLite file, ``writes.sqlite``.

A write is acknowledged when its transaction is synced (write-ahead log, ``synchronous=FULL``). One process opens the
file at a time (``lock``), with ``locking_mode=EXCLUSIVE``: SQLite then needs no memory shared between processes. Each
write has a digest, so that a damaged one is named; ``acknowledged`` knows the last one, so that a missing one is.
``writes.sqlite-wal`` belongs to the file while it is in use or was not closed; copies of the two from different moments
are refused.
"""

import os
import sqlite3
import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from pydantic import ValidationError

from lookalike import storage
from lookalike.errors import ArtifactError, LookalikeError
from lookalike.serve.generations import acknowledged, connection
from lookalike.serve.generations.acknowledged import NOTHING, Acknowledged, AcknowledgedFile
from lookalike.serve.generations.backup import copy_database
from lookalike.serve.generations.connection import FULL, checkpoint, error_name, explained, hold_lock
from lookalike.serve.generations.database_files import (
    FILE,
    FileMark,
    check_files,
    damage,
    marks,
    refuse_old_form,
    same_files,
    wal_of,
)
from lookalike.serve.generations.reserve import Reserve
from lookalike.serve.generations.state import State
from lookalike.serve.generations.write_record import WriteKind, WriteRecord, digest_of
from lookalike.telemetry import fields, get_logger

log = get_logger(__name__)
KEPT_WRITES = 100
"""Newest writes that are kept although every held generation includes them: an operator may still correct what an index
was said to include. At least one, which says how many writes there were."""


class UncertainError(LookalikeError):
    """A write failed, and so did taking it back: until the disk works again it may or may not be stored."""


class Database:
    """The database in ``folder``, for one process at a time. Calls must not overlap.

    Raises ``UsageError`` if another process has it open for over ``wait_s`` seconds, and ``ArtifactError`` for damage.
    """

    def __init__(self, folder: str, *, wait_s: float = 30.0) -> None:
        self.path = Path(folder, FILE)
        refuse_old_form(self.path.parent)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        resources = ExitStack()
        self.close = weakref.finalize(self, resources.close)
        """Mark the file as closed and let others open it; called by itself at the latest when the process ends."""
        try:
            resources.enter_context(hold_lock(self.path.with_name("lock"), wait_s))
            self._open(resources)
        except BaseException:
            self.close()
            raise
        self._is_complete = False
        """Whether ``check_complete`` has passed."""
        self._suspicion = ""
        """Why the files are to be compared with what was acknowledged before the next change; empty: they need not."""

    def _open(self, resources: ExitStack) -> None:
        is_torn = check_files(self.path)
        self._connection = connection.connect(self.path)
        self._files = marks(self.path)
        """The files as they were left."""
        opened = list(self._files)
        resources.callback(connection.close, self._connection, self.path, opened)
        self._reserve = Reserve(self.path.parent)
        try:
            self._with_reserve(lambda: self._prepare(is_torn))
        finally:
            self._files = opened[:] = marks(self.path)
        self._read_ends()
        self._with_reserve(lambda: self._open_acknowledged(resources))

    def _prepare(self, is_torn: bool) -> None:
        with explained(self.path):
            connection.prepare(self._connection)
            try:
                checkpoint(self._connection)
            except sqlite3.OperationalError:  # a full disk: the log can go on from its end, if that is clean
                if is_torn:
                    raise
        storage.sync_directory(str(self.path.parent))

    def _read_ends(self) -> None:
        with explained(self.path):
            first, last = self._connection.execute("SELECT min(number), max(number) FROM writes").fetchone()
            row = self._connection.execute("SELECT digest FROM writes WHERE number = ?", (last,)).fetchone()
            state = self._connection.execute("SELECT digest FROM state").fetchone()
        self.first: int = first or 1
        """Number of the oldest write that is kept."""
        self.last: int = last or 0
        """Number of the last write."""
        self._last_digest: bytes = row[0] if row else NOTHING
        self._state_digest: bytes = state[0] if state else NOTHING

    def _open_acknowledged(self, resources: ExitStack) -> None:
        self._acknowledged = AcknowledgedFile(self.path.parent, self._found())
        resources.callback(self._acknowledged.close)

    def _found(self) -> Acknowledged:
        return Acknowledged(self.last, self._last_digest, self._state_digest, self._state_digest)

    def check_complete(self) -> None:
        """Raise ``ArtifactError`` if writes, or a change of the state, that were acknowledged are not there."""
        known, path = self._acknowledged.value, self.path.with_name(acknowledged.FILE)
        if known.number > self.last:
            raise self._incomplete(f"has the writes up to {self.last}, those up to {known.number} were acknowledged")
        with explained(self.path):
            row = self._connection.execute("SELECT digest FROM writes WHERE number = ?", (known.number,)).fetchone()
        if row is not None and row[0] != known.digest:
            raise self._incomplete(f"has another write {known.number} than the one that {path.name} says")
        if self._state_digest not in (known.state, known.next_state):
            raise self._incomplete(f"has another state than the one that {path.name} says")
        self._is_complete = True
        self._acknowledge()

    def _incomplete(self, what: str) -> ArtifactError:
        return ArtifactError(
            f"{self.path} {what}: it is older, cut short, or of another service; restore the newest copy of the "
            "folder, or a newer backup; to go on with what there is, and without the rest, remove "
            f"{self.path.with_name(acknowledged.FILE)}"
        )

    def append(self, writes: Sequence[tuple[int, bytes]]) -> int:
        """Store writes (kind, content) in one transaction and return the number of the last; all of them or none.

        Raises ``UncertainError`` if it failed in a way that may leave them stored.
        """
        is_upsert = any(kind == WriteKind.UPSERT for kind, _ in writes)
        if is_upsert and not self._reserve.is_full and not self._reserve.fill():
            raise LookalikeError(
                f"the disk of {self.path} is full, what is left is for deletes and switches; free some space"
            )
        records = [WriteRecord(number, kind, data) for number, (kind, data) in enumerate(writes, self.last + 1)]
        rows = [(*record, record.digest) for record in records]

        def insert() -> None:
            self._connection.executemany("INSERT INTO writes VALUES (?, ?, ?, ?)", rows)

        if is_upsert:
            self._change(insert)
        else:
            self._with_reserve(lambda: self._change(insert))
        self.last += len(records)
        self._last_digest = rows[-1][-1]
        self._acknowledge()
        return self.last

    def read(self, after: int = 0) -> list[WriteRecord]:
        """The writes with larger numbers than ``after``, in order; ``ArtifactError`` names one that is damaged."""
        records: list[WriteRecord] = []
        with explained(self.path):
            rows = self._connection.execute(
                "SELECT number, kind, content, digest FROM writes WHERE number > ? ORDER BY number", (after,)
            )
            for number, kind, content, digest in rows:
                record = WriteRecord(number, kind, content)
                if number != after + len(records) + 1:
                    raise damage(self.path, f"write {after + len(records) + 1} is missing")
                if record.digest != digest:
                    raise damage(self.path, f"write {number} does not match its digest")
                records.append(record)
        return records

    def load_state(self) -> State | None:
        """The state, or None before the first is saved."""
        with explained(self.path):
            row = self._connection.execute("SELECT content, digest FROM state").fetchone()
        if row is None:
            return None
        try:
            if digest_of(row[0].encode()) != row[1]:
                raise ValueError("it does not match its digest")
            return State.model_validate_json(row[0])
        except (ValueError, ValidationError) as error:
            raise damage(self.path, f"the state: {str(error).splitlines()[0]}") from None

    def save_state(self, state: State) -> None:
        """Store ``state``, and forget the writes that every held generation includes, in one transaction.

        A state that is stored already takes no write. Raises as ``append``.
        """
        content = state.model_dump_json()
        digest, included = digest_of(content.encode()), min(state.includes_writes, self.last - KEPT_WRITES)
        if digest == self._state_digest and included < self.first and not self._suspicion:
            return
        known = self._acknowledged.value
        self._acknowledged.write(known._replace(state=self._state_digest, next_state=digest), sync=True)

        def replace() -> None:
            self._connection.execute("INSERT OR REPLACE INTO state VALUES (1, ?, ?)", (content, digest))
            self._connection.execute("DELETE FROM writes WHERE number <= ?", (included,))

        self._with_reserve(lambda: self._change(replace))
        self._state_digest, self.first = digest, max(self.first, included + 1)
        self._acknowledge()

    def _acknowledge(self) -> None:
        """Note what is stored in the second place; if that fails, it stays behind, and says less."""
        value = self._found()
        if value != self._acknowledged.value._replace(turn=0):
            try:
                self._acknowledged.write(value)
            except OSError as error:
                log.warning("not noted %s", fields(file=acknowledged.FILE, number=self.last, error=repr(error)[:200]))

    def backup(self, target: str) -> int:
        """Copy the database to the new file ``target`` and return the number of the last write in it."""
        copy_database(self._connection, Path(target))
        return self.last

    def _change(self, work: Callable[[], object]) -> None:
        """Run ``work`` in a transaction. It counts only while the files stand in their folder, as they were left."""
        before = self._check_present()
        if not self._is_complete:
            self.check_complete()
        if self._suspicion or before != self._files:
            self._settle()
        try:
            self._files = self._transact(work)
        except (LookalikeError, OSError) as error:
            if same_files(now := marks(self.path), self._files):
                self._files = now
            if not self._suspicion:
                raise
            try:
                self._settle()
            except (LookalikeError, OSError) as reason:
                log.error("not settled %s", fields(file=str(self.path), reason=str(reason)[:500]))
                raise UncertainError(str(error)) from error
            raise

    def _transact(self, work: Callable[[], object]) -> list[FileMark | None]:
        execute = self._connection.execute
        with explained(self.path):
            execute("BEGIN IMMEDIATE")
            try:
                work()
                self._check_present()
                self._suspicion = "a commit failed"
                execute("COMMIT")
                after = self._check_present()
                self._suspicion = ""
            except BaseException as error:
                with suppress(sqlite3.Error):
                    if self._connection.in_transaction:
                        execute("ROLLBACK")
                    if error_name(error) == FULL:  # then its last frame, which commits, was not written
                        self._suspicion = ""
                        checkpoint(self._connection)  # may give back what the frames before took
                raise
        return after

    def _settle(self) -> None:
        """See that the files hold what was acknowledged, and nothing else, after a failure or a change from outside.

        A page whose sync failed may stand in memory alone: the log is emptied by what was synced before, and read anew.
        """
        self._check_present()
        execute = self._connection.execute
        with explained(self.path):
            if self._connection.in_transaction:
                execute("ROLLBACK")
            execute("PRAGMA shrink_memory")
            if marks(self.path) != self._files:
                log.warning("compared %s", fields(file=str(self.path), reason="another program changed it"))
                try:
                    self._compare_all()
                except (LookalikeError, sqlite3.Error) as error:
                    raise self._replaced() from error
            checkpoint(self._connection)
            _sync(wal_of(self.path))
            if execute("SELECT max(number) FROM writes").fetchone()[0] not in (None, self.last):
                execute("DELETE FROM writes WHERE number > ?", (self.last,))
            row = execute("SELECT digest FROM writes WHERE number = ?", (self.last,)).fetchone()
            state = execute("SELECT digest FROM state").fetchone()
        if (row[0] if row else NOTHING) != self._last_digest or (state[0] if state else NOTHING) != self._state_digest:
            raise self._replaced()
        self._files, self._suspicion = marks(self.path), ""

    def _compare_all(self) -> None:
        if self._connection.execute("PRAGMA quick_check(1)").fetchone()[0] != "ok":
            raise self._replaced()
        records = self.read(self.first - 1)
        if len(records) != self.last - self.first + 1 and self.last:
            raise self._replaced()

    def _check_present(self) -> list[FileMark | None]:
        if not same_files(now := marks(self.path), self._files):
            raise self._replaced()
        return now

    def _replaced(self) -> FileNotFoundError:
        return FileNotFoundError(
            f"{self.path} or its -wal file was removed or replaced while the service wrote to it; compact, which "
            "keeps what it held, and serve the new index with a new folder as writes.state"
        )

    def _with_reserve(self, work: Callable[[], None]) -> None:
        """Do ``work``; if the disk is full, once more with the reserve."""
        try:
            work()
        except (LookalikeError, OSError) as error:
            if not _is_of_the_disk(error) or not self._reserve.release():
                raise
            log.warning("reserve used %s", fields(folder=str(self.path.parent), reason=str(error)[:200]))
            work()


def _is_of_the_disk(error: BaseException) -> bool:
    return isinstance(error, OSError) or error_name(error.__cause__).startswith(
        (FULL, "SQLITE_IOERR", "SQLITE_CANTOPEN")
    )


def _sync(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
