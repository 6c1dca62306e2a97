"""Steps of the training loop in one process: resumption, accumulation, averaged weights, probes, bad losses, curves."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lookalike.errors import LookalikeError, UsageError
from lookalike.train.run import loop
from lookalike.train.run.checkpoints import Checkpoint, find_checkpoints, last_checkpoint
from lookalike.train.run.curves import CURVE_POINTS, Curve, NonFiniteLossError, StepValues
from lookalike.train.run.loop import Place
from lookalike.train.run.optimizer import require_batch_norm_rows
from lookalike.train.run.settings import LoopConfig
from lookalike.train.run.state import Training, export_weights
from lookalike.train.tasks import MultiTaskModel
from lookalike.vision.encoder import build_model
from tests.train.conftest import Bench


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class Killed(BaseException):
    """Ends a run between two steps, as a signal would."""


def train_and_kill(bench: Bench, config: LoopConfig, folder: Path, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run until just before the weights change for the ``at``-th time."""
    update = Training.update

    def killing(self: Training, step: int) -> None:
        if step == at:
            raise Killed
        update(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "update", killing)
        with pytest.raises(Killed):
            bench.train(config, folder)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"optimizer": {"kind": "sgd", "nesterov": True}, "schedule": {"kind": "step", "drop_epochs": [1.0]}},
        {
            "optimizer": {"kind": "lars", "lr": 0.1, "ema_decay": 0.9},
            "compute": {"accumulation": 2},
            "backbone": {"freeze_batch_norm": False},
        },
    ],
)
def test_a_resumed_run_ends_with_the_same_weights_and_curve(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    config = bench.config(**settings)
    calm = bench.train(config, tmp_path / "calm")
    train_and_kill(bench, config, tmp_path / "killed", 7, monkeypatch)
    found = last_checkpoint(str(tmp_path / "killed"))
    assert found is not None
    assert found.step == 4
    training = bench.begin(config)
    training.resume(found, 0, 1)
    bench.train(config, tmp_path / "killed", training)
    assert same(weights(training.model), weights(calm.model))
    assert training.curve.points == calm.curve.points
    assert [point["step"] for point in calm.curve.points] == [float(s) for s in range(1, config.total_steps + 1)]
    last = [last_checkpoint(str(tmp_path / name)) for name in ("calm", "killed")]
    states = [found.read() for found in last if found]
    assert len(states) == 2
    for state in states:
        state.pop("pace")
    assert json.dumps(states[0]["optimizer"]["param_groups"]) == json.dumps(states[1]["optimizer"]["param_groups"])
    if config.train.optimizer.ema_decay:
        assert same(states[0]["average"], states[1]["average"])


def test_old_checkpoints_go(bench: Bench, tmp_path: Path) -> None:
    bench.train(bench.config(checkpoint_every=2), tmp_path / "run")
    steps = [found.step for found in find_checkpoints(str(tmp_path / "run"))]
    assert steps == [10, 12]


def count_labelled(labels: torch.Tensor) -> int:
    return int((labels >= 0).reshape(len(labels), -1).any(dim=1).sum())


def test_accumulated_parts_give_the_gradient_of_the_step(bench: Bench, tmp_path: Path) -> None:
    """Two parts of four rows against the same rows by hand: each task's sum over its labelled rows, divided once."""
    config = bench.config(compute={"accumulation": 2}, optimizer={"clip_norm": None})
    training = bench.begin(config)
    place = Place(config, 0, 1, torch.device("cpu"), str(tmp_path))
    batches = list(loop.Feed(place, training.model, 0, loop.Pace(8)).step())
    assert [last for _, _, last in batches] == [False, True]
    assert [len(batch["images"]) for batch, _, _ in batches] == [4, 4]
    shares, norm, _ = loop.forward_backward(training, training.model, iter(batches), place)
    found = {name: p.grad.clone() for name, p in training.model.named_parameters() if p.grad is not None}
    training.model.zero_grad()
    tasks, total = training.model.tasks, torch.zeros(())
    counts = {
        name: [count_labelled(batch[config.train.tasks[name].field]) for batch, _, _ in batches] for name in tasks
    }
    for part, (batch, _, _) in enumerate(batches):
        embedding = training.model.encoder(batch["images"])
        losses = [tasks[name](embedding, batch) * counts[name][part] / sum(counts[name]) for name in tasks]
        total = total + torch.stack(losses).sum()
    total.backward()
    for name, parameter in training.model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6)
    assert float(shares["loss"]) == pytest.approx(float(total), rel=1e-6)
    length = torch.stack([gradient.square().sum() for gradient in found.values()]).sum().sqrt()
    assert float(norm) == pytest.approx(float(length), rel=1e-4)
    assert float(shares["loss"]) == pytest.approx(sum(float(v) for k, v in shares.items() if k != "loss"), rel=1e-5)


