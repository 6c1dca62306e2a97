"""Looks for damage in SQLite's write-ahead log, which SQLite itself passes over.

SQLite takes the log to end at the first frame that is not sound, as after a crash, and drops the frames after it: a
flipped bit would silently take back acknowledged writes. But a crash breaks only the last transaction, since the one
before was synced when the last began. So a log that breaks before its last transaction is damaged. Its format:
https://www.sqlite.org/fileformat2.html#walformat
"""

import struct
from pathlib import Path

from lookalike.errors import ArtifactError

HEADER_BYTES = 32
FRAME_HEADER_BYTES = 24


def check_wal(path: Path) -> None:
    """Raise ``ArtifactError`` if a transaction before the last cannot be read; a missing or empty file is sound."""
    data = path.read_bytes() if path.exists() else b""
    if len(data) <= HEADER_BYTES:
        return
    order = ">" if data[3] & 1 else "<"
    sums = _checksum(data[:24], (0, 0), order)
    if struct.pack(">2I", *sums) != data[24:HEADER_BYTES]:
        raise _damage(path, 0)
    size, salts = FRAME_HEADER_BYTES + int.from_bytes(data[8:12], "big"), data[16:24]
    broken, num_lost = None, 0
    for start in range(HEADER_BYTES, len(data) - size + 1, size):
        frame = data[start : start + size]
        is_of_this_log = frame[8:16] == salts  # after a checkpoint new frames replace old ones, which have other salts
        if broken is None:
            sums = _checksum(frame[FRAME_HEADER_BYTES:], _checksum(frame[:8], sums, order), order)
            if not is_of_this_log or struct.pack(">2I", *sums) != frame[16:FRAME_HEADER_BYTES]:
                broken = start
        if broken is not None and is_of_this_log and any(frame[4:8]):  # the last frame of a transaction
            num_lost += 1
    if broken is not None and num_lost > 1:
        raise _damage(path, broken)


def _checksum(data: bytes, sums: tuple[int, int], order: str) -> tuple[int, int]:
    first, second = sums
    for even, odd in struct.iter_unpack(f"{order}2I", data):
        first = (first + even + second) & 0xFFFFFFFF
        second = (second + odd + first) & 0xFFFFFFFF
    return first, second


def _damage(path: Path, byte: int) -> ArtifactError:
    return ArtifactError(
        f"{path} is damaged at byte {byte}, and acknowledged writes come after it; restore the folder from a backup"
    )
