"""The database of a service: its writes and its state in one SQLite file, ``writes.sqlite``.

A write is acknowledged when its transaction is synced (write-ahead log, ``synchronous=FULL``). One process opens the
file at a time (``lock``), with ``locking_mode=EXCLUSIVE``: SQLite then needs no memory shared between processes. Each
write has a digest, so that a damaged one is named. ``writes.sqlite-wal`` belongs to the file while it is in use or was
not closed; copies of the two from different moments are refused.
"""

import os
import sqlite3
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from pydantic import ValidationError

from lookalike import storage
from lookalike.errors import LookalikeError, UsageError
from lookalike.serve.generations.database_files import (
    FILE,
    FORMAT,
    Usage,
    check_files,
    damage,
    refuse_old_form,
    wal_of,
)
from lookalike.serve.generations.state import State
from lookalike.serve.generations.write_record import WriteRecord, digest_of

SCHEMA = (
    "CREATE TABLE writes (number INTEGER PRIMARY KEY, kind INTEGER NOT NULL, content BLOB NOT NULL,"
    " digest BLOB NOT NULL)",
    "CREATE TABLE state (id INTEGER PRIMARY KEY CHECK (id = 1), content TEXT NOT NULL, digest BLOB NOT NULL)",
    f"PRAGMA application_id={FORMAT}",
)
WAL_BYTES = 64 << 20
"""Size to which SQLite cuts its write-ahead log after it has grown."""
KEPT_WRITES = 100
"""Newest writes that are kept although every held generation includes them: an operator may still correct what an index
was said to include. At least one, which says how many writes there were."""


