"""What was acknowledged, in a second place: ``acknowledged`` beside the database, so that a cut or older one is told.

It holds the number and digest of the last acknowledged write, and the digest of the state. It is written in place after
each commit and not synced, so it never runs ahead of the database; after a power cut it may be behind. A change of the
state is announced first, and synced: the state is then the old or the new one.
"""

import os
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from lookalike import storage
from lookalike.serve.generations.database_files import damage
from lookalike.serve.generations.write_record import DIGEST_BYTES, digest_of

FILE = "acknowledged"
NOTHING = bytes(DIGEST_BYTES)
"""Digest of a write or state that does not exist."""
NUMBER_DIGITS = 20
LINE_BYTES = NUMBER_DIGITS + 4 * (1 + 2 * DIGEST_BYTES) + 1


class Acknowledged(NamedTuple):
    """The last acknowledged write, and the states of which one is stored."""

    number: int = 0
    digest: bytes = NOTHING
    state: bytes = NOTHING
    next_state: bytes = NOTHING

    @property
    def line(self) -> bytes:
        """As it is stored, with a digest at the end."""
        hexes = (each.hex() for each in (self.digest, self.state, self.next_state))
        content = " ".join([f"{self.number:0{NUMBER_DIGITS}}", *hexes]).encode()
        return content + b" " + digest_of(content).hex().encode() + b"\n"


def read(path: Path) -> Acknowledged | None:
    """What the file says, or None if it does not exist; ``ArtifactError`` if it is damaged."""
    try:
        line = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        number, *hexes = line.decode("ascii").split()
        found = Acknowledged(int(number), *map(bytes.fromhex, hexes[:3]))
    except ValueError:
        found = Acknowledged()
    if found.line != line:
        raise damage(path, f"it does not match its digest; remove it if {path.parent} is otherwise as it should be")
    return found


class AcknowledgedFile:
    """The file, open for writing."""

    def __init__(self, folder: Path, start: Acknowledged) -> None:
        path = folder / FILE
        known = read(path)
        if known is None:
            storage.write_atomic(str(path), start.line)
        self.value = known or start
        """What it says."""
        self._file = os.open(path, os.O_WRONLY)

    def write(self, value: Acknowledged, *, sync: bool = False) -> None:
        """Store ``value`` in place, which needs no space."""
        os.pwrite(self._file, value.line, 0)
        if sync:
            os.fdatasync(self._file)
        self.value = value

    def close(self) -> None:
        """Sync the file and let go of it."""
        with suppress(OSError):
            os.fdatasync(self._file)
        os.close(self._file)
