"""Trackers: TensorBoard grows while a run trains and goes on after a crash; others are asked for by name."""

import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from lookalike.errors import UsageError
from lookalike.train.run.trackers import TRACKERS, TrackedRun, start_trackers
from tests.train.conftest import Bench


def tracked(root: str, start: int = 0) -> TrackedRun:
    return TrackedRun("tiny", "f" * 20, root, start, {"epochs": 2, "optimizer": {"lr": 0.1}})


def read_curve(folder: Path, name: str) -> dict[int, float]:
    """Points of a curve as TensorBoard shows them: what a restart purged is gone."""
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c  # noqa: F401  (the format is TFRecord)

    points: dict[int, float] = {}
    for file in sorted(folder.iterdir()):
        data, at = file.read_bytes(), 0
        while at < len(data):
            size = int.from_bytes(data[at : at + 8], "little")
            event = Event.FromString(data[at + 12 : at + 12 + size])
            at += 12 + size + 4
            if event.HasField("session_log"):
                points = {step: value for step, value in points.items() if step < event.step}
            points.update([(event.step, v.simple_value) for v in event.summary.value if v.tag == name])
    return points


def test_tensorboard_grows_and_goes_on_after_a_crash(tmp_path: Path) -> None:
    folder = tmp_path / "tensorboard" / f"tiny-{'f' * 20}"
    (first,) = start_trackers((), tracked(str(tmp_path)))
    for step in (1, 2, 3):
        first.log(step, {"loss": float(step), "lr": 0.5})
    deadline = time.monotonic() + 30
    while read_curve(folder, "loss") != {1: 1.0, 2: 2.0, 3: 3.0}:  # before it is closed
        assert time.monotonic() < deadline
        time.sleep(0.1)
    (again,) = start_trackers(("tensorboard",), tracked(str(tmp_path), start=2))
    again.log(3, {"loss": 30.0})
    again.close()
    assert read_curve(folder, "loss") == {1: 1.0, 2: 2.0, 3: 30.0}


def test_a_run_logs_what_it_was_asked_to(bench: Bench, tmp_path: Path) -> None:
    points: list[tuple[int, dict[str, float]]] = []
    runs: list[TrackedRun] = []

    def track(run: TrackedRun) -> Any:
        runs.append(run)
        return SimpleNamespace(log=lambda *point: points.append(point), close=lambda: runs.append(run))

    name = f"memory-{tmp_path.name}"
    TRACKERS.register(name)(track)
    config = bench.config(trackers=[name], log_every=5)
    training = bench.train(config, tmp_path / "run")
    assert [step for step, _ in points] == [5, 10, 12]
    run = TrackedRun(config.name, config.fingerprint, bench.root, 0, config.train.model_dump(mode="json"))
    assert runs == [run, run]  # begun and closed
    for step, values in points:
        row = training.curve.points[step - 1]
        assert {name: values[name] for name in row if name != "step"} == {k: v for k, v in row.items() if k != "step"}
        assert values["images_per_s"] > 0
        assert 0 <= values["data_wait"] <= 1
        assert {"loss_weak", "loss_category", "loss_identity", "grad_norm", "lr"} <= values.keys()
    assert list((Path(bench.root) / "tensorboard").iterdir())


def test_what_is_not_installed_or_cannot_be_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name, extra in (("mlflow", "tracking-mlflow"), ("wandb", "tracking-wandb"), ("tensorboard", "tracking")):
        with pytest.raises(UsageError, match=rf"tracker '{name}' needs .*; pip install 'lookalike\[{extra}\]'"):
            start_trackers((name,), tracked("/nowhere"))
    assert start_trackers((), tracked("/nowhere")) == []
    monkeypatch.undo()
    with pytest.raises(
        UsageError, match=r"tracker 'tensorboard' writes only to a local disk, and the root is memory://"
    ):
        start_trackers(("tensorboard",), tracked("memory://x"))


def test_wandb_is_offline_and_resumes_by_fingerprint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[Any] = []
    fake = ModuleType("wandb")
    fake.__spec__ = SimpleNamespace(name="wandb")  # type: ignore[assignment]
    run = SimpleNamespace(log=lambda values, step: calls.append((step, values)), finish=lambda: calls.append("finish"))
    fake.init = lambda **options: calls.append(options) or run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    tracker = TRACKERS.get("wandb")(tracked(str(tmp_path)))
    tracker.log(3, {"loss": 1.0})
    tracker.close()
    assert calls[0]["mode"] == "offline"
    assert (calls[0]["id"], calls[0]["resume"], calls[0]["dir"]) == ("f" * 20, "allow", str(tmp_path))
    assert calls[1:] == [(3, {"loss": 1.0}), "finish"]


def test_mlflow_keeps_one_run_a_fingerprint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    from mlflow import MlflowClient

    for start, value in ((0, 1.0), (2, 2.0)):
        tracker = TRACKERS.get("mlflow")(tracked(str(tmp_path), start))
        tracker.log(start + 1, {"loss": value})
        tracker.close()
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("lookalike").experiment_id])
    assert [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "loss")] == [(1, 1.0), (3, 2.0)]
    assert run.data.params == {"epochs": "2", "optimizer.lr": "0.1"}
