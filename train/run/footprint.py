"""Memory of a training step, reckoned before it runs.

``task_memory`` counts by formula what a task takes on one worker; it grows with the label space, so a run above
``compute.task_memory_gib`` is refused. ``measure`` runs a whole step on tensors that have shapes but no content
(torch's fake tensors), which costs neither memory nor a GPU, and counts what autograd keeps; a view costs nothing.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: PLC2701  # torch documents it under this name
from torch.autograd.graph import saved_tensors_hooks

from lookalike.errors import UsageError
from lookalike.train.feed.loader import attribute_fields
from lookalike.train.run.optimizer import freeze, set_train_mode
from lookalike.train.run.settings import TrainConfig
from lookalike.train.tasks import TASKS, ClassTask, MultiTaskModel, Task, TaskConfig, build_tasks
from lookalike.vision.encoder import EmbeddingModel, EncoderConfig, build_model
from lookalike.vision.tuning import recompute_activations

FLOAT = 4
PAIR_MATRICES = 12
"""Matrices [n, n] that a task of pairs keeps for each nested dim, about."""
LABELS_PER_ROW = 4
"""Labels of a row in the batch that is measured; the loss needs next to nothing for each."""


class TaskMemory(NamedTuple):
    """Bytes on one worker. They are not all held at the same moment: the sum is an upper bound of the peak."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return sum(self)

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {value / 2**30:.2f}" for name, value in self._asdict().items())
        return f"{self.total / 2**30:.2f} GiB ({parts})"


def task_memory(
    config: TaskConfig, dims: tuple[int, ...], num_classes: int, *, rows: int, world: int = 1, slots: int = 2
) -> TaskMemory:
    """Memory of one task on a worker of ``world`` with ``rows`` rows of float32 embeddings nested at ``dims``.

    ``slots``: tensors the optimizer keeps for each parameter.
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
        scores = ((2 if cosine else 1) * len(dims) + 3) * min(scored, config.class_chunk)
        embeddings = 3 * gathered * dims[-1]
    else:
        scores = ((4 if cosine else 2) * len(dims) + 2) * scored
        embeddings = rows * width
        copies += 2 * FLOAT * scored * width if cosine else 0
    activations = FLOAT * (gathered * scores + embeddings) + copies
    return TaskMemory(weights, weights, slots * weights, activations)


def require_memory(train: TrainConfig, dims: tuple[int, ...], num_classes: Mapping[str, int]) -> dict[str, TaskMemory]:
    """Memory of every task on a worker. Raises ``UsageError`` with remedies if the sum is above the limit."""
    world, limit_gib = train.workers.num, train.compute.task_memory_gib

    def reckon(config: TaskConfig) -> TaskMemory:
        classes = num_classes.get(config.field, 0)
        return task_memory(config, dims, classes, rows=train.micro_batch, world=world, slots=train.optimizer.slots)

    tasks = {name: reckon(config) for name, config in train.tasks.items()}
    total = sum(memory.total for memory in tasks.values()) / 2**30
    if limit_gib is None or total <= limit_gib:
        return tasks
    name = max(tasks, key=lambda task: tasks[task].total)
    config, remedies = train.tasks[name], []
    for text, change in (
        ("nesting: mrl-e", {"nesting": "mrl-e"}),
        (f"shard: true over the {world} workers", {"shard": True}),
        ("sample_classes: 8192", {"sample_classes": 8192}),
        ("class_chunk: 1024", {"class_chunk": 1024}),
    ):
        after = reckon(config.model_copy(update=change)).total
        if after < tasks[name].total and set(change) <= set(TASKS.get(config.kind).settings):
            remedies.append(f"{text} ({after / 2**30:.2f} GiB)")
    raise UsageError(
        f"the tasks need {total:.2f} GiB a worker, more than compute.task_memory_gib {limit_gib:g}; the largest is "
        f"{name!r} over {num_classes.get(config.field, 0):,} classes with {tasks[name]}. For it set "
        f"{', or '.join([*remedies, 'a smaller batch_size'])}"
    )


@dataclass(frozen=True)
class StepMemory:
    """Bytes that a worker holds at the end of a forward pass, when most is held."""

    parameters: int
    gradients: int
    """Gradients of the trained parameters."""
    buckets: int
    """DDP's copy of the gradients, with more than one worker."""
    optimizer: int
    average: int
    teacher: int
    batch: int
    """One micro-batch of images."""
    encoder_activations: int
    head_activations: int
    unknown: tuple[str, ...] = ()
    """Tasks whose activations depend on the labels' values and are left out."""

    @property
    def parts(self) -> dict[str, int]:
        return {name: value for name, value in asdict(self).items() if name != "unknown"}

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def checkpoint(self) -> int:
        """The copy, in the host's memory, from which a thread writes a checkpoint; the first worker's alone."""
        return self.parameters + self.optimizer + self.average


