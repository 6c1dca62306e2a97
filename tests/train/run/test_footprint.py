"""Memory of a step: the formula of the tasks bounds their peak; shapes foretell what autograd keeps in a real step."""

from typing import Any

import pytest
import torch

from lookalike.errors import UsageError
from lookalike.train.run.footprint import (
    StepMemory,
    TaskMemory,
    count_saved,
    describe,
    measure,
    require_memory,
    task_memory,
)
from lookalike.train.run.optimizer import build_optimizer, freeze, set_train_mode
from lookalike.train.run.resolve import preview
from lookalike.train.run.settings import TrainConfig
from lookalike.train.tasks import MultiTaskModel, TaskConfig, build_tasks
from lookalike.vision.encoder import EncoderConfig, build_model
from lookalike.vision.transforms import TransformConfig
from lookalike.vision.tuning import recompute_activations
from tests.train.conftest import NUM_CLASSES, TASKS, WIDTHS, Bench

DIMS, CLASSES, ROWS = (8, 16, 32, 64), 1500, 64
COUNTS = {"labels": CLASSES, "category": CLASSES}
CASES = [
    {"kind": kind, "field": field, "nesting": nesting, **more}
    for kind, field in (
        ("softmax", "category"),
        ("multilabel_softmax", "labels"),
        ("multilabel_sigmoid", "labels"),
        ("normalized_softmax", "category"),
    )
    for nesting in ("mrl", "mrl-e")
    for more in ({}, {"class_chunk": 400})
]
CASES += [
    {"kind": "normalized_softmax", "field": "category", "sample_classes": 300},
    {"kind": "triplet", "field": "category"},
    {"kind": "contrastive", "field": "category"},
]


def measure_peak(config: TaskConfig) -> int:
    """Peak of live bytes of one forward and backward pass, gradients included, weights not."""
    task = build_tasks({"t": config}, DIMS, COUNTS, (1.0,) * 4)["t"]
    z = torch.randn(ROWS, 64, requires_grad=True)
    batch = {"labels": torch.randint(0, CLASSES, (ROWS, 3)), "category": torch.randint(0, CLASSES, (ROWS,))}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        task(z, batch).backward()
    live = peak = 0
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    for _, size in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        live += size
        peak = max(peak, live)
    return peak


@pytest.mark.parametrize("values", CASES, ids=lambda values: "-".join(map(str, values.values())))
def test_the_reckoning_bounds_the_peak_and_is_not_far_from_it(values: dict[str, Any]) -> None:
    config = TaskConfig(**values)
    memory = task_memory(config, DIMS, CLASSES, rows=ROWS)
    task = build_tasks({"t": config}, DIMS, COUNTS, (1.0,) * 4)["t"]
    assert memory.parameters == sum(p.numel() * 4 for p in task.parameters())
    expected, found = memory.gradients + memory.activations, measure_peak(config)
    assert 0.95 * found < expected < (4.0 if config.kind == "contrastive" else 2.5) * found


def test_shards_divide_what_a_worker_holds() -> None:
    config = TaskConfig(kind="normalized_softmax", field="category", shard=True)
    whole, part = (task_memory(config, DIMS, 8_000_000, rows=64, world=world) for world in (1, 8))
    assert whole.parameters == 8 * part.parameters
    assert whole.optimizer == 2 * whole.parameters
    assert part.total < whole.total / 7


def test_too_many_proxies_are_refused_with_what_would_help() -> None:
    tasks = {
        "identity": {"kind": "normalized_softmax", "field": "group"},
        "category": {"kind": "softmax", "field": "category"},
    }
    counts = {"group": 20_000_000, "category": 100}

    def require(limit_gib: float | None) -> dict[str, TaskMemory]:
        train = {"tasks": tasks, "batch_size": 512, "workers": {"num": 4}, "compute": {"task_memory_gib": limit_gib}}
        return require_memory(TrainConfig.model_validate({"mix": {"a": 1}, **train}), DIMS, counts)

    memory = require(None)
    assert memory["identity"].parameters == 20_000_000 * 120 * 4
    assert require(64) == memory
    with pytest.raises(UsageError) as caught:
        require(16)
    message = str(caught.value)
    assert "more than compute.task_memory_gib 16; the largest is 'identity' over 20,000,000 classes with 3" in message
    assert "(parameters 8.94, gradients 8.94, optimizer 17.88, activations " in message
    assert "nesting: mrl-e (19." in message
    assert "shard: true over the 4 workers (" in message
    assert "sample_classes" not in message or "sample_classes: 8192 (" in message


def train_settings(**values: Any) -> TrainConfig:
    return TrainConfig.model_validate(
        {"tasks": TASKS, "mix": {"a": 1}, "embedding_dim": 16, "dims": [4, 16], "batch_size": 12, **values}
    )