class Database:
    """The database in ``folder``, for one process at a time. Calls must not overlap.

    Raises ``UsageError`` if another process has it open for over ``wait_s`` seconds, and ``ArtifactError`` for damage.
    """

    def __init__(self, folder: str, *, wait_s: float = 30.0) -> None:
        self.path = Path(folder, FILE)
        refuse_old_form(self.path.parent)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lock = _hold_lock(self.path.with_name("lock"), wait_s)
        try:
            check_files(self.path)
            with _explained(self.path):
                self._connection = sqlite3.connect(self.path, timeout=0, isolation_level=None, check_same_thread=False)
        except BaseException:
            lock.close()
            raise
        self.close = weakref.finalize(self, _close, self._connection, lock)
        """Mark the file as closed and let others open it; called by itself at the latest when the process ends."""
        try:
            with _explained(self.path):
                self._prepare()
        except BaseException:
            self.close()
            raise
        self._files = self._identify()
        with _explained(self.path):
            first, last = self._connection.execute("SELECT min(number), max(number) FROM writes").fetchone()
        self.first = first or 1
        """Number of the oldest write that is kept."""
        self.last = last or 0
        """Number of the last write."""

    def _prepare(self) -> None:
        execute = self._connection.execute
        execute("PRAGMA locking_mode=EXCLUSIVE")
        if (mode := execute("PRAGMA journal_mode=WAL").fetchone()[0]) != "wal":
            raise sqlite3.OperationalError(f"journal_mode stays {mode}")
        execute("PRAGMA synchronous=FULL")
        execute(f"PRAGMA journal_size_limit={WAL_BYTES}")
        if (problem := execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
            raise sqlite3.DatabaseError(problem)
        with self._transaction():
            if not execute("PRAGMA application_id").fetchone()[0]:
                for statement in SCHEMA:
                    execute(statement)
            execute(f"PRAGMA user_version={Usage.IN_USE}")
        execute("PRAGMA wal_checkpoint(TRUNCATE)")  # so that the file itself says that a log belongs to it
        storage.sync_directory(str(self.path.parent))

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._connection.execute("COMMIT")
        except BaseException:
            with suppress(sqlite3.Error):
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # drops frames that were not synced
            raise

    def append(self, writes: Sequence[tuple[int, bytes]]) -> int:
        """Store writes (kind, content) in one transaction and return the number of the last; all of them or none."""
        records = [WriteRecord(number, kind, data) for number, (kind, data) in enumerate(writes, self.last + 1)]
        with self._changes():
            self._connection.executemany(
                "INSERT INTO writes VALUES (?, ?, ?, ?)", ((*record, record.digest) for record in records)
            )
        self.last += len(records)
        return self.last

    def read(self, after: int = 0) -> list[WriteRecord]:
        """The writes with larger numbers than ``after``, in order; ``ArtifactError`` names one that is damaged."""
        records: list[WriteRecord] = []
        with _explained(self.path):
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
        with _explained(self.path):
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
        """Store ``state``, and forget the writes that every held generation includes, in one transaction."""
        content = state.model_dump_json()
        with self._changes():
            self._connection.execute(
                "INSERT OR REPLACE INTO state VALUES (1, ?, ?)", (content, digest_of(content.encode()))
            )
            included = min(state.includes_writes, self.last - KEPT_WRITES)
            self._connection.execute("DELETE FROM writes WHERE number <= ?", (included,))
            (first,) = self._connection.execute("SELECT min(number) FROM writes").fetchone()
        self.first = first or 1

    def backup(self, target: str) -> int:
        """Copy the database to the new file ``target`` and return the number of the last write in it.

        The file is whole or not there; a folder that holds it alone, as ``writes.sqlite``, is a folder to start from.
        """
        path = Path(target)
        if path.exists():
            raise UsageError(f"{path} exists; name a new file for the backup")
        part = path.with_name(path.name + storage.TEMPORARY)
        part.unlink(missing_ok=True)
        try:
            self._copy_to(part)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
        storage.sync_directory(str(path.parent))
        return self.last

    def _copy_to(self, path: Path) -> None:
        with _explained(path):
            copy = sqlite3.connect(path, isolation_level=None)
            try:
                copy.execute("PRAGMA locking_mode=EXCLUSIVE")
                self._connection.backup(copy)
                copy.execute("PRAGMA journal_mode=DELETE")  # in one file, without a log
                copy.execute(f"PRAGMA user_version={Usage.CLOSED}")
            finally:
                copy.close()

    @contextmanager
    def _changes(self) -> Iterator[None]:
        """A transaction that counts only while the files still stand in their folder: no later start finds others."""
        with _explained(self.path):
            self._check_present()
            with self._transaction():
                yield
                self._check_present()
            self._check_present()

    def _check_present(self) -> None:
        if self._identify() != self._files:
            raise FileNotFoundError(
                f"{self.path} or its -wal file was removed or replaced while the service wrote to it; compact, which "
                "keeps what it held, and serve the new index with a new folder as writes.state"
            )

    def _identify(self) -> list[tuple[int, int] | None]:
        marks: list[tuple[int, int] | None] = []
        for path in (self.path, wal_of(self.path)):
            try:
                status = os.stat(path)
                marks.append((status.st_dev, status.st_ino))
            except FileNotFoundError:
                marks.append(None)
        return marks


def _close(connection: sqlite3.Connection, lock: IO[bytes]) -> None:
    with suppress(sqlite3.Error):
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # makes room for the mark on a full disk
        connection.execute(f"PRAGMA user_version={Usage.CLOSED}")
    connection.close()
    lock.close()


def _hold_lock(path: Path, wait_s: float) -> IO[bytes]:
    deadline = time.monotonic() + wait_s
    while True:
        try:
            if (lock := storage.try_lock(path)) is not None:
                return lock
        except OSError as error:
            raise UsageError(
                f"{path} cannot be locked ({error}); give writes.state a folder on a disk that has file locks (flock)"
            ) from None
        if time.monotonic() > deadline:
            raise UsageError(
                f"another service writes to {path.parent}; stop it, or give this service its own folder as writes.state"
            )
        time.sleep(0.1)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Raise SQLite's errors as ours: what, where, remedy."""
    try:
        yield
    except sqlite3.OperationalError as error:  # the database is sound; the disk, or another process, is in the way
        remedies = {
            "SQLITE_BUSY": "another program has it open: end that",
            "SQLITE_FULL": "free some space",
            "SQLITE_READONLY": "allow writing to the folder",
            "SQLITE_CANTOPEN": "allow writing to the folder",
        }
        name = "_".join(getattr(error, "sqlite_errorname", "").split("_")[:2])
        remedy = remedies.get(name, "see that the disk has space, takes writes and locks files")
        raise LookalikeError(f"{path}: {error}; {remedy}") from error
    except sqlite3.DatabaseError as error:
        raise damage(path, str(error).splitlines()[-1]) from error
