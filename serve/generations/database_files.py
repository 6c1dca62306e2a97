"""The files of the database, looked at before SQLite opens them: do they belong together, and is the log sound?

SQLite takes its write-ahead log to end at the first frame that is not sound, as after a crash, and drops the rest: a
flipped bit would silently take back acknowledged writes. But a crash breaks only the last transaction, since the one
before was synced when the last began. So a log that breaks before its last transaction is damaged. Formats:
https://www.sqlite.org/fileformat2.html
"""

import os
import struct
from collections.abc import Sequence
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

from lookalike.errors import ArtifactError, UsageError

FILE = "writes.sqlite"
FORMAT = 0x6C6B6101
"""``application_id`` of the file; the last byte is the version of this format."""
MAGIC = b"SQLite format 3\0"
ROLLBACK, WITH_LOG = b"\1\1", b"\2\2"
"""Bytes 18 and 19 of a file in rollback mode, as a backup is, and of one with a write-ahead log."""
USER_VERSION = slice(60, 64)
"""Where the file says whether it is in use."""
HEADER_BYTES = 32
FRAME_HEADER_BYTES = 24


class Usage(IntEnum):
    """``user_version`` of the file: whether a write-ahead log belongs to it."""

    CLOSED = 1
    IN_USE = 2


def wal_of(path: Path) -> Path:
    """The write-ahead log of the database at ``path``."""
    return path.with_name(path.name + "-wal")


class FileMark(NamedTuple):
    """One of the database's files, as it was left."""

    device: int
    inode: int
    size_bytes: int
    modified_ns: int


def marks(path: Path) -> list[FileMark | None]:
    """The database and its log as they stand in their folder; None for a missing one."""
    found: list[FileMark | None] = []
    for each in (name := str(path), f"{name}-wal"):
        try:
            status = os.stat(each)
            found.append(FileMark(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns))
        except FileNotFoundError:
            found.append(None)
    return found


def same_files(some: Sequence[FileMark | None], others: Sequence[FileMark | None]) -> bool:
    """Whether they are the same files, whatever they hold."""
    return [mark and mark[:2] for mark in some] == [mark and mark[:2] for mark in others]


def refuse_old_form(folder: Path) -> None:
    """Raise ``UsageError`` for a folder that an older version wrote."""
    for name in ("state.json", "writes-*.log"):
        for path in folder.glob(name):
            raise UsageError(
                f"{path} is of an older version; compact with the version that wrote it, then serve that index with a "
                "new folder as writes.state"
            )


def check_files(path: Path) -> bool:
    """Return whether the log ends in the torn part of a write; changes no file.

    Raises ``ArtifactError`` for files that do not belong together, or a damaged log.
    """
    header = b""
    if path.exists():
        with path.open("rb") as file:
            header = file.read(100)
    wal = wal_of(path)
    has_log = wal.exists() and wal.stat().st_size > 0
    if not header:
        if has_log:
            raise ArtifactError(f"{path} is gone, but {wal.name} is there; restore both from one copy, or a backup")
        return False
    version, marks = header[18:20], (bytes(4), FORMAT.to_bytes(4, "big"))
    if not header.startswith(MAGIC) or version not in (ROLLBACK, WITH_LOG) or header[68:72] not in marks:
        raise damage(path, "it is not a database of writes of this version")
    if version == ROLLBACK and has_log:
        raise ArtifactError(
            f"{wal} does not belong to {path.name}, which is a backup; restore a backup to a folder without it"
        )
    if int.from_bytes(header[USER_VERSION], "big") == Usage.IN_USE and not wal.exists():
        raise ArtifactError(
            f"{path} was not closed, and {wal.name}, which holds its newest writes, is missing; restore both from one "
            "copy, or a backup. If a tool opened the file after the service had ended, nothing is missing: then run "
            f"sqlite3 {path} 'PRAGMA user_version={Usage.CLOSED}'"
        )
    return _check_wal(wal)


def _check_wal(path: Path) -> bool:
    """Return whether whole frames of this log stand behind its end; a missing or empty file is sound.

    Raises ``ArtifactError`` if a transaction before the last cannot be read.
    """
    data = path.read_bytes() if path.exists() else b""
    if len(data) <= HEADER_BYTES:
        return False
    order = ">" if data[3] & 1 else "<"
    sums = _checksum(data[:24], (0, 0), order)
    if struct.pack(">2I", *sums) != data[24:HEADER_BYTES]:
        raise _broken(path, 0)
    size, salts = FRAME_HEADER_BYTES + int.from_bytes(data[8:12], "big"), data[16:24]
    broken, num_lost, is_torn = None, 0, False
    for start in range(HEADER_BYTES, len(data) - size + 1, size):
        frame = data[start : start + size]
        is_of_this_log = frame[8:16] == salts  # after a checkpoint new frames replace old ones, which have other salts
        if broken is None:
            sums = _checksum(frame[FRAME_HEADER_BYTES:], _checksum(frame[:8], sums, order), order)
            if not is_of_this_log or struct.pack(">2I", *sums) != frame[16:FRAME_HEADER_BYTES]:
                broken = start
        if broken is not None and is_of_this_log:
            is_torn = True
            num_lost += any(frame[4:8])  # the last frame of a transaction
    if broken is not None and num_lost > 1:
        raise _broken(path, broken)
    return is_torn


def _checksum(data: bytes, sums: tuple[int, int], order: str) -> tuple[int, int]:
    first, second = sums
    for even, odd in struct.iter_unpack(f"{order}2I", data):
        first = (first + even + second) & 0xFFFFFFFF
        second = (second + odd + first) & 0xFFFFFFFF
    return first, second


def _broken(path: Path, byte: int) -> ArtifactError:
    return ArtifactError(
        f"{path} is damaged at byte {byte}, and acknowledged writes come after it; restore the folder from a backup"
    )


def damage(path: Path, reason: str) -> ArtifactError:
    """The error for a database that is damaged."""
    return ArtifactError(
        f"{path} is damaged ({reason}); restore it from a backup, or serve an index that includes its writes with a "
        "new folder as writes.state"
    )
