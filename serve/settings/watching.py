"""Settings of access log, recall monitor and experiment."""

from typing import Literal

from pydantic import Field, model_validator

from lookalike.config import Config

INTERLEAVED = "interleave"
"""Arm name of an answer drafted from two arms."""


class AccessLogSettings(Config):
    """One JSON line per request, without payloads: see ``lookalike.serve.watch.access_log``."""

    folder: str | None = None
    """Folder on a disk of the replica's machine; None writes no access log and refuses Feedback."""
    max_mb: float = Field(default=64.0, ge=0.001, le=10_000.0)
    """Size at which a replica begins its next file, in MB; a single write may exceed it."""
    max_files: int = Field(default=8, ge=2, le=1000)
    """Files that a replica keeps, including the current one; the oldest is removed first."""
    max_waiting: int = Field(default=10_000, ge=1, le=1_000_000)
    """Lines that may wait for the disk; further ones are dropped and counted."""


class MonitorSettings(Config):
    """Repeats live queries exactly, in the background: see ``lookalike.serve.watch.recall_monitor``."""

    share: float = Field(default=0.0, ge=0.0, le=1.0)
    """Share of the searches whose recall is measured; 0 measures none."""
    max_per_s: float = Field(default=1.0, gt=0.0, le=10_000.0)
    """Most exact searches per second of a replica."""
    max_in_flight: int = Field(default=4, ge=1)
    """With more requests in flight the replica is busy and skips the sample."""
    window: int = Field(default=1000, ge=10, le=1_000_000)
    """Number of recent queries in an estimate."""
    timeout_s: float = Field(default=10.0, gt=0.0, le=3600.0)
    """Longest time an exact search may take, in seconds."""


class Guardrails(Config):
    """Limits of the arms other than control. An arm that provably breaks one gets no more traffic.

    An arm is judged after every request. Proof is evidence that an arm within the limit would ever show with a
    probability of at most 1%, however long it runs (``experiment/evidence.py``).
    """

    max_error_share: float | None = Field(default=None, ge=0.0, lt=1.0)
    """Share of requests that may fail through no fault of the caller."""
    max_p99_ms: float | None = Field(default=None, gt=0.0)
    """Longest 99th percentile of the request time, in milliseconds."""
    min_recall: float | None = Field(default=None, gt=0.0, le=1.0)
    """Lowest recall, as the recall monitor measures it."""
    min_requests: int = Field(default=200, ge=1, le=100_000)
    """Requests (for recall: measured queries) before an arm is judged."""


class ArmSettings(Config):
    """One arm: an index with its plan and its encoder."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,31}$")
    """Name in replies, metrics and the access log."""
    weight: float = Field(default=1.0, gt=0.0, le=1e6)
    """Share of the sessions relative to the other arms; interleaving ignores it."""
    index: str | None = None
    """URI of an ``index`` artifact; None follows the served index."""
    plan: str | None = None
    """URI of a ``plan`` artifact, or ``none`` for exact search; None takes the served plan, or exact search if the arm
    has its own index."""
    encoder: str = "auto"
    """URI of the encoder of the arm's own index; ``auto`` and ``none`` as in ``ServeConfig.encoder``."""

    @model_validator(mode="after")
    def _encoder_belongs_to_an_index(self) -> "ArmSettings":
        if self.index is None and self.encoder != "auto":
            raise ValueError(
                f"arm {self.name!r} has an encoder and no index; give the index made with that encoder, or "
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
    """The arms. The first is control: the others are compared with it and fall back to it."""
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
                f"control {names[0]!r} names its own index, but control is what is served: set "
                "serve.index, and leave index out of the first arm"
            )
        return self
