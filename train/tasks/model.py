"""Encoder and tasks as one module, and the building of tasks."""

from collections.abc import Mapping

import torch
from torch import nn

from lookalike.seeds import derive_seed
from lookalike.train.tasks.base import TASKS, Batch, Task, TaskConfig


class MultiTaskModel(nn.Module):
    """Encoder and tasks as one module, so that DDP wraps both."""

    def __init__(self, encoder: nn.Module, tasks: Mapping[str, Task]) -> None:
        super().__init__()
        self.encoder = encoder
        self.tasks = nn.ModuleDict(tasks)

    def forward(self, batch: Batch, step: int = 0) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Total loss and detached losses by task. The batch holds ``images``; the step seeds the tasks' random
        draws."""
        embedding = self.encoder(batch["images"])
        losses = {name: task(embedding, batch, step) for name, task in self.tasks.items()}
        total = torch.stack([task.config.weight * losses[name] for name, task in self._tasks()]).sum()
        return total, {name: loss.detach() for name, loss in losses.items()}

    def _tasks(self) -> list[tuple[str, Task]]:
        return [(name, task) for name, task in self.tasks.items() if isinstance(task, Task)]


def build_tasks(
    configs: Mapping[str, TaskConfig],
    dims: tuple[int, ...],
    num_classes: Mapping[str, int],
    nested_weights: tuple[float, ...],
    *,
    seed: int = 0,
    dims_per_step: int | None = None,
) -> dict[str, Task]:
    """One module per task of ``configs``, for an embedding nested at ``dims`` with weights c_m.

    ``num_classes``: field -> number of classes. In a process group, sharded heads hold this worker's part. Dims that
    the embedding lacks raise ``UsageError``.
    """
    weights = dict(zip(dims, nested_weights, strict=True))
    tasks = {}
    for name, config in configs.items():
        own = config.pick_dims(name, dims)
        tasks[name] = TASKS.get(config.kind)(
            config,
            own,
            num_classes.get(config.field, 0),
            tuple(weights[m] for m in own),
            seed=derive_seed(seed, "task", name),
            dims_per_step=dims_per_step,
        )
    return tasks
