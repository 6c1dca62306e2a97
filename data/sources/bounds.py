"""Bounds of what a table or an archive may unpack to, so that a small file cannot fill the memory of its task."""

import bz2
import gzip
import io
import lzma
import resource
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import pyarrow as pa
from pydantic import Field

from lookalike import storage
from lookalike.config import Config

FREE_BYTES = 64 << 20
"""Unpacked bytes of a file that need no packed ones: the ratio says little about small files."""
BUFFER_BYTES = 1 << 20
MAX_RECORD_BYTES = 8 << 20
ROW_BYTES = 64  # of memory that a row costs at least


class ReadBounds(Config):
    """How much a source may unpack to; what is beyond is refused with a reason that names the setting."""

    max_record_bytes: int = Field(MAX_RECORD_BYTES, ge=100)
    """Most bytes of a record's text: a line, the cells of a row, the members of an archive that are no image."""
    max_ratio: float = Field(100.0, gt=1)
    """Most unpacked bytes of a compressed file per packed byte, beyond its first 64 MiB."""
    max_memory_bytes: int = Field(512 << 20, ge=64 << 20)
    """Most memory that decoding a piece of a columnar file may add to its task, bytes. Pieces that need more are
    read a row at a time, and refused if one row still does."""


def claim_of_rows(rows: int, size_bytes: int, bounds: ReadBounds) -> str | None:
    """Why a file of ``size_bytes`` that claims to have ``rows`` is refused; None if it may have them."""
    most = int((FREE_BYTES + bounds.max_ratio * size_bytes) / ROW_BYTES)
    remedy = "replace it, or raise bounds.max_ratio"
    return (
        None
        if rows <= most
        else f"{size_bytes} bytes claim {rows} rows, more than {most} that may be in them; {remedy}"
    )


class UnpackedError(Exception):
    """A file unpacks to more than its bound."""

    reason = "unpacks_too_far"

    def __init__(self, bounds: ReadBounds) -> None:
        super().__init__(
            f"it unpacks to more than {bounds.max_ratio:g} bytes per packed byte; what comes before is read, replace "
            "it or raise bounds.max_ratio"
        )


class _Unpacked(io.RawIOBase):
    """A stream that unpacks another one and watches how far."""

    def __init__(self, packed: BinaryIO, stream: BinaryIO, bounds: ReadBounds) -> None:
        self._packed, self._stream, self._bounds, self._total = packed, stream, bounds, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        piece = self._stream.read(len(buffer))
        self._total += len(piece)
        if self._total > FREE_BYTES + self._bounds.max_ratio * self._packed.tell():
            raise UnpackedError(self._bounds)
        buffer[: len(piece)] = piece
        return len(piece)


DAMAGED = (EOFError, OSError, zlib.error, lzma.LZMAError)
"""What reading a damaged compressed file raises."""
_UNPACKERS = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}


@contextmanager
def open_unpacked(uri: str, bounds: ReadBounds, *, sniff: bool = False) -> Iterator[io.BufferedReader]:
    """The bytes of a regular file, unpacked while they are read if its name ends in ``.gz``.

    ``sniff``: unpack what begins like a gzip, bzip2 or xz file, whatever its name. Reading raises ``UnpackedError``
    where the file unpacks to more than ``bounds`` allow, and one of ``DAMAGED`` where it is damaged.
    """
    with storage.open_file(uri) as packed:
        unpack: Any = gzip.open if uri.lower().endswith(".gz") else None
        if sniff:
            start = packed.read(5)
            packed.seek(0)
            unpack = next((found for magic, found in _UNPACKERS.items() if start.startswith(magic)), None)
        stream = packed if unpack is None else _Unpacked(packed, unpack(packed), bounds)
        yield io.BufferedReader(stream, BUFFER_BYTES)


_limit_lock = threading.Lock()


@contextmanager
def limited_memory(bounds: ReadBounds) -> Iterator[None]:
    """Let this process grow by at most ``max_memory_bytes`` while the block runs; then ``MemoryError``.

    The limit is the address space's, for which every allocator asks the kernel. Blocks of several threads wait for each
    other.
    """
    with _limit_lock:
        pool = pa.default_memory_pool()
        pa.set_memory_pool(pa.system_memory_pool())  # the others keep a gigabyte of addresses to themselves
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        wanted = _address_space_bytes() + bounds.max_memory_bytes
        known = [limit for limit in (soft, hard, wanted) if limit != resource.RLIM_INFINITY]
        resource.setrlimit(resource.RLIMIT_AS, (min(known), hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
            pa.set_memory_pool(pool)


def _address_space_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[0]) * resource.getpagesize()