def describe(memory: StepMemory, train: TrainConfig, encoder: EncoderConfig) -> list[str]:
    """Text lines of ``memory``, the largest parts first."""
    size = encoder.transform.size
    place = "of a GPU" if train.workers.use_gpu else "of a machine"
    parts = sorted((part for part in memory.parts.items() if part[1]), key=lambda part: -part[1])
    lines = [
        f"memory {place}, one step of a worker: {train.micro_batch} images of {size} x {size}, "
        f"{train.compute.precision}"
    ]
    lines += [f"  {name.replace('_', ' '):<20}{_mib(value)}" for name, value in parts]
    lines += [
        f"  {'total':<20}{_mib(memory.total)}, for each of {train.workers.num} workers; temporary memory of "
        "kernels and the libraries themselves come on top"
    ]
    lines += [f"  {'checkpoint':<20}{_mib(memory.checkpoint)} more in the first worker's host while one is written"]
    if memory.unknown:
        lines += [f"  left out: activations of {', '.join(memory.unknown)}, which depend on the labels"]
    return lines


def _mib(size: int) -> str:
    return f"{size / (1 << 20):10.1f} MiB"


def measure(
    train: TrainConfig, encoder: EncoderConfig, num_classes: Mapping[str, int], teacher: EncoderConfig | None = None
) -> StepMemory:
    """Memory of one step of one worker, all heads held whole."""
    with torch.device("meta"):
        network = build_model(encoder)
        weights = train.nested_weights or (1.0,) * len(encoder.dims)
        model = MultiTaskModel(network, build_tasks(train.tasks, encoder.dims, num_classes, weights))
        teacher_size = _bytes(build_model(teacher)) if teacher else 0
    freeze(model, train.backbone)
    if train.compute.activation_checkpointing:
        recompute_activations(network.backbone)
    set_train_mode(model, train.backbone)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")  # fake tensors that claim to lie on the CPU: its kernels, and what they keep
        batch = _fake_batch(train, encoder.transform.size, teacher.dim if teacher else 1)
        activations = _activations(model, network, batch, train.compute.dtype)
    gradients = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    return StepMemory(
        parameters=_bytes(model),
        gradients=gradients,
        buckets=gradients if train.workers.num > 1 else 0,
        optimizer=gradients * train.optimizer.slots,
        average=_bytes(network) if train.optimizer.ema_decay is not None else 0,
        teacher=teacher_size,
        batch=batch["images"].nbytes,
        encoder_activations=activations.encoder,
        head_activations=activations.heads,
        unknown=activations.unknown,
    )


def _bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def _fake_batch(train: TrainConfig, size: int, teacher_dim: int) -> dict[str, torch.Tensor]:
    rows, attributes = train.micro_batch, attribute_fields(task.field for task in train.tasks.values())
    labels = {name: torch.zeros(rows, dtype=torch.int64) for name in ("category", "group", "row", *attributes)}
    return {
        "images": torch.empty(rows, 3, size, size),
        "teacher": torch.empty(rows, teacher_dim),
        **labels,
        "labels": torch.zeros(rows, LABELS_PER_ROW, dtype=torch.int64),
    }


class _Activations(NamedTuple):
    encoder: int
    heads: int
    unknown: tuple[str, ...]


def _activations(
    model: MultiTaskModel, network: EmbeddingModel, batch: dict[str, torch.Tensor], dtype: torch.dtype | None
) -> _Activations:
    """Bytes kept for the backward pass."""
    unknown: list[str] = []
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None), count_saved(model) as saved_bytes:
        embedding = network(batch["images"])
        body = saved_bytes()
        for name, task in model.tasks.items():
            assert isinstance(task, Task)
            try:
                task(embedding, batch)
            except RuntimeError:  # its loss picks rows by the labels' values
                unknown.append(name)
        return _Activations(body, saved_bytes() - body, tuple(unknown))


def storage_number(storage: torch.UntypedStorage) -> int:
    """A number that identifies a storage while it lives."""
    return int(storage._cdata)  # noqa: SLF001  # a fake tensor's storage has no address


@contextmanager
def count_saved(model: nn.Module) -> Iterator[Callable[[], int]]:
    """Yield a function that returns the bytes autograd has kept within the block, without the model's own tensors."""
    own = {storage_number(tensor.untyped_storage()) for tensor in (*model.parameters(), *model.buffers())}
    storages: dict[int, torch.UntypedStorage] = {}  # held, so that no storage's number is used twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage_number(storage) not in own:
            storages[storage_number(storage)] = storage
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield lambda: sum(storage.nbytes() for storage in storages.values())
