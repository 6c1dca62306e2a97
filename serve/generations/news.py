"""What followers and the writer say to each other: a follower polls, and the writer answers with news."""

from typing import NamedTuple

from lookalike.config import Config
from lookalike.serve.generations.state import GenerationRef
from lookalike.serve.generations.write_record import WriteRecord

POLL_S = 2.0
"""Seconds that the writer lets a poll wait for news."""


class Version(NamedTuple):
    """Version of the state of one writer. Versions of different writers have no order: a clock may be set back."""

    writer: int
    """When the writer started, in ns."""
    change: int
    """Changes of the state since then."""


class Poll(Config):
    """What a follower has, and how long it will wait for more."""

    id: str
    """The follower, by a random name."""
    role: str
    version: Version
    last_write: int
    """Number of the last write that it has."""
    last_digest: str = ""
    """Digest of that write; empty if it does not have the write itself."""
    wait_s: float
    holds: tuple[str, ...]
    """Keys of the generations that it can answer for."""
    failed: dict[str, str]
    """Key of each generation that it could not load -> the reason."""


class News(Config):
    """The writer's state, and the next writes that the follower lacks."""

    version: Version
    held: tuple[GenerationRef, ...]
    """The generations to hold."""
    current: str
    """Name of the one that answers."""
    last_write: int
    """Number of the last write; ``records`` may end before it."""
    since: int
    """Number of the last write that every held generation includes."""
    records: tuple[WriteRecord, ...]
