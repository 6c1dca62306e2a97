"""Faults planted into the service, to see that the machine finds them: each breaks one promise of the write path."""

import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from unittest.mock import patch

from lookalike.serve.generations import connection, database, followers
from lookalike.serve.generations.database import Database
from lookalike.serve.generations.write_record import WriteRecord


@contextmanager
def skipped_sync() -> Iterator[None]:
    """Commits are not synced."""
    prepare = connection.prepare

    def fast(opened: sqlite3.Connection) -> None:
        prepare(opened)
        opened.execute("PRAGMA synchronous=OFF")

    with patch.object(connection, "prepare", fast):
        yield


@contextmanager
def broken_atomicity() -> Iterator[None]:
    """Each portion is stored alone."""
    append = Database.append

    def each(self: Database, writes: Sequence[tuple[int, bytes]]) -> int:
        return [append(self, [write]) for write in writes][-1]

    with patch.object(Database, "append", each):
        yield


@contextmanager
def reused_numbers() -> Iterator[None]:
    """The last write may be forgotten, so that a start counts from 1 again."""

    def forget(self: Database) -> None:
        self._connection.execute("DELETE FROM writes WHERE number < ?", (self.last - 2,))
        self._connection.execute("UPDATE writes SET number = number - 1 WHERE number > 1")

    with patch.object(Database, "check_complete", forget):
        yield


@contextmanager
def unchecked_digests() -> Iterator[None]:
    """Writes are read as they are found."""
    with patch.object(WriteRecord, "digest", property(lambda self: EQUAL)):
        yield


class _Equal(bytes):
    def __eq__(self, other: object) -> bool:
        return True

    def __ne__(self, other: object) -> bool:
        return False

    __hash__ = bytes.__hash__


EQUAL = _Equal(16)


@contextmanager
def forgotten_acknowledgements() -> Iterator[None]:
    """A start does not ask what was acknowledged."""

    def complete(self: Database) -> None:
        self._is_complete = True
        self._acknowledge()

    with patch.object(Database, "check_complete", complete):
        yield


@contextmanager
def unseen_replacement() -> Iterator[None]:
    """Writes go into whatever file is open."""
    with (
        patch.object(Database, "_check_present", lambda self: []),
        patch.object(database, "marks", lambda path: []),
        patch.object(connection, "marks", lambda path: []),
    ):
        yield


@contextmanager
def unsettled_failures() -> Iterator[None]:
    """After a sync that failed the next write goes on as if nothing had happened."""

    def settle(self: Database) -> None:
        self._suspicion = ""

    with patch.object(Database, "_settle", settle):
        yield


@contextmanager
def trusted_followers() -> Iterator[None]:
    """Nobody asks whether followers know more than the log."""
    with patch.object(followers.Followers, "conflict", lambda self: ""):
        yield


@contextmanager
def early_acknowledgement() -> Iterator[None]:
    """Writes are acknowledged before they are stored."""
    change = Database._change  # noqa: SLF001

    def lax(self: Database, work: Callable[[], object]) -> None:
        try:
            change(self, work)
        except database.LookalikeError:
            return

    with patch.object(Database, "_change", lax):
        yield


PLANTS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    each.__name__: each
    for each in (
        skipped_sync,
        broken_atomicity,
        reused_numbers,
        unchecked_digests,
        forgotten_acknowledgements,
        unseen_replacement,
        unsettled_failures,
        trusted_followers,
        early_acknowledgement,
    )
}
