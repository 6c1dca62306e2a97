"""Encoder and tasks as one module, and the building of tasks."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from lookalike.seeds import derive_seed
from lookalike.train.losses.proxies import sum_workers
from lookalike.train.tasks.base import TASKS, Batch, Task, TaskConfig

Shares = dict[str, torch.Tensor]
"""Task -> the share [t] that a batch has in each of the task's means over a step, float64."""


class MultiTaskModel(nn.Module):
    """Encoder and tasks as one module, so that DDP wraps both."""

    def __init__(self, encoder: nn.Module, tasks: Mapping[str, Task]) -> None:
        super().__init__()
        self.encoder = encoder
        self.tasks = nn.ModuleDict(tasks)

    def forward(
        self, batch: Batch, step: int = 0, shares: Shares | None = None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Total loss and detached losses by task. The batch holds ``images``; the step seeds the tasks' random draws.

        With ``shares``, which ``step_shares`` returns, the losses are the batch's part of the losses of a step.
        """
        embedding, shares = self.encoder(batch["images"]), shares or {}
        losses = {name: task(embedding, batch, step, shares.get(name)) for name, task in self.tasks.items()}
        total = torch.stack([task.config.weight * losses[name] for name, task in self._tasks()]).sum()
        return total, {name: loss.detach() for name, loss in losses.items()}

    def step_shares(self, batches: Sequence[Batch]) -> list[Shares]:
        """For each of a worker's batches of a step, each task's shares [t] of the step's means.

        A share is what the batch counts over what all batches of all workers count, so that a step's loss does not
        depend on how its rows are cut into batches. Every worker must call this.
        """
        device = next(self.parameters()).device
        counts = [[task.counts(batch).to(device) for _, task in self._tasks()] for batch in batches]
        flat = torch.stack([torch.cat(own) for own in counts]).double()
        shares = flat / sum_workers(flat.sum(dim=0)).clamp_min(1)
        sizes = [len(own) for own in counts[0]]
        return [dict(zip(self.tasks, own.split(sizes), strict=True)) for own in shares]

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
