"""Figures of a training run: losses of a step over all workers, the loss curve, Ray's gauges; and the stop at a loss
that is not finite."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from lookalike.errors import LookalikeError

CURVE_POINTS = 200
"""Points of a loss curve, or a few more; a run of fewer steps keeps every step."""
IDS_SHOWN = 64


class NonFiniteLossError(LookalikeError):
    """A loss or a gradient is infinite or NaN; the message names step, workers, images and checkpoint."""


@dataclass(frozen=True)
class StepValues:
    """Figures of one step: means over its parts and over workers."""

    step: int
    values: dict[str, float]
    """``loss`` (the sum that is trained on), ``loss_<task>``, ``grad_norm``, ``lr``."""
    ids: Sequence[str] = ()
    """Image ids of this worker's rows, if the loader gives them."""
    bad: bool = False
    """A worker's loss, or the gradient of all, is not finite."""
    bad_here: bool = False
    """This worker's loss is not finite."""


@dataclass
class _Pending:
    step: int
    names: list[str]
    numbers: torch.Tensor
    """This worker's loss is bad (0 or 1), workers whose loss is, the gradient's norm, the losses; float64."""
    norm_counts: bool
    lr: float
    ids: Sequence[str]
    copied: "torch.cuda.Event | None"


class StepReader:
    """Copies each step's losses from the device to the host.

    On a GPU they are read one step later, when the copy has long ended, so that the device never waits for the host.
    """

    def __init__(self, device: torch.device) -> None:
        self.lags = device.type == "cuda"
        self._pending: _Pending | None = None

    def put(
        self,
        step: int,
        losses: Mapping[str, torch.Tensor],
        norm: torch.Tensor,
        ids: Sequence[str],
        *,
        lr: float,
        norm_may_overflow: bool,
    ) -> None:
        """Begin the copy. ``losses``: this worker's share of each mean; the same names in the same order on every
        worker."""
        own = torch.stack([loss.detach().double() for loss in losses.values()])
        bad = ~own.isfinite().all()
        shared = torch.cat([bad.double()[None], own])
        if dist.is_initialized():
            dist.all_reduce(shared)
        numbers = torch.cat([bad.double()[None], shared[:1], norm.detach().double()[None], shared[1:]])
        copied = None
        if self.lags:
            host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            host.copy_(numbers, non_blocking=True)
            numbers, copied = host, torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record()
        self._pending = _Pending(step, list(losses), numbers, not norm_may_overflow, lr, ids, copied)

    def take(self) -> StepValues | None:
        """The step that was put last; None if it has been taken already."""
        pending, self._pending = self._pending, None
        if pending is None:
            return None
        if pending.copied is not None:
            pending.copied.synchronize()
        bad_here, bad_workers, norm, *losses = pending.numbers.tolist()
        values = {**dict(zip(pending.names, losses, strict=True)), "grad_norm": norm, "lr": pending.lr}
        bad = bad_workers > 0 or (pending.norm_counts and not math.isfinite(norm))
        return StepValues(pending.step, values, pending.ids, bad, bool(bad_here))


class _WorkerState(NamedTuple):
    rank: int
    ids: list[str]
    bad: bool


def stop_if_bad(figures: StepValues, rank: int, last_good: Callable[[], str]) -> None:
    """Raise ``NonFiniteLossError``, the same on every worker, if a worker's loss or the gradient was not finite.

    ``last_good`` names the last checkpoint; it is called once every worker has come here, with its own files written.
    """
    if not figures.bad:
        return
    own = _WorkerState(rank, list(figures.ids)[:IDS_SHOWN], figures.bad_here)
    states = [own]
    if dist.is_initialized():
        states = [own] * dist.get_world_size()
        dist.all_gather_object(states, own)
    guilty = [state for state in states if state.bad]
    what = "loss" if guilty else "gradient"
    where = "; ".join(
        f"rank {state.rank}, images {', '.join(state.ids) or 'not named by the loader'}" for state in guilty or states
    )
    raise NonFiniteLossError(
        f"the {what} is not finite at step {figures.step} on {where}; {last_good()}. Run again with a "
        "lower optimizer.lr, a smaller optimizer.clip_norm or a longer warm-up, with compute.precision=float32, or "
        "look at these images"
    )


