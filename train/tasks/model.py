"""Encoder and tasks as one module, and the check of a batch before it is used."""

from collections.abc import Mapping

import torch
from torch import nn

from lookalike.errors import UsageError
from lookalike.seeds import derive_seed
from lookalike.train.tasks.base import CLASS_FIELDS, TASKS, Batch, Task, TaskConfig

REMEDIES = {"row": "train on two views of every picture (views: 2)", "teacher": "name a teacher to distil from"}


class MultiTaskModel(nn.Module):
    """Encoder and tasks as one module: (batch, step) -> (total loss, {task: its loss, detached})."""

    def __init__(self, encoder: nn.Module, tasks: Mapping[str, Task]) -> None:
        super().__init__()
        self.encoder = encoder
        self.tasks = nn.ModuleDict(tasks)

    def forward(self, batch: Batch, step: int = 0) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """See the class; images stand in the batch under ``images``. The step seeds what tasks draw at random."""
        embedding = self.encoder(batch["images"])
        losses = {name: task(embedding, batch, step) for name, task in self.tasks.items()}
        total = torch.stack([task.config.weight * losses[name] for name, task in self._tasks()]).sum()
        return total, {name: loss.detach() for name, loss in losses.items()}

    def _tasks(self) -> list[tuple[str, Task]]:
        return [(name, task) for name, task in self.tasks.items() if isinstance(task, Task)]


def build_tasks(
    configs: Mapping[str, TaskConfig], dims: tuple[int, ...], num_classes: Mapping[str, int],
    nested_weights: tuple[float, ...], *, seed: int = 0, dims_per_step: int | None = None,
) -> dict[str, Task]:  # fmt: skip
    """The modules of ``configs`` for an embedding nested at ``dims`` with weights c_m.

    ``num_classes`` maps a field of classes to how many there are. Under a process group, sharded heads hold this
    worker's part. Dims that are not the embedding's raise ``UsageError``.
    """
    weights = dict(zip(dims, nested_weights, strict=True))
    tasks = {}
    for name, config in configs.items():
        own = config.pick_dims(name, dims)
        tasks[name] = TASKS.get(config.kind)(
            config, own, num_classes.get(config.field, 0), tuple(weights[m] for m in own),
            seed=derive_seed(seed, "task", name), dims_per_step=dims_per_step,
        )  # fmt: skip
    return tasks


def check_batch(configs: Mapping[str, TaskConfig], num_classes: Mapping[str, int], batch: Batch) -> None:
    """Raise ``UsageError`` when a column that a task reads is missing, or holds a class id that does not exist.

    One smallest and one largest value a column: call it while the batch is still on the CPU.
    """
    for name, config in configs.items():
        if config.field not in batch:
            raise UsageError(f"task {name!r} reads {config.field!r}, which the batches lack; "
                             f"{REMEDIES.get(config.field, 'write the shards again')}")  # fmt: skip
        values = batch[config.field]
        if config.field not in CLASS_FIELDS or not values.numel():
            continue
        low, high = (int(value) for value in values.aminmax())
        limit = num_classes[config.field] - 1
        if low < -1 or high > limit:
            raise UsageError(f"task {name!r}: field {config.field!r} holds {low if low < -1 else high}, but class ids "
                             f"go from 0 to {limit}, and -1 means unknown; the shards do not match their "
                             "classes.json: write them again")  # fmt: skip
