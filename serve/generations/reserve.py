"""Space that is set aside beside the database: on a full disk deletes and changes of the state still find some."""

import errno
import os
from contextlib import suppress
from pathlib import Path

FILE = "reserve"
RESERVE_BYTES = 4 << 20
CHUNK_BYTES = 1 << 20


class Reserve:
    """A file of ``RESERVE_BYTES`` that holds nothing."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE
        self.is_full = False
        """Whether the space is set aside."""
        self.fill()

    def fill(self) -> bool:
        """Set the space aside, unless it is; return whether it is."""
        try:
            file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError:
            self.is_full = False
            return False
        try:
            if os.fstat(file).st_size != RESERVE_BYTES:
                _allocate(file)
            self.is_full = True
        except OSError:
            self.release()
        finally:
            os.close(file)
        return self.is_full

    def release(self) -> bool:
        """Give the space back to the disk; return whether there was some."""
        had = self.is_full
        with suppress(OSError):
            self._path.unlink()
        self.is_full = False
        return had


def _allocate(file: int) -> None:
    try:
        os.posix_fallocate(file, 0, RESERVE_BYTES)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        for place in range(0, RESERVE_BYTES, CHUNK_BYTES):  # a file system that cannot allocate
            os.pwrite(file, bytes(CHUNK_BYTES), place)