@dataclass
class Curve:
    """The loss curve of a run: a bounded number of points, each the mean of the steps since the point before.

    A mean is over the finite values, since the gradient of a step that overflowed float16 is not; a point without any
    leaves the name out.
    """

    total_steps: int
    points: list[dict[str, float]] = field(default_factory=list)
    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    trained: set[str] = field(default_factory=set)
    """Names of losses that were not exactly 0 in some step."""

    def add(self, figures: StepValues) -> None:
        """Add a step; every ``total_steps / CURVE_POINTS`` steps, and at the end, add a point."""
        for name, value in figures.values.items():
            if value:
                self.trained.add(name)
            if math.isfinite(value):
                self.sums[name] = self.sums.get(name, 0.0) + value
                self.counts[name] = self.counts.get(name, 0) + 1
        if figures.step % max(1, self.total_steps // CURVE_POINTS) and figures.step != self.total_steps:
            return
        means = {name: total / self.counts[name] for name, total in self.sums.items()}
        self.points.append({"step": float(figures.step), **means, "lr": figures.values["lr"]})
        self.sums, self.counts = {}, {}

    def state(self) -> dict[str, Any]:
        return {
            "points": list(self.points),
            "sums": dict(self.sums),
            "counts": dict(self.counts),
            "trained": sorted(self.trained),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        self.points, self.sums, self.counts = list(state["points"]), dict(state["sums"]), dict(state["counts"])
        self.trained = set(state["trained"])


class Pace:
    """Speed of training, and the share of its time spent waiting for data."""

    def __init__(self, images_per_step: int) -> None:
        self._images = images_per_step
        self._begun = self._since = time.monotonic()
        self._steps = self._all_steps = 0
        self._waited = self._all_waited = 0.0

    def waited(self, seconds: float) -> None:
        self._waited += seconds
        self._all_waited += seconds

    def step(self) -> None:
        self._steps += 1
        self._all_steps += 1

    def read(self) -> dict[str, float]:
        """Images per second of all workers, and this worker's share of time spent waiting, since the last reading."""
        now = time.monotonic()
        seconds = max(now - self._since, 1e-9)
        values = {"images_per_s": self._steps * self._images / seconds, "data_wait": self._waited / seconds}
        self._since, self._steps, self._waited = now, 0, 0.0
        return values

    def whole(self) -> dict[str, float]:
        """The same figures since this process began to train."""
        seconds = max(time.monotonic() - self._begun, 1e-9)
        return {"images_per_s": self._all_steps * self._images / seconds, "data_wait": self._all_waited / seconds}


class Gauges:
    """The first worker's latest figures as Ray metrics ``lookalike_train_<what>``, tagged with the run."""

    NAMES = ("loss", "grad_norm", "lr", "images_per_s", "data_wait", "step")

    def __init__(self, run: str) -> None:
        from ray.util.metrics import Gauge

        self._tags = {"run": run}
        self._gauges = {
            name: Gauge(f"lookalike_train_{name}", f"{name} of the last step logged", ("run",)) for name in self.NAMES
        }
        self._task = Gauge("lookalike_train_task_loss", "loss of one task", ("run", "task"))

    def set(self, values: Mapping[str, float]) -> None:
        """Set the values named in ``NAMES``, and ``loss_<task>`` under the task's name."""
        for name, value in values.items():
            if name in self._gauges:
                self._gauges[name].set(value, self._tags)
            elif name.startswith("loss_"):
                self._task.set(value, {**self._tags, "task": name.removeprefix("loss_")})
