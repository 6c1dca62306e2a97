"""Opening and closing of the SQLite file, one process at a time, and its errors in our words."""

import os
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from lookalike import storage
from lookalike.errors import LookalikeError, UsageError
from lookalike.serve.generations.database_files import (
    FORMAT,
    USER_VERSION,
    FileMark,
    Usage,
    damage,
    marks,
    same_files,
    wal_of,
)

SCHEMA = (
    "CREATE TABLE writes (number INTEGER PRIMARY KEY, kind INTEGER NOT NULL, content BLOB NOT NULL,"
    " digest BLOB NOT NULL)",
    "CREATE TABLE state (id INTEGER PRIMARY KEY CHECK (id = 1), content TEXT NOT NULL, digest BLOB NOT NULL)",
    f"PRAGMA application_id={FORMAT}",
)
WAL_BYTES = 64 << 20
"""Size to which SQLite cuts its write-ahead log after it has grown."""
FULL = "SQLITE_FULL"


def connect(path: Path) -> sqlite3.Connection:
    """A connection to the database; it has read nothing yet."""
    with explained(path):
        return sqlite3.connect(path, timeout=0, isolation_level=None, check_same_thread=False)


def prepare(connection: sqlite3.Connection) -> None:
    """Make the file ours. What an earlier process left in use is used as it is, so this takes no write."""
    execute = connection.execute
    execute("PRAGMA locking_mode=EXCLUSIVE")
    if (mode := execute("PRAGMA journal_mode=WAL").fetchone()[0]) != "wal":
        raise sqlite3.OperationalError(f"journal_mode stays {mode}")
    execute("PRAGMA synchronous=FULL")
    execute("PRAGMA cell_size_check=ON")
    execute("PRAGMA secure_delete=OFF")  # it would write what it deletes once more
    execute(f"PRAGMA journal_size_limit={WAL_BYTES}")
    if (problem := execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
        raise sqlite3.DatabaseError(problem)
    if execute("PRAGMA user_version").fetchone()[0] != Usage.IN_USE:
        _mark_in_use(connection)


def _mark_in_use(connection: sqlite3.Connection) -> None:
    execute = connection.execute
    execute("BEGIN IMMEDIATE")
    try:
        if not execute("PRAGMA application_id").fetchone()[0]:
            for statement in SCHEMA:
                execute(statement)
        execute(f"PRAGMA user_version={Usage.IN_USE}")
        execute("COMMIT")
    except BaseException:
        with suppress(sqlite3.Error):
            execute("ROLLBACK")
        raise
    checkpoint(connection)  # so that the file itself says that a log belongs to it


def checkpoint(connection: sqlite3.Connection) -> None:
    """Copy the log into the database and empty it, which drops what was not committed."""
    if connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]:
        raise sqlite3.OperationalError("the log could not be emptied")


def close(connection: sqlite3.Connection, path: Path, opened: Sequence[FileMark | None]) -> None:
    """Mark the file as closed. Files in the place of those that were ``opened`` stay as they are."""
    is_ours, is_marked, wal = same_files(marks(path), opened), False, wal_of(path)
    if is_ours:
        with suppress(sqlite3.Error):
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # makes room for the mark on a full disk
            connection.execute(f"PRAGMA user_version={Usage.CLOSED}")
            is_marked = True
    kept = wal.with_name(wal.name + ".kept")
    if not is_marked:  # SQLite removes the log by its name; a file in use must have one
        with suppress(OSError):
            os.link(wal, kept)
    connection.close()
    with suppress(OSError):
        if kept.exists():
            kept.rename(wal)
        elif is_ours and not wal.exists():
            _mark_closed(path)


def _mark_closed(path: Path) -> None:
    """The same mark in place, without SQLite: for a disk on which that found no space. Nobody else has it open."""
    with path.open("r+b") as file:
        header = file.read(100)
        if header[USER_VERSION] == Usage.IN_USE.to_bytes(4, "big"):
            file.seek(USER_VERSION.start)
            file.write(Usage.CLOSED.to_bytes(4, "big"))
            file.flush()
            os.fsync(file.fileno())


def hold_lock(path: Path, wait_s: float) -> IO[bytes]:
    """Lock the folder; ``UsageError`` if another process has it for over ``wait_s`` seconds."""
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
def explained(path: Path) -> Iterator[None]:
    """Raise SQLite's errors as ours: what, where, remedy."""
    try:
        yield
    except sqlite3.OperationalError as error:  # the database is sound; the disk, or another process, is in the way
        remedies = {
            "SQLITE_BUSY": "another program has it open: end that",
            FULL: "free some space",
            "SQLITE_READONLY": "allow writing to the folder",
            "SQLITE_CANTOPEN": "allow writing to the folder",
        }
        name = "_".join(error_name(error).split("_")[:2])
        is_no_text = "decode to UTF-8" in str(error)  # Python's own, without a name
        if name == "SQLITE_ERROR" or is_no_text:  # our statements are sound: it is the schema that is not
            raise damage(path, str(error)) from error
        remedy = remedies.get(name, "see that the disk has space, takes writes and locks files")
        raise LookalikeError(f"{path}: {error}; {remedy}") from error
    except sqlite3.DatabaseError as error:
        raise damage(path, str(error).splitlines()[-1]) from error


def error_name(error: BaseException | None) -> str:
    """SQLite's name of the error, such as ``SQLITE_FULL``; empty if it is none of SQLite's."""
    return str(getattr(error, "sqlite_errorname", ""))
