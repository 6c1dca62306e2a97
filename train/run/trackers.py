"""Curves of a run while it trains: TensorBoard, MLflow, Weights & Biases, or a tracker of your own.

A tracker lives on the first worker. After a crash the run continues from its last checkpoint and logs some points
twice; each tracker is told at which step the run (re)starts, and continues the existing curves.
"""

import importlib.util
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from lookalike import storage
from lookalike.errors import UsageError
from lookalike.registry import Registry


@dataclass(frozen=True)
class TrackedRun:
    """The run whose points a tracker logs."""

    name: str
    fingerprint: str
    root: str
    """Root of the run's artifacts; trackers write their files below it."""
    start: int
    """Steps done already; later points are still to come."""
    settings: Mapping[str, Any]
    """The training settings, as plain values."""


class Tracker(Protocol):
    """Logs points; it must not change the training."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Add the values at ``step`` to their curves."""

    def close(self) -> None:
        """Write buffered points and end."""


FLUSH_S = 2
"""Seconds until TensorBoard shows a point."""
TRACKERS: Registry[Callable[[TrackedRun], Tracker]] = Registry("tracker")


def start_trackers(names: Sequence[str], run: TrackedRun) -> list[Tracker]:
    """The trackers named, and TensorBoard if it is installed and the root is a local disk."""
    wanted = list(dict.fromkeys(names))
    if "tensorboard" not in wanted and importlib.util.find_spec("tensorboardX") and storage.is_local(run.root):
        wanted.append("tensorboard")
    return [TRACKERS.get(name)(run) for name in wanted]


def dotted(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The settings with one key per value: ``optimizer.lr``."""
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from dotted(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _require(module: str, tracker: str, extra: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise UsageError(f"tracker {tracker!r} needs {module}; pip install 'lookalike[{extra}]', or drop the tracker")


@TRACKERS.register("tensorboard")
class TensorBoard:
    """Event files under ``<root>/tensorboard/<name>-<fingerprint>``; a root that is no local disk is refused."""

    def __init__(self, run: TrackedRun) -> None:
        _require("tensorboardX", "tensorboard", "tracking")
        if not storage.is_local(run.root):
            raise UsageError(
                f"tracker 'tensorboard' writes only to a local disk, and the root is {run.root}; use mlflow "
                "or wandb, or drop it"
            )
        from tensorboardX import SummaryWriter

        folder = storage.join(run.root, "tensorboard", f"{run.name}-{run.fingerprint}")
        self._writer = SummaryWriter(
            storage.local_path(folder), purge_step=run.start + 1 if run.start else None, flush_secs=FLUSH_S
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


@TRACKERS.register("mlflow")
class MLflow:
    """A run named like the artifact, in the store of ``MLFLOW_TRACKING_URI`` or else ``<root>/mlflow.db`` (offline)."""

    def __init__(self, run: TrackedRun) -> None:
        _require("mlflow", "mlflow", "tracking-mlflow")
        if "MLFLOW_TRACKING_URI" not in os.environ and not storage.is_local(run.root):
            raise UsageError(
                f"tracker 'mlflow': set MLFLOW_TRACKING_URI, because the root {run.root} is not a local disk"
            )
        from mlflow import MlflowClient
        from mlflow.entities import Metric

        self._metric = Metric
        place = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{storage.local_path(run.root)}/mlflow.db"
        self._client = MlflowClient(place)
        existing = self._client.get_experiment_by_name("lookalike")
        experiment = existing.experiment_id if existing else self._client.create_experiment("lookalike")
        query = f"tags.fingerprint = '{run.fingerprint}'"
        runs = self._client.search_runs([experiment], query, max_results=1)
        self._run = runs[0].info.run_id if runs else self._begin(experiment, run)

    def _begin(self, experiment: str, run: TrackedRun) -> str:
        created = self._client.create_run(experiment, run_name=run.name, tags={"fingerprint": run.fingerprint})
        for key, value in dotted(run.settings):
            self._client.log_param(created.info.run_id, key, str(value)[:500])
        return str(created.info.run_id)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        self._client.log_batch(self._run, [self._metric(name, value, now, step) for name, value in values.items()])

    def close(self) -> None:
        self._client.set_terminated(self._run)


@TRACKERS.register("wandb")
class WeightsAndBiases:
    """A run with the fingerprint as its id, offline under ``<root>/wandb`` unless ``WANDB_MODE`` says otherwise."""

    def __init__(self, run: TrackedRun) -> None:
        _require("wandb", "wandb", "tracking-wandb")
        import wandb

        folder = storage.local_path(run.root) if storage.is_local(run.root) else None
        self._run = wandb.init(
            project="lookalike",
            name=run.name,
            id=run.fingerprint,
            resume="allow",
            dir=folder,
            mode=os.environ.get("WANDB_MODE", "offline"),
            config=dict(run.settings),
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()
