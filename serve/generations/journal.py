"""The log of writes: what was acknowledged, in order, on a disk. A write is acknowledged when it is synced.

``writes-<number>.log`` holds the writes from that number on: a magic line, then frames of a header (number, kind,
length), 16 bytes of BLAKE2b over header and content, and the content: an ``UpsertRequest`` with vectors, or a
``DeleteRequest``. A crash can leave an incomplete frame at the very end, which was not acknowledged: it is cut off, and
kept aside. Damage anywhere else is an error; damage of the very last frame looks like such a crash.
"""

import fcntl
import hashlib
import os
import struct
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import IO, NamedTuple

from lookalike import storage
from lookalike.errors import ArtifactError, UsageError
from lookalike.serve.proto import retrieval_pb2 as pb
from lookalike.telemetry import fields, get_logger

log = get_logger(__name__)
MAGIC = b"lookalike writes 1\n"
HEADER = struct.Struct("<QBI")
DIGEST_BYTES = 16
UPSERT, DELETE = 1, 2
FILE_BYTES = 64 << 20
"""Size from which on a new file is begun."""


class Record(NamedTuple):
    """One write."""

    number: int
    kind: int
    content: bytes

    @property
    def message(self) -> pb.UpsertRequest | pb.DeleteRequest:
        """The write as it was sent."""
        if self.kind == UPSERT:
            upsert: pb.UpsertRequest = pb.UpsertRequest.FromString(self.content)
            return upsert
        delete: pb.DeleteRequest = pb.DeleteRequest.FromString(self.content)
        return delete

    def to_bytes(self) -> bytes:
        """The frame on disk, which is also how it travels."""
        header = HEADER.pack(self.number, self.kind, len(self.content))
        return header + _digest(header, self.content) + self.content


def read_frame(data: bytes, start: int = 0) -> tuple[Record, int] | None:
    """The record whose frame begins at ``start``, and where the next begins; None unless it is whole and sound."""
    body = start + HEADER.size + DIGEST_BYTES
    if len(data) < body:
        return None
    number, kind, length = HEADER.unpack_from(data, start)
    content = data[body : body + length]
    header = data[start : start + HEADER.size]
    if len(content) < length or _digest(header, content) != data[start + HEADER.size : body]:
        return None
    return Record(number, kind, content), body + length


def _digest(header: bytes, content: bytes) -> bytes:
    return hashlib.blake2b(header + content, digest_size=DIGEST_BYTES).digest()


class Journal:
    """The log in ``folder``, for one process alone: it holds the folder's lock until it is closed or dies.

    Raises ``UsageError`` when another process writes there for over ``wait_s`` seconds, ``ArtifactError`` for damage.
    """

    def __init__(self, folder: str, *, wait_s: float = 30.0) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = _hold_lock(self.folder / "lock", wait_s)
        self.last = 0
        """Number of the last write."""
        self.first = 1
        """Number of the oldest write that is kept."""
        self._file: IO[bytes] | None = None
        for path in self._files():
            self._recover(path, is_last=path == self._files()[-1])

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("writes-*.log"))

    def _recover(self, path: Path, *, is_last: bool) -> None:
        """Take note of what a file holds; cut what a crash left at the end of the last."""
        data = path.read_bytes()
        number, end = int(path.stem.removeprefix("writes-")), len(MAGIC)
        if self.last and number != self.last + 1:
            raise ArtifactError(
                f"{path} begins with write {number}, the file before it ends with {self.last}: a file "
                "is missing; restore it from a copy"
            )
        if path == self._files()[0]:
            self.first, self.last = number, number - 1
        if data.startswith(MAGIC):
            while (found := read_frame(data, end)) is not None and found[0].number == self.last + 1:
                self.last, end = found[0].number, found[1]
        elif not is_last or MAGIC[: len(data)] != data:
            raise ArtifactError(f"{path} is no log of writes of this version; restore it from a copy")
        if data.startswith(MAGIC) and end >= len(data):
            return
        rest = data[end:]
        if not is_last or _holds_frame(rest, self.last):
            raise ArtifactError(f"{path} is damaged after write {self.last} (byte {end}): restore it from a copy")
        if rest:
            aside = path.with_suffix(f".{end}.torn")
            aside.write_bytes(rest)
            log.warning("incomplete write cut off %s", fields(file=path, bytes=len(rest), kept=aside))
        with path.open("r+b") as file:
            file.truncate(end if data.startswith(MAGIC) else 0)
            file.seek(0)
            file.write(MAGIC)
            _sync(file)

    def append(self, writes: Sequence[tuple[int, bytes]]) -> int:
        """Store (kind, content) of some writes with one sync; the number of the last. What fails leaves nothing."""
        file = self._open_file()
        if not os.path.exists(file.name):  # what is written to it now, no later start would find
            raise FileNotFoundError(
                f"{file.name} was removed while the service wrote to it; compact, which keeps "
                "what it held, and serve the new index with a new folder as "
                "writes.state"
            )
        end = file.tell()
        records = [Record(self.last + place, kind, content) for place, (kind, content) in enumerate(writes, 1)]
        try:
            _write_all(file, b"".join(record.to_bytes() for record in records))
            _sync(file)
        except BaseException:
            self._file = None  # what it holds beyond ``end`` is unknown: cut, and opened anew
            with file:
                os.ftruncate(file.fileno(), end)
            raise
        self.last += len(records)
        return self.last

    def _open_file(self) -> IO[bytes]:
        if self._file is not None and self._file.tell() < FILE_BYTES:
            return self._file
        files = self._files()
        path = files[-1] if files and files[-1].stat().st_size < FILE_BYTES else None
        if self._file is not None:
            self._file.close()
            self._file = None
        if path is None:
            path = self.folder / f"writes-{self.last + 1:020d}.log"
            storage.write_atomic(str(path), MAGIC)  # whole or not at all: frames never follow a part of it
        self._file = path.open("r+b", buffering=0)
        self._file.seek(0, os.SEEK_END)
        return self._file

    def read(self, after: int = 0) -> Iterator[Record]:
        """The writes with larger numbers than ``after``, in order."""
        files = self._files()
        for path, following in zip_longest(files, files[1:]):
            if following is not None and int(following.stem.removeprefix("writes-")) <= after + 1:
                continue
            data, end = path.read_bytes(), len(MAGIC)
            while (found := read_frame(data, end)) is not None:
                record, end = found
                if record.number > after:
                    yield record

    def forget(self, through: int) -> None:
        """Remove files all of whose writes have numbers up to ``through``."""
        files = self._files()
        for path, following in pairwise(files):
            first = int(following.stem.removeprefix("writes-"))
            if first > through + 1:
                return
            path.unlink()
            self.first = first

    def close(self) -> None:
        """Let others write."""
        if self._file is not None:
            self._file.close()
        self._lock.close()


def _holds_frame(data: bytes, last: int) -> bool:
    """Whether a sound frame of a write soon after ``last`` lies in ``data``: then what is before it was no end."""
    for start in range(1, len(data) - HEADER.size - DIGEST_BYTES + 1):
        number = HEADER.unpack_from(data, start)[0]
        if last < number <= last + len(data) and read_frame(data, start) is not None:
            return True
    return False


def _write_all(file: IO[bytes], data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def _hold_lock(path: Path, wait_s: float) -> IO[bytes]:
    file = path.open("ab")
    deadline = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            if time.monotonic() > deadline:
                file.close()
                raise UsageError(
                    f"another service writes to {path.parent}; stop it, or set writes.state to a folder "
                    "of this service's own"
                ) from None
            time.sleep(0.1)


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())
