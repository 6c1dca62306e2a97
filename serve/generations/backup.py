"""A copy of the database in one file, made while it is open."""

import sqlite3
from pathlib import Path

from lookalike import storage
from lookalike.errors import UsageError
from lookalike.serve.generations.connection import explained
from lookalike.serve.generations.database_files import Usage


def copy_database(source: sqlite3.Connection, path: Path) -> None:
    """Copy ``source`` to the new file ``path``, which is then whole, or not there.

    A folder that holds it alone, as ``writes.sqlite``, is a folder to start from.
    """
    if path.exists():
        raise UsageError(f"{path} exists; name a new file for the backup")
    part = path.with_name(path.name + storage.TEMPORARY)
    part.unlink(missing_ok=True)
    try:
        _copy(source, part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    storage.sync_directory(str(path.parent))


def _copy(source: sqlite3.Connection, path: Path) -> None:
    with explained(path):
        copy = sqlite3.connect(path, isolation_level=None)
        try:
            copy.execute("PRAGMA locking_mode=EXCLUSIVE")
            source.backup(copy)
            copy.execute("PRAGMA journal_mode=DELETE")  # in one file, without a log
            copy.execute(f"PRAGMA user_version={Usage.CLOSED}")
        finally:
            copy.close()
