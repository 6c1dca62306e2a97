"""How much memory the tasks of a training step take on each worker, reckoned before anything is built.

The backbone's share depends on its architecture; the tasks' grows with the label space and is known beforehand.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from lookalike.errors import UsageError
from lookalike.train.tasks import TASKS, ClassTask, TaskConfig

FLOAT = 4
PAIR_MATRICES = 12
"""Matrices [n, n] that a task of pairs keeps for each nested dim, about."""


@dataclass(frozen=True)
class TaskMemory:
    """Bytes on one worker. They are not all held at the same moment: the sum is an upper bound of the peak."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.parameters + self.gradients + self.optimizer + self.activations

    def describe(self) -> str:
        """``3.05 GiB (parameters 0.76, ...)``."""
        parts = ", ".join(
            f"{name} {getattr(self, name) / 2**30:.2f}"
            for name in ("parameters", "gradients", "optimizer", "activations")
        )
        return f"{self.total / 2**30:.2f} GiB ({parts})"


def task_memory(
    config: TaskConfig, dims: tuple[int, ...], num_classes: int, *, rows: int, world: int = 1, slots: int = 2
) -> TaskMemory:
    """What one task takes on a worker of ``world`` with ``rows`` rows of float32 embeddings nested at ``dims``.

    ``slots``: tensors the optimizer keeps for each parameter (2 for AdamW, 1 for SGD with momentum or LARS).
    """
    dims = config.dims or dims
    if not issubclass(TASKS.get(config.kind), ClassTask):
        return TaskMemory(0, 0, 0, FLOAT * len(dims) * PAIR_MATRICES * rows * rows)
    parts = world if config.shard else 1
    classes = -(-num_classes // parts)
    cosine = config.kind in {"normalized_softmax", "binary"}
    width = sum(dims) if config.nesting == "mrl" else dims[-1]
    biases = 0 if cosine else len(dims) if config.nesting == "mrl" else 1
    weights = FLOAT * classes * (width + biases)
    scored = classes if config.sample_classes is None else min(classes, max(1, config.sample_classes // parts))
    copies = FLOAT * scored * (width + biases) if scored < classes else 0
    gathered = rows * parts
    if scored > config.class_chunk or parts > 1 or config.nesting == "mrl-e":
        held = ((2 if cosine else 1) * len(dims) + 3) * min(scored, config.class_chunk)
        embeddings = 3 * gathered * dims[-1]
    else:
        held = ((4 if cosine else 2) * len(dims) + 2) * scored
        embeddings = rows * width
        copies += 2 * FLOAT * scored * width if cosine else 0
    activations = FLOAT * (gathered * held + embeddings) + copies
    return TaskMemory(weights, weights, slots * weights, activations)


def require_memory(
    configs: Mapping[str, TaskConfig],
    dims: tuple[int, ...],
    num_classes: Mapping[str, int],
    *,
    rows: int,
    world: int = 1,
    slots: int = 2,
    limit_gib: float | None = None,
) -> dict[str, TaskMemory]:
    """Every task's memory on a worker; a sum above the limit raises ``UsageError`` with what would help."""

    def reckon(config: TaskConfig) -> TaskMemory:
        return task_memory(config, dims, num_classes.get(config.field, 0), rows=rows, world=world, slots=slots)

    found = {name: reckon(config) for name, config in configs.items()}
    total = sum(memory.total for memory in found.values()) / 2**30
    if limit_gib is None or total <= limit_gib:
        return found
    name = max(found, key=lambda task: found[task].total)
    config, before = configs[name], found[name].total
    changes: list[tuple[str, dict[str, object]]] = [
        ("nesting: mrl-e", {"nesting": "mrl-e"}),
        (f"shard: true over the {world} workers", {"shard": True}),
        ("sample_classes: 8192", {"sample_classes": 8192}),
        ("class_chunk: 1024", {"class_chunk": 1024}),
    ]
    readable = TASKS.get(config.kind).settings
    remedies = []
    for text, change in changes:
        after = reckon(config.model_copy(update=change)).total
        if after < before and set(change) <= set(readable):
            remedies.append(f"{text} ({after / 2**30:.2f} GiB)")
    raise UsageError(
        f"the tasks need {total:.2f} GiB a worker, more than compute.task_memory_gib {limit_gib:g}; the largest is "
        f"{name!r} over {num_classes.get(config.field, 0):,} classes with {found[name].describe()}. For it set "
        f"{', or '.join([*remedies, 'a smaller batch_size'])}"
    )
