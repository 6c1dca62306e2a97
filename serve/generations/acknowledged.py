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
from lookalike.telemetry import fields, get_logger

log = get_logger(__name__)
FILE = "acknowledged"
NOTHING = bytes(DIGEST_BYTES)
"""Digest of a write or state that does not exist."""
NUMBER_DIGITS = 20
LINE_BYTES = 2 * NUMBER_DIGITS + 1 + 4 * (1 + 2 * DIGEST_BYTES) + 1
SECTOR_BYTES = 512
PLACES = (0, SECTOR_BYTES)


class Acknowledged(NamedTuple):
    """The last acknowledged write, and the states of which one is stored."""

    number: int = 0
    digest: bytes = NOTHING
    state: bytes = NOTHING
    next_state: bytes = NOTHING
    turn: int = 0
    """How often it was written."""

    @property
    def line(self) -> bytes:
        """As it is stored, with a digest at the end."""
        hexes = (each.hex() for each in (self.digest, self.state, self.next_state))
        content = " ".join([f"{self.turn:0{NUMBER_DIGITS}}", f"{self.number:0{NUMBER_DIGITS}}", *hexes]).encode()
        return content + b" " + digest_of(content).hex().encode() + b"\n"


def read(path: Path) -> Acknowledged | None:
    """What the newer whole sector says, or None if there is no file; ``ArtifactError`` if neither is whole."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    found = [value for place in PLACES if (value := _parse(content[place : place + LINE_BYTES])) is not None]
    if not found:
        raise damage(path, f"it does not match its digests; remove it if {path.parent} is otherwise as it should be")
    if len(found) < len(PLACES):
        log.warning("half damaged %s", fields(file=str(path), effect="the other half is taken"))
    return max(found, key=lambda value: value.turn)


def _parse(line: bytes) -> Acknowledged | None:
    try:
        turn, number, *hexes = line.decode("ascii").split()
        digest, state, next_state, _ = map(bytes.fromhex, hexes)
        found = Acknowledged(int(number), digest, state, next_state, int(turn))
    except ValueError:
        return None
    return found if found.line == line else None


class AcknowledgedFile:
    """The file, open for writing. Its two sectors are written in turn: one that is torn leaves the other."""

    def __init__(self, folder: Path, start: Acknowledged) -> None:
        path = folder / FILE
        known = read(path)
        if known is None:
            storage.write_atomic(str(path), start.line.ljust(SECTOR_BYTES, b"\n") + start.line)
        self.value = known or start
        """What it says."""
        self._file = os.open(path, os.O_WRONLY)

    def write(self, value: Acknowledged, *, sync: bool = False) -> None:
        """Store ``value`` in place, which needs no space."""
        value = value._replace(turn=self.value.turn + 1)
        os.pwrite(self._file, value.line, PLACES[value.turn % len(PLACES)])
        if sync:
            os.fdatasync(self._file)
        self.value = value

    def close(self) -> None:
        """Sync the file and let go of it."""
        with suppress(OSError):
            os.fdatasync(self._file)
        os.close(self._file)
