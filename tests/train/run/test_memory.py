"""Memory reckoned before a run bounds what a step is then seen to take."""

from typing import Any

import pytest
import torch

from lookalike.errors import UsageError
from lookalike.train.run.memory import require_memory, task_memory
from lookalike.train.tasks import TaskConfig, build_tasks

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


def measure(config: TaskConfig) -> int:
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
    expected, found = memory.gradients + memory.activations, measure(config)
    assert 0.95 * found < expected < (4.0 if config.kind == "contrastive" else 2.5) * found


def test_shards_divide_what_a_worker_holds() -> None:
    config = TaskConfig(kind="normalized_softmax", field="category", shard=True)
    whole, part = (task_memory(config, DIMS, 8_000_000, rows=64, world=world) for world in (1, 8))
    assert whole.parameters == 8 * part.parameters
    assert whole.optimizer == 2 * whole.parameters
    assert part.total < whole.total / 7


def test_too_many_proxies_are_refused_with_what_would_help() -> None:
    configs = {
        "identity": TaskConfig(kind="normalized_softmax", field="group"),
        "category": TaskConfig(kind="softmax", field="category"),
    }
    counts = {"group": 20_000_000, "category": 100}
    kwargs: dict[str, Any] = {"rows": 128, "world": 4, "slots": 2}
    found = require_memory(configs, DIMS, counts, **kwargs)
    assert found["identity"].parameters == 20_000_000 * 120 * 4
    assert require_memory(configs, DIMS, counts, **kwargs, limit_gib=64) == found
    with pytest.raises(UsageError) as caught:
        require_memory(configs, DIMS, counts, **kwargs, limit_gib=16)
    message = str(caught.value)
    assert "more than compute.task_memory_gib 16; the largest is 'identity' over 20,000,000 classes with 3" in message
    assert "(parameters 8.94, gradients 8.94, optimizer 17.88, activations " in message
    assert "nesting: mrl-e (19." in message
    assert "shard: true over the 4 workers (" in message
    assert "sample_classes" not in message or "sample_classes: 8192 (" in message
