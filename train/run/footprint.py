"""What one training step needs in memory, known before it runs: for ``--dry-run``.

The step is run on tensors that have shapes and no content (torch's fake tensors), so it costs neither memory nor a GPU.
What autograd keeps for the backward pass is counted by storage, so a view costs nothing.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from lookalike.stages import StageRun
from lookalike.train.feed.loader import attribute_fields
from lookalike.train.run.loop import DTYPES
from lookalike.train.run.optimizer import freeze, set_train_mode
from lookalike.train.run.settings import TrainConfig
from lookalike.train.run.trainer import count_classes, find_files, find_teacher, require_task_memory, resolve_encoder
from lookalike.train.tasks import MultiTaskModel, Task, build_tasks
from lookalike.vision.encoder import EmbeddingModel, EncoderConfig, build_model, read_config
from lookalike.vision.tuning import recompute_activations

LABELS_PER_ROW = 4
"""Labels of a row in the batch that is measured; the loss needs next to nothing for each."""


@dataclass(frozen=True)
class StepMemory:
    """Bytes that a worker holds at the end of a forward pass, when most is held."""

    parameters: int
    gradients: int
    """Those of parameters that train."""
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
    def total(self) -> int:
        """All of it."""
        return sum(value for name, value in vars(self).items() if name != "unknown")

    @property
    def checkpoint(self) -> int:
        """The copy, in the host's memory, from which a thread writes a checkpoint; the first worker's alone."""
        return self.parameters + self.optimizer + self.average


def preview(run: StageRun[TrainConfig]) -> list[str]:
    """The memory of one step as text, a line each; what would stop the run at its start raises ``UsageError`` here."""
    train = run.config
    find_files(train, run.one("shards"))
    teacher = find_teacher(train, run.many("teacher"))
    encoder = resolve_encoder(train, read_config(run.one("encoder")))
    classes = count_classes(train, run.one("shards"), teacher)
    require_task_memory(train, encoder, classes)
    memory = measure(train, encoder, classes, read_config(teacher) if teacher else None)
    return describe(memory, train, encoder)


def describe(memory: StepMemory, train: TrainConfig, encoder: EncoderConfig) -> list[str]:
    """Text lines of ``memory``, the largest parts first."""
    size = encoder.transform.size
    place = "of a GPU" if train.workers.use_gpu else "of a machine"
    parts = sorted((item for item in vars(memory).items() if item[0] != "unknown" and item[1]), key=lambda i: -i[1])
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
    """The memory of one step of one worker, all heads held whole."""
    with torch.device("meta"):
        network = build_model(encoder)
        weights = train.nested_weights or (1.0,) * len(encoder.dims)
        model = MultiTaskModel(network, build_tasks(train.tasks, encoder.dims, num_classes, weights))
        teacher_size = _bytes(build_model(teacher)) if teacher else 0
    freeze(model, train.backbone)
    if train.compute.activation_checkpointing:
        recompute_activations(network.backbone)
    set_train_mode(model, train.backbone)
    with FakeTensorMode():
        _make_fake(model)
        batch = _fake_batch(train, encoder.transform.size, teacher.dim if teacher else 1)
        body, heads, unknown = _activations(model, network, batch, train.compute.precision)
    parameters = _bytes(model)
    gradients = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    return StepMemory(
        parameters=parameters,
        gradients=gradients,
        buckets=gradients if train.workers.num > 1 else 0,
        optimizer=gradients * train.optimizer.slots,
        average=_bytes(network) if train.optimizer.ema_decay is not None else 0,
        teacher=teacher_size,
        batch=batch["images"].nbytes,
        encoder_activations=body,
        head_activations=heads,
        unknown=unknown,
    )


def _bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def _make_fake(model: nn.Module) -> None:
    """Replace the meta device's tensors by ones that claim to lie on the CPU: kernels, and what they keep, are its."""
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                fake = torch.empty(parameter.shape, dtype=parameter.dtype)
                setattr(module, name, nn.Parameter(fake, parameter.requires_grad))
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))


def _fake_batch(train: TrainConfig, size: int, teacher_dim: int) -> dict[str, torch.Tensor]:
    rows, stated = train.micro_batch, attribute_fields(task.field for task in train.tasks.values())
    labels = {name: torch.zeros(rows, dtype=torch.int64) for name in ("category", "group", "row", *stated)}
    return {
        "images": torch.empty(rows, 3, size, size),
        "teacher": torch.empty(rows, teacher_dim),
        **labels,
        "labels": torch.zeros(rows, LABELS_PER_ROW, dtype=torch.int64),
    }


def _activations(
    model: MultiTaskModel, network: EmbeddingModel, batch: dict[str, torch.Tensor], precision: str
) -> tuple[int, int, tuple[str, ...]]:
    """Bytes kept for the backward pass of the encoder, those of the tasks, and the tasks that cannot be known."""
    dtype = DTYPES.get(precision)
    unknown: list[str] = []
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None), count_saved(model) as counted:
        embedding = network(batch["images"])
        body = counted()
        for name, task in model.tasks.items():
            assert isinstance(task, Task)
            try:
                task(embedding, batch)
            except RuntimeError:  # its loss picks rows by the labels' values
                unknown.append(name)
        return body, counted() - body, tuple(unknown)


@contextmanager
def count_saved(model: nn.Module) -> Iterator[Callable[[], int]]:
    """Yields a function that gives the bytes autograd has kept within the block, the model's own tensors left out."""
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}  # held, so that no storage's number is used twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield lambda: sum(storage.nbytes() for storage in kept.values())