def encoder_settings(backbone: str, size: int = 64) -> EncoderConfig:
    return EncoderConfig(
        backbone=backbone,
        num_features=WIDTHS[backbone],
        dims=(4, 16),
        projection=True,
        transform=TransformConfig(size=size),
    )


@pytest.mark.parametrize(
    ("backbone", "size", "values"),
    [
        ("test_efficientnet", 64, {}),
        ("test_efficientnet", 64, {"backbone": {"frozen_stages": 1}, "optimizer": {"kind": "sgd"}}),
        ("test_efficientnet", 64, {"backbone": {"trainable": "probe"}}),
        ("test_vit", 160, {"optimizer": {"ema_decay": 0.9}, "workers": {"num": 1}}),
        ("test_vit", 160, {"compute": {"activation_checkpointing": True}}),
        ("test_vit", 160, {"compute": {"precision": "bfloat16"}}),
    ],
)
def test_what_is_foretold_is_what_a_real_step_keeps(backbone: str, size: int, values: dict[str, Any]) -> None:
    train, encoder = train_settings(**values), encoder_settings(backbone, size)
    told = measure(train, encoder, NUM_CLASSES)
    network = build_model(encoder)
    model = MultiTaskModel(network, build_tasks(train.tasks, encoder.dims, NUM_CLASSES, (1.0, 1.0)))
    freeze(model, train.backbone)
    if train.compute.activation_checkpointing:
        recompute_activations(network.backbone)
    set_train_mode(model, train.backbone)
    rows = train.micro_batch
    batch = {
        "images": torch.randn(rows, 3, size, size),
        "labels": torch.randint(0, 5, (rows, 4)),
        "category": torch.randint(0, 3, (rows,)),
        "group": torch.randint(0, 4, (rows,)),
    }
    low = train.compute.precision == "bfloat16"
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=low), count_saved(model) as counted:
        total, _ = model(batch)
        kept = counted()
    optimizer = build_optimizer(model, train.optimizer)
    total.backward()
    optimizer.step()
    moments = sum(v.nbytes for state in optimizer.state.values() for v in state.values() if getattr(v, "ndim", 0))
    gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    whole = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    body = sum(t.nbytes for t in (*model.encoder.parameters(), *model.encoder.buffers()))
    assert told.encoder_activations + told.head_activations == pytest.approx(kept, rel=0.01)
    assert (told.parameters, told.gradients, told.batch) == (whole, gradients, batch["images"].nbytes)
    assert told.optimizer == pytest.approx(moments, abs=4 * len(optimizer.state))  # step counters besides
    assert told.average == (body if train.optimizer.ema_decay else 0)
    assert told.buckets == (gradients if train.workers.num > 1 else 0)
    assert told.unknown == ()
    assert told.total == sum(told.parts.values())


def test_frozen_layers_and_recomputation_save_memory() -> None:
    def told(**values: Any) -> StepMemory:
        return measure(train_settings(**values), encoder_settings("test_vit", 160), NUM_CLASSES)

    plain = told()
    assert told(compute={"activation_checkpointing": True}).encoder_activations < plain.encoder_activations / 2
    halves = told(compute={"accumulation": 2})
    assert halves.encoder_activations == pytest.approx(plain.encoder_activations / 2, rel=0.05)
    probe = told(backbone={"trainable": "probe"})
    assert probe.encoder_activations < plain.encoder_activations / 50
    assert probe.gradients < plain.gradients / 10


def test_a_dry_run_says_what_a_step_needs(bench: Bench) -> None:
    train = train_settings(mix={"catalogue": 1}, batch_size=8)
    lines = preview(bench.run(train))
    assert lines[0] == "memory of a machine, one step of a worker: 4 images of 32 x 32, float32"
    assert any(line.split()[0] == "optimizer" for line in lines)
    (total,) = [line for line in lines if line.strip().startswith("total")]
    assert "for each of 2 workers" in total
    told = measure(train, encoder_settings("test_efficientnet", 32), NUM_CLASSES)
    assert f"{told.total / 2**20:.1f} MiB" in total
    with pytest.raises(UsageError, match=r"mix names dataset 'catalog' \(did you mean 'catalogue'\?\)"):
        preview(bench.run(train_settings(mix={"catalog": 1}, batch_size=8)))
    with pytest.raises(UsageError, match=r"more than compute.task_memory_gib 1e-06"):
        preview(bench.run(train_settings(mix={"catalogue": 1}, batch_size=8, compute={"task_memory_gib": 1e-6})))
    unknown = StepMemory(*[1] * 9, unknown=("pairs",))
    assert "left out: activations of pairs" in describe(unknown, train, encoder_settings("test_vit"))[-1]
