"""Settings of what watches the service: access log, recall monitor, experiment."""

from typing import Literal

from pydantic import Field, model_validator

from lookalike.config import Config

INTERLEAVED = "interleave"
"""What stands for the arm of an answer that two arms gave together."""


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


class Guardrails(Config):
    """Limits of an arm other than control. One that is shown to break them gets no more traffic: the lower end of an
    interval of its share of bad answers lies above the limit, or the upper end of its recall's below. The interval is
    one of three standard errors each way (99.7%), since it is looked at after every request."""

    max_error_share: float | None = Field(default=None, ge=0.0, lt=1.0)
    """Requests that failed through no fault of the caller, as a share."""
    max_p99_ms: float | None = Field(default=None, gt=0.0)
    """Time that 99% of the requests may take, in milliseconds."""
    min_recall: float | None = Field(default=None, gt=0.0, le=1.0)
    """Recall as the recall monitor measures it."""
    min_requests: int = Field(default=200, ge=1, le=100_000)
    """Requests (for recall: measured queries) before an arm is judged."""


class ArmSettings(Config):
    """One arm: an index with its plan and its encoder."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,31}$")
    """Name in replies, metrics and the access log."""
    weight: float = Field(default=1.0, gt=0.0, le=1e6)
    """Share of the sessions, relative to the other arms'; interleaving has no use for it."""
    index: str | None = None
    """URI of an ``index`` artifact; None takes the index that is served, also when that changes."""
    plan: str | None = None
    """URI of a ``plan`` artifact, ``none`` for exact search; None is the served plan (of an index of its own: exact
    search)."""
    encoder: str = "auto"
    """URI of the encoder of an index of its own; ``auto`` and ``none`` as in the service's settings."""

    @model_validator(mode="after")
    def _encoder_belongs_to_an_index(self) -> "ArmSettings":
        if self.index is None and self.encoder != "auto":
            raise ValueError(
                f"arm {self.name!r} has an encoder and no index; give the index that the encoder made, or "
                "leave the encoder out"
            )
        return self


class ExperimentSettings(Config):
    """Arms that share the traffic (``experiment/assignment.py``). A changed experiment needs a new name."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_.-]{0,63}$")
    """Name; with the session it decides the arm."""
    mode: Literal["split", "interleave"] = "split"
    """``split``: a session sees one arm. ``interleave``: every answer is drafted from both arms."""
    arms: tuple[ArmSettings, ...] = Field(min_length=2, max_length=16)
    """The arms; the first is control, which the others are compared with and fall back to."""
    guardrails: Guardrails = Guardrails()
    """Limits of the other arms."""

    @property
    def control(self) -> ArmSettings:
        """The first arm."""
        return self.arms[0]

    @model_validator(mode="after")
    def _arms_are_told_apart(self) -> "ExperimentSettings":
        names = [arm.name for arm in self.arms]
        if len(set(names)) < len(names) or INTERLEAVED in names:
            raise ValueError(f"arms {names}: names must differ, and {INTERLEAVED!r} is taken; rename one")
        if self.mode == "interleave" and len(names) != 2:
            raise ValueError(f"interleaving compares two arms, these are {len(names)}; take two, or mode split")
        if self.control.index is not None:
            raise ValueError(
                f"control {names[0]!r} names an index of its own; control is what is served: set "
                "serve.index, and leave index out of the first arm"
            )
        return self
