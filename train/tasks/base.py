"""Settings of a task, and the base class of all kinds: nested dims, weights c_m, column of the batch."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import Field, field_validator, model_validator
from torch import nn

from lookalike.config import Config
from lookalike.errors import UsageError
from lookalike.registry import Registry, nearest
from lookalike.train.losses.classes import Averaging
from lookalike.train.losses.matryoshka import Nesting, choose_dims
from lookalike.train.losses.pairs import Mining

Batch = Mapping[str, torch.Tensor]
ATTRIBUTE = "attribute."
"""Prefix of a field that is an attribute of the shards: ``attribute.colour``."""
ANY_ATTRIBUTE = ATTRIBUTE + "<name>"
ONE_CLASS = ("category", "group", ANY_ATTRIBUTE)
"""Fields with at most one class per row."""
CLASS_FIELDS = ("labels", *ONE_CLASS)
"""Fields whose values are class ids; the shards say how many."""
FIELDS = (*CLASS_FIELDS, "row", "teacher", "images")


def form_of(field: str) -> str:
    """The name of a field in ``FIELDS``: all attributes share one."""
    return ANY_ATTRIBUTE if len(field) > len(ATTRIBUTE) and field.startswith(ATTRIBUTE) else field


class TaskConfig(Config):
    """One task of a multi-task embedding. Settings that its kind does not read are refused."""

    kind: str
    """Loss and head: a name of the registry ``task`` (see train/README.md)."""
    field: str
    """Column of the batch that the task reads: class ids (``labels``, several per row; ``category``; ``group``;
    ``attribute.colour`` or any other attribute of the shards), ``row`` (a picture's number, the same for its views),
    ``teacher`` (its embedding), or ``images`` for tasks without labels."""
    weight: float = Field(1.0, gt=0.0)
    """Weight of the task's loss in the sum."""
    dims: tuple[int, ...] | None = None
    """Nested dims of this task, smallest first, among the embedding's; None means all. A single dim k makes a task that
    reads only the first k features (the FF-k baseline of Kusupati et al. 2022)."""
    nesting: Nesting = "mrl"
    """``mrl``: a classifier per nested dim; ``mrl-e``: one weight-tied classifier."""
    temperature: float = Field(0.05, gt=0.0, le=1.0)
    """Temperature of normalised softmax, binary codes, contrastive and distillation losses."""
    label_smoothing: float = Field(0.0, ge=0.0, lt=1.0)
    """Label smoothing of softmax, inside each nested dim's cross-entropy."""
    averaging: Averaging = "mean"
    """Multi-label sigmoid: ``mean`` or ``sum`` of the binary cross-entropies of all classes."""
    class_chunk: int = Field(4096, ge=1)
    """Label spaces above this size are scored in chunks of this many classes, once per pass, and the scores not kept;
    weight-tied heads always are, which is also faster."""
    sample_classes: int | None = Field(None, ge=2)
    """Classes scored in a step: the batch's own and random others. None scores all."""
    shard: bool = False
    """Share the classes out over the workers: each holds and scores its part (see ``losses.proxies``)."""
    mining: Mining = "semi_hard"
    """Negatives of triplets; ``distance_weighted`` uses the margin loss."""
    margin: float = Field(0.2, ge=0.0, le=2.0)
    """Margin of triplets, in Euclidean distance; for ``cosine`` the cosine above which negatives are pushed apart."""
    beta: float = Field(1.2, gt=0.0, lt=2.0)
    """Boundary between positive and negative distances of the margin loss."""
    across_workers: bool = False
    """Contrastive: take positives and negatives from the rows of all workers, not only the worker's own."""
    cosine: float = Field(0.0, ge=0.0)
    """Distillation from a nested teacher: weight of ``1 - cos`` to its own prefix, at dims that it has."""

    @field_validator("kind")
    @classmethod
    def _known(cls, kind: str) -> str:
        TASKS.get(kind)  # an unknown name lists the valid ones
        return kind

    @field_validator("field")
    @classmethod
    def _a_field(cls, field: str) -> str:
        if form_of(field) not in FIELDS:
            raise ValueError(f"not a field of a batch{nearest(field, list(FIELDS))}; fields: {', '.join(FIELDS)}")
        return field

    @model_validator(mode="after")
    def _check(self) -> "TaskConfig":
        task = TASKS.get(self.kind)
        if form_of(self.field) not in task.fields:
            raise ValueError(f"kind {self.kind!r} cannot read field {self.field!r}; it reads {', '.join(task.fields)}")
        own = {"kind", "field", "weight", "dims", *task.settings}
        idle = [
            name
            for name, field in type(self).model_fields.items()
            if name not in own and getattr(self, name) != field.default
        ]
        if idle:
            raise ValueError(f"kind {self.kind!r} does not read {', '.join(idle)}; drop it")
        dims = [1] if self.dims is None else list(self.dims)
        if not dims or dims != sorted(set(dims)) or dims[0] < 1:
            raise ValueError(f"dims {dims} must be positive and strictly increasing, for example [8, 16, 32]")
        return self

    def pick_dims(self, name: str, dims: tuple[int, ...]) -> tuple[int, ...]:
        """The task's nested dims, for an embedding nested at ``dims``; other dims raise ``UsageError`` naming the
        task."""
        unknown = [m for m in self.dims or () if m not in dims]
        if unknown:
            raise UsageError(
                f"task {name!r} has dims {list(self.dims or ())}, but the embedding is nested at "
                f"{list(dims)}; drop {', '.join(map(str, unknown))} or add to the "
                "embedding's dims"
            )
        return self.dims or dims


class Task(nn.Module):
    """Embeddings [n, D], a batch and the number of the step -> scalar loss, summed over nested dims.

    A loss is the sum of one or two ``means``, each over ``counts`` rows or pairs. A step that computes a batch in parts
    gives every part its share of each mean: the part's count over the step's.
    """

    fields: ClassVar[tuple[str, ...]] = CLASS_FIELDS
    """Columns the kind can read."""
    settings: ClassVar[tuple[str, ...]] = tuple(name for name in TaskConfig.model_fields if name != "kind")
    """Fields of ``TaskConfig`` that the kind reads besides field, weight and dims; all by default."""

    def __init__(
        self,
        config: TaskConfig,
        dims: tuple[int, ...],
        num_classes: int,
        weights: tuple[float, ...],
        *,
        seed: int = 0,
        dims_per_step: int | None = None,
    ) -> None:
        super().__init__()
        self.config, self.num_classes = config, num_classes
        self.dims, self.weights = dims, dict(zip(dims, weights, strict=True))
        self.seed, self.dims_per_step = seed, dims_per_step
        self.head = self.build_head(dims, num_classes)

    def build_head(self, dims: tuple[int, ...], num_classes: int) -> nn.Module:
        """The task's parameters; most kinds without classes have none."""
        return nn.Identity()

    def active(self, step: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """Nested dims trained in this step, and their weights c_m, which do not depend on how many dims are trained."""
        dims = choose_dims(self.dims, self.dims_per_step, self.seed, step)
        return dims, tuple(self.weights[m] for m in dims)

    def touch(self) -> torch.Tensor:
        """Zero, with a gradient path to every parameter: DDP also waits for those of dims left out of the step."""
        return sum((parameter.reshape(-1)[:1].sum() * 0.0 for parameter in self.parameters()), torch.zeros(()))

    def counts(self, batch: Batch) -> torch.Tensor:
        """What each of ``means`` is a mean over: numbers of rows or pairs, int64 [t], known before any embedding."""
        raise AssertionError(f"{type(self).__name__} must define counts")

    def means(self, embedding: torch.Tensor, batch: Batch, step: int) -> torch.Tensor:
        """The loss as means [t]; zero, with a gradient path, where there is nothing to take a mean over."""
        raise AssertionError(f"{type(self).__name__} must define means")

    def forward(
        self, embedding: torch.Tensor, batch: Batch, step: int = 0, shares: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The loss of the batch, or with ``shares`` [t] its part of a step's loss."""
        means = self.means(embedding, batch, step)
        return means.sum() if shares is None else (means * shares.to(means)).sum()


TASKS: Registry[type[Task]] = Registry("task")
