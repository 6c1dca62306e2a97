"""Settings of what watches the service: access log, recall monitor, experiment."""

from pydantic import Field

from lookalike.config import Config


class AccessLogSettings(Config):
    """One JSON line a request, without payloads: see ``lookalike.serve.watch.access_log``."""

    folder: str | None = None
    """Folder on a disk of the replica's machine; None writes no access log, and then Feedback is refused."""
    max_mb: float = Field(default=64.0, ge=0.001, le=10_000.0)
    """Size at which a replica begins its next file, in MB; one write may go beyond it."""
    max_files: int = Field(default=8, ge=2, le=1000)
    """Files that a replica keeps, the one being written included; the oldest goes first."""
    max_waiting: int = Field(default=10_000, ge=1, le=1_000_000)
    """Lines that may wait for the disk; further ones are dropped and counted."""


class MonitorSettings(Config):
    """Live queries searched again exactly, in the background: see ``lookalike.serve.watch.recall_monitor``."""

    share: float = Field(default=0.0, ge=0.0, le=1.0)
    """Share of the searches whose recall is measured; 0 measures none."""
    max_per_s: float = Field(default=1.0, gt=0.0, le=10_000.0)
    """Exact searches a second that a replica makes at most."""
    max_in_flight: int = Field(default=4, ge=1)
    """Requests in flight beyond which the replica is busy and a sample is skipped."""
    window: int = Field(default=1000, ge=10, le=1_000_000)
    """Queries that an estimate rests on: the last so many."""
    timeout_s: float = Field(default=10.0, gt=0.0, le=3600.0)
    """Longest time an exact search may take, in seconds."""