def test_the_average_follows_the_weights_and_is_what_is_exported(bench: Bench, tmp_path: Path) -> None:
    config = bench.config(optimizer={"ema_decay": 0.9, "lr": 1e-2})
    training = bench.begin(config)
    expected: dict[str, torch.Tensor] = {}
    update = training.update

    def following(step: int) -> None:
        update(step)
        decay = 0.0 if step <= 1 else min(0.9, 1 - (1 + (step - 1)) ** (-2 / 3))
        for name, value in training.model.state_dict().items():
            if value.is_floating_point():
                expected[name] = value.clone() if name not in expected else expected[name].lerp(value, 1 - decay)

    training.update = following  # type: ignore[method-assign]
    bench.train(config, tmp_path / "run", training)
    found = last_checkpoint(str(tmp_path / "run"))
    assert found is not None
    encoder = build_model(config.encoder)
    export_weights(found.read(), encoder)
    for name, value in encoder.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, expected[f"encoder.{name}"], rtol=1e-4, atol=1e-5)
    assert not same(weights(encoder), weights(training.model.encoder))


def test_without_an_average_the_weights_are_exported(bench: Bench, tmp_path: Path) -> None:
    config = bench.config()
    training = bench.train(config, tmp_path / "run")
    found = last_checkpoint(str(tmp_path / "run"))
    assert found is not None
    encoder = build_model(config.encoder)
    export_weights(found.read(), encoder)
    assert same(weights(encoder), weights(training.model.encoder))


