"""A disk that fails, for a program in this process: ``disk.c``, compiled and preloaded.

:func:`preload` runs a module again with it; in that process a :class:`Disk` decides which call fails, and how.
"""

import ctypes
import os
import random
import shutil
import subprocess
import sys
import tempfile
from enum import IntEnum
from pathlib import Path

SOURCE = Path(__file__).with_name("disk.c")
SECTOR = 512


class Fault(IntEnum):
    """What happens to a call, as in ``disk.c``."""

    NONE = 0
    ERROR = 1
    FULL = 2
    """No space: only for calls that take some."""
    SHORT = 3
    """Half of a write is written, and said so."""
    KILLED = 4
    """The process gets SIGKILL in the midst of the call."""
    DEAD = 5
    """This call and all later ones fail: as if the process had ended, without ending it."""
    DONE_BUT_ERROR = 6
    SYNC_LOSES = 7
    """A sync fails, and what it had to write is gone."""
    SYNC_LIES = 8
    """A sync says that it is done, and does nothing."""


def find_compiler() -> str | None:
    """The C compiler of this machine."""
    return shutil.which("cc") or shutil.which("gcc")


def preload(module: str, arguments: list[str], *, output: int | None = None) -> subprocess.CompletedProcess[str]:
    """Run ``python -m module`` with the disk preloaded; ``output`` is for its standard output and errors."""
    compiler = find_compiler()
    assert compiler is not None, "there is no C compiler"
    with tempfile.TemporaryDirectory() as folder:
        library = f"{folder}/disk.so"
        subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, str(SOURCE), "-ldl"], check=True)
        return subprocess.run(
            [sys.executable, "-m", module, *arguments],
            env=os.environ | {"LD_PRELOAD": library},
            stdout=output,
            stderr=output and subprocess.STDOUT,
            text=True,
            check=False,
        )


def is_preloaded() -> bool:
    """Whether this process runs on the disk."""
    return "disk.so" in os.environ.get("LD_PRELOAD", "")


def memory_folder() -> str | None:
    """Where files are in memory, so that tests wait for no disk."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


class Disk:
    """The disk under ``folder``, which has no folders in it."""

    def __init__(self, folder: Path) -> None:
        assert is_preloaded()
        self.folder = folder
        self._library = ctypes.CDLL(None)
        for name in ("disk_calls", "disk_durable", "disk_name"):
            getattr(self._library, name).restype = ctypes.c_long
        self._library.disk_last_call.restype = ctypes.c_char_p
        self._library.disk_start(os.fsencode(folder))

    def arm(self, first: int, count: int, fault: Fault) -> None:
        """From the ``first`` call after this one on, ``count`` calls fail; 0: all."""
        self._library.disk_arm(ctypes.c_long(first), ctypes.c_long(count), int(fault))

    def disarm(self) -> None:
        """Work as it should from now on."""
        self._library.disk_arm(ctypes.c_long(-1), ctypes.c_long(0), 0)
        self._library.disk_die(0)

    def stop(self) -> None:
        """Leave the folder alone."""
        self._library.disk_stop()

    def die(self) -> None:
        """Fail every call until ``disarm``, as for a process that has ended."""
        self._library.disk_die(1)

    @property
    def is_dead(self) -> bool:
        """Whether a call has met ``Fault.DEAD``."""
        return bool(self._library.disk_is_dead())

    @property
    def calls(self) -> int:
        """Calls so far that change files."""
        return int(self._library.disk_calls())

    @property
    def last_call(self) -> str:
        """The name of the last one that met its fault."""
        name: bytes = self._library.disk_last_call()
        return name.decode()

    def lose_unsynced(self, rng: random.Random) -> None:
        """Take back what no sync has made durable, as a power cut may: by sectors, each as it was or as it is."""
        for name, inode in self._durable_names().items():
            path = self.folder / name
            if not path.exists() and rng.random() < 0.5 and (data := self._durable(inode)) is not None:
                path.write_bytes(data)
        durable = self._durable_names()
        for path in sorted(self.folder.iterdir()):
            if path.is_dir():
                continue
            inode = path.stat().st_ino
            data = self._durable(inode)
            if durable.get(path.name) != inode and data is None and rng.random() < 0.5:
                path.unlink()
            elif (mixed := _mix(data or b"", now := path.read_bytes(), rng)) != now:
                with path.open("r+b") as file:
                    file.write(mixed)
                    file.truncate(len(mixed))
        self.count_as_synced()

    def count_as_synced(self) -> None:
        """Take everything that stands in the folder as durable, as after a start of the machine."""
        self._library.disk_forget_names()
        for path in self.folder.iterdir():
            if path.is_file():
                data, inode = path.read_bytes(), ctypes.c_ulong(path.stat().st_ino)
                self._library.disk_set_durable(inode, data, ctypes.c_long(len(data)))
                self._library.disk_add_name(os.fsencode(path.name), inode)

    def _durable_names(self) -> dict[str, int]:
        names, buffer = {}, ctypes.create_string_buffer(256)
        while (inode := self._library.disk_name(len(names), buffer)) >= 0:
            names[os.fsdecode(buffer.value)] = int(inode)
        return names

    def _durable(self, inode: int) -> bytes | None:
        size = self._library.disk_durable(ctypes.c_ulong(inode), None, ctypes.c_long(-1))
        if size < 0:
            return None
        buffer = ctypes.create_string_buffer(size or 1)
        self._library.disk_durable(ctypes.c_ulong(inode), buffer, ctypes.c_long(size))
        return buffer.raw[:size]


def _mix(old: bytes, now: bytes, rng: random.Random) -> bytes:
    """Sectors of either. A file that grew may have grown in part; one that was cut is cut, or as it was."""
    grown = [rng.randint(len(old), len(now))] if len(now) > len(old) else []
    size = rng.choice([len(old), len(now), *grown])
    share = rng.choice([0.0, 0.5, 1.0])
    sectors = []
    for start in range(0, size, SECTOR):
        stop = min(start + SECTOR, size)
        chosen = now if start < len(now) and rng.random() < share else old
        sectors.append(chosen[start:stop].ljust(stop - start, b"\0"))
    return b"".join(sectors)
