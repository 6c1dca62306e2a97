"""Tasks: a head and its loss as one module, so that DDP wraps both; several tasks share one embedding.

A batch holds every task's labels for every row; rows whose label a task does not know give it no gradient
(Zhai et al. 2019: the unified embedding).
"""

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field, field_validator
from torch import nn

from lookalike.config import Config
from lookalike.registry import Registry
from lookalike.train.losses import masked_mean, multilabel_softmax_loss, normalized_softmax_loss, softmax_loss
from lookalike.train.matryoshka import NestedCosine, NestedLinear, Nesting, nested_loss

Batch = Mapping[str, torch.Tensor]


class TaskConfig(Config):
    """One task of a multi-task embedding."""

    kind: str
    """Loss and head: multilabel_softmax, softmax, normalized_softmax, or one added to the registry ``task``."""
    field: Literal["labels", "category", "group"]
    """Column of the shards that holds the task's labels."""
    weight: float = Field(1.0, gt=0.0)
    """Weight of the task's loss in the sum."""
    nesting: Nesting = "mrl"
    """``mrl``: a classifier per nested dim; ``mrl-e``: one weight-tied classifier."""
    temperature: float = Field(0.05, gt=0.0, le=1.0)
    """Temperature of normalised softmax."""
    label_smoothing: float = Field(0.0, ge=0.0, lt=1.0)
    """Label smoothing of softmax, inside each nested dim's cross-entropy."""

    @field_validator("kind")
    @classmethod
    def _known(cls, kind: str) -> str:
        TASKS.get(kind)  # an unknown name lists the valid ones
        return kind


class Task(nn.Module):
    """Embeddings [n, D] and a batch -> scalar loss, summed over nested dims."""

    def __init__(self, config: TaskConfig, dims: tuple[int, ...], num_classes: int, weights: tuple[float, ...]) -> None:
        super().__init__()
        self.config, self.weights = config, weights
        self.head = self.build_head(dims, num_classes)

    def build_head(self, dims: tuple[int, ...], num_classes: int) -> nn.Module:
        """The head of the task; most have a linear one."""
        return NestedLinear(dims, num_classes, self.config.nesting)

    def row_losses(self, scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Loss per row [n] at one nested dim."""
        raise AssertionError(f"{type(self).__name__} must define row_losses")

    def forward(self, embedding: torch.Tensor, batch: Batch) -> torch.Tensor:
        """See the class."""
        labels = batch[self.config.field]
        known = (labels >= 0).any(dim=1) if labels.ndim == 2 else labels >= 0
        losses = nested_loss(self.head(embedding), lambda scores: self.row_losses(scores, labels), self.weights)
        return masked_mean(losses, known)


TASKS: Registry[type[Task]] = Registry("task")


@TASKS.register("softmax")
class SoftmaxTask(Task):
    """Cross-entropy over classes."""

    def row_losses(self, scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """See ``losses.softmax_loss``."""
        return softmax_loss(scores, labels, self.config.label_smoothing)


@TASKS.register("multilabel_softmax")
class MultilabelSoftmaxTask(Task):
    """Softmax against 1/k on each of k labels."""

    def row_losses(self, scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """See ``losses.multilabel_softmax_loss``."""
        return multilabel_softmax_loss(scores, labels)


@TASKS.register("normalized_softmax")
class NormalizedSoftmaxTask(Task):
    """Classification by cosine to class proxies: the metric-learning task for instances."""

    def build_head(self, dims: tuple[int, ...], num_classes: int) -> nn.Module:
        """Class proxies."""
        return NestedCosine(dims, num_classes, self.config.nesting)

    def row_losses(self, scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """See ``losses.normalized_softmax_loss``."""
        return normalized_softmax_loss(scores, labels, self.config.temperature)


class MultiTaskModel(nn.Module):
    """Encoder and tasks as one module: (images, batch) -> (total loss, {task: its loss, detached})."""

    def __init__(self, encoder: nn.Module, tasks: Mapping[str, Task]) -> None:
        super().__init__()
        self.encoder = encoder
        self.tasks = nn.ModuleDict(tasks)

    def forward(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """See the class; images stand in the batch under ``images``."""
        embedding = self.encoder(batch["images"])
        losses = {name: task(embedding, batch) for name, task in self.tasks.items()}
        total = torch.stack([task.config.weight * losses[name] for name, task in self._tasks()]).sum()
        return total, {name: loss.detach() for name, loss in losses.items()}

    def _tasks(self) -> list[tuple[str, Task]]:
        return [(name, task) for name, task in self.tasks.items() if isinstance(task, Task)]


def build_tasks(
    configs: Mapping[str, TaskConfig], dims: tuple[int, ...], num_classes: Mapping[str, int],
    nested_weights: tuple[float, ...],
) -> dict[str, Task]:  # fmt: skip
    """The modules of ``configs``; ``num_classes`` maps a label field to its number of classes."""
    return {name: TASKS.get(config.kind)(config, dims, num_classes[config.field], nested_weights)
            for name, config in configs.items()}  # fmt: skip