def test_a_probe_leaves_the_backbone_as_it_is(bench: Bench, tmp_path: Path) -> None:
    config = bench.config(backbone={"trainable": "probe", "freeze_batch_norm": False})
    training = bench.begin(config)
    before = weights(training.model)
    bench.train(config, tmp_path / "run", training)
    after = weights(training.model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all(name.startswith(("encoder.projection", "tasks.")) for name in moved)  # no batch-norm statistics either
    assert not any(p.requires_grad for p in training.model.encoder.backbone.parameters())  # type: ignore[union-attr]


def test_recomputed_activations_and_bfloat16(bench: Bench, tmp_path: Path) -> None:
    plain = bench.train(bench.config(), tmp_path / "plain")
    config = bench.config(compute={"activation_checkpointing": True})
    training = bench.begin(config)
    loop.recompute_activations(training.model.encoder.backbone)  # type: ignore[arg-type]
    bench.train(config, tmp_path / "recomputed", training)
    assert same(weights(training.model), weights(plain.model))
    low = bench.train(bench.config(compute={"precision": "bfloat16"}), tmp_path / "low")
    gap = abs(low.curve.points[0]["loss"] / plain.curve.points[0]["loss"] - 1)
    assert 0 < gap < 0.02


@pytest.mark.parametrize("when", ["loss", "gradient"])
def test_a_loss_that_is_no_number_stops_with_step_images_and_checkpoint(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    forward = MultiTaskModel.forward

    class Spoil(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
            return value * (float("nan") if when == "loss" else 1.0)

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> Any:
            return grads[0] * float("nan")

    read: list[str] = []

    def spoiled(self: MultiTaskModel, batch: Any, step: int, shares: Any) -> Any:
        total, losses = forward(self, batch, step, shares)
        read[:] = batch["ids"]
        return (Spoil.apply(total) if step == 5 else total), losses  # type: ignore[no-untyped-call]

    monkeypatch.setattr(MultiTaskModel, "forward", spoiled)
    with pytest.raises(NonFiniteLossError) as caught:
        bench.train(bench.config(), tmp_path / "run")
    message = str(caught.value)
    assert f"the {when} is not finite at step 6 on rank 0, images {', '.join(read)};" in message
    assert f"the last good checkpoint is {tmp_path}/run/step-00000004" in message
    assert "lower optimizer.lr" in message
    found = last_checkpoint(str(tmp_path / "run"))
    assert found is not None
    assert found.step == 4
    assert all(value.isfinite().all() for value in found.read()["model"].values())


def test_dropout_follows_the_place_in_the_data(bench: Bench, tmp_path: Path) -> None:
    """What a forward pass draws is the same whoever comes to a micro-batch, whatever was drawn before."""
    config = bench.config(workers={"num": 2}, compute={"accumulation": 2}, batch_size=16)
    model = bench.begin(config).model

    def draws(rank: int, world: int, done: int) -> dict[tuple[int, int, int], float]:
        place = Place(config, rank, world, torch.device("cpu"), str(tmp_path))
        feed, found = loop.Feed(place, model, done, loop.Pace(16)), {}
        for step in range(done, 3):
            keys = [(step, stream, part) for stream in place.streams for part in (0, 1)]
            for key, _ in zip(keys, feed.step(), strict=True):
                found[key] = float(torch.rand(1))
                torch.rand(len(found))
        return found

    alone = draws(0, 1, 0)
    assert len(set(alone.values())) == 12
    assert {**draws(0, 2, 0), **draws(1, 2, 0)} == alone
    assert draws(0, 1, 2) == {key: value for key, value in alone.items() if key[0] == 2}


def test_a_scaled_loss_changes_nothing_and_an_overflow_skips_the_step(bench: Bench, tmp_path: Path) -> None:
    """The path of float16, on a CPU: a power of two scales exactly, and infinite gradients are no reason to stop."""
    plain = bench.train(bench.config(optimizer={"clip_norm": None}), tmp_path / "plain")
    training = bench.begin(bench.config(optimizer={"clip_norm": None}))
    training.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)  # type: ignore[attr-defined]
    bench.train(bench.config(optimizer={"clip_norm": None}), tmp_path / "scaled", training)
    for name, value in plain.model.state_dict().items():
        torch.testing.assert_close(training.model.state_dict()[name], value, rtol=1e-5, atol=1e-6)
    wild = bench.begin(bench.config())
    wild.scaler = torch.amp.GradScaler("cpu", init_scale=1e38)  # type: ignore[attr-defined]
    before = weights(wild.model)
    place = Place(bench.config(), 0, 1, torch.device("cpu"), str(tmp_path))
    feed = loop.Feed(place, wild.model, 0, loop.Pace(8))
    _, norm, _ = loop.forward_backward(wild, wild.model, feed.step(), place)
    assert not norm.isfinite()
    wild.update(1)
    trained = {name for name, _ in wild.model.named_parameters()}
    assert all(torch.equal(before[name], value) for name, value in wild.model.state_dict().items() if name in trained)
    assert wild.scaler.get_scale() == pytest.approx(5e37)
    wild.scaler = torch.amp.GradScaler("cpu", init_scale=1e38, backoff_factor=1e-12)  # type: ignore[attr-defined]
    bench.train(bench.config(), tmp_path / "wild", wild)  # the scale comes down and training goes on
    assert 2 <= wild.skipped < 12
    assert wild.schedule.last_epoch == 12 - wild.skipped  # it does not advance on a skipped step
    assert not any(torch.equal(before[name], p) for name, p in wild.model.named_parameters() if "projection" in name)
    found = last_checkpoint(str(tmp_path / "wild"))
    assert found is not None
    assert found.read()["skipped"] == (wild.skipped, 0)
    assert all(math.isfinite(value) for point in wild.curve.points for value in point.values())
    json.dumps(wild.curve.points, allow_nan=False)
    again = bench.begin(bench.config())
    again.scaler = torch.amp.GradScaler("cpu")  # type: ignore[attr-defined]
    again.resume(found, 0, 1)
    assert again.scaler.get_scale() == wild.scaler.get_scale() < 1e37


def test_a_run_that_float16_skips_is_not_published(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gradient that is no number at any scale ends the run; so does a run of which most steps were skipped."""
    hopeless = bench.begin(bench.config())
    hopeless.scaler = torch.amp.GradScaler("cpu", init_scale=1e38)  # type: ignore[attr-defined]
    with pytest.raises(NonFiniteLossError, match="float16 overflowed in 12 of 12 steps"):
        bench.train(bench.config(), tmp_path / "hopeless", hopeless)
    monkeypatch.setattr("lookalike.train.run.state.MAX_SKIPPED", 5)
    endless = bench.begin(bench.config())
    endless.scaler = torch.amp.GradScaler("cpu", init_scale=1e38)  # type: ignore[attr-defined]
    with pytest.raises(NonFiniteLossError, match=r"each of the 5 steps up to 5, .*compute.precision=bfloat16"):
        bench.train(bench.config(), tmp_path / "endless", endless)


def test_the_progress_says_what_comes_before_the_first_step(bench: Bench) -> None:
    told: list[tuple[int, str]] = []
    progress = SimpleNamespace(update=SimpleNamespace(remote=lambda *position: told.append(position)))
    for rank in (0, 1):
        place = Place(bench.config(), rank, 2, torch.device("cpu"), "unused", progress)
        loop.announce(place, None)
        loop.announce(place, Checkpoint("unused", 50, 2))
    assert told == [(0, "initialising"), (50, "resuming")]


def test_a_curve_has_a_bounded_number_of_points() -> None:
    total = 12 * CURVE_POINTS + 7
    curve, twin = Curve(total), Curve(total)
    for step in range(1, total + 1):
        taken = StepValues(step, {"loss": float(step), "lr": 1.0 / step})
        curve.add(taken)
        twin.add(taken)
        if step % 100 == 0:  # a checkpoint between points loses nothing
            state = json.loads(json.dumps(twin.state()))
            twin = Curve(total)
            twin.load(state)
    assert curve.points == twin.points
    assert len(curve.points) == CURVE_POINTS + 1
    assert curve.points[0] == {"step": 12.0, "loss": 6.5, "lr": 1 / 12}
    assert curve.points[-1]["step"] == total


def test_a_run_that_taught_a_task_nothing_is_not_published(bench: Bench, tmp_path: Path) -> None:
    """One view of each picture leaves a loss of views without a pair from the first step to the last."""
    pairs = {"kind": "contrastive", "field": "row", "temperature": 0.1}
    loader = {"views": 2, "resample": False}
    config = bench.config(tasks={"category": {"kind": "softmax", "field": "category"}, "pairs": pairs}, loader=loader)
    bench.train(config, tmp_path / "two")
    one_view = config.train.loader.model_copy(update={"views": 1})  # which settings refuse
    lone = config.model_copy(update={"train": config.train.model_copy(update={"loader": one_view})})
    with pytest.raises(LookalikeError, match=r"task 'pairs' learned nothing: its loss was 0 in all .* drop the task"):
        bench.train(lone, tmp_path / "one")


def test_a_projection_wider_than_the_features_has_no_start_by_pca(bench: Bench, tmp_path: Path) -> None:
    wide: dict[str, Any] = {"embedding_dim": 512, "dims": [8, 512]}
    with pytest.raises(UsageError, match=r"embedding_dim 512 is wider than the backbone's 256 features.*method=random"):
        bench.config(**wide, initialise={"method": "data"})
    assert bench.train(bench.config(**wide, initialise={"method": "random"}), tmp_path).step == 12


def test_batch_norm_that_trains_needs_two_rows(bench: Bench) -> None:
    tasks = {"category": {"kind": "softmax", "field": "category"}}
    alone: dict[str, Any] = {"tasks": tasks, "mix": {"catalogue": 1}, "batch_size": 4, "compute": {"accumulation": 4}}
    moving = bench.config(**alone, backbone={"freeze_batch_norm": False})
    with pytest.raises(UsageError, match=r"one row \(batch_size 4 in 4 parts\), and batch norm needs two"):
        require_batch_norm_rows(bench.begin(moving).model, moving.train)
    still = bench.config(**alone)
    require_batch_norm_rows(bench.begin(still).model, still.train)
