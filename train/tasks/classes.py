"""Tasks over classes: a nested head and a softmax or sigmoid, whole, in chunks, over a sample, or over the workers.

Legend: n rows, N rows of all workers, C classes, K most labels of a row, M nested dims.
"""

from dataclasses import replace
from typing import ClassVar

import torch
from torch import nn

from lookalike.errors import UsageError
from lookalike.train.losses.classes import (
    binarize,
    masked_mean,
    multilabel_sigmoid_loss,
    multilabel_softmax_loss,
    normalized_softmax_loss,
    softmax_loss,
)
from lookalike.train.losses.matryoshka import NestedCosine, NestedHead, NestedLinear, nested_loss
from lookalike.train.losses.proxies import (
    Shard,
    choose_classes,
    gather_labels,
    gather_rows,
    logsumexp_workers,
    sum_workers,
    workers,
)
from lookalike.train.losses.reduction import Factors, Over, Reduced, reduce_scores
from lookalike.train.tasks.base import ONE_CLASS, TASKS, Batch, Task

SCALE = ("nesting", "class_chunk", "shard")


class ClassTask(Task):
    """A classification task: ``row_losses`` computes losses from the scores at one nested dim; ``combine`` computes the
    same from sums over classes (``losses.reduction``), for label spaces too large to hold scores."""

    over: ClassVar[Over | None] = None
    """The reduction over classes that ``combine`` reads; None for a task without ``combine``."""

    def build_head(self, dims: tuple[int, ...], num_classes: int) -> nn.Module:
        """The task's head: linear by default."""
        return NestedLinear(dims, num_classes, self.config.nesting, shard=self.shard_of(num_classes))

    def shard_of(self, num_classes: int) -> Shard | None:
        """This worker's part of the classes; None if they are not sharded."""
        if self.config.shard and self.over is None:
            raise UsageError(f"tasks of kind {self.config.kind!r} cannot be sharded; set shard: false")
        return Shard.of_worker(num_classes, *workers()) if self.config.shard else None

    def row_losses(self, scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Loss per row [n] at one nested dim, of scores [n, C] and labels [n] or [n, K]."""
        raise AssertionError(f"{type(self).__name__} must define row_losses")

    def combine(self, reduced: Reduced, labelled: torch.Tensor, num_classes: int) -> torch.Tensor:
        """Losses [M, n] from ``reduced``; labelled [n, K] marks the labels that count; zero for rows without labels."""
        raise AssertionError(f"{type(self).__name__} must define combine")

    def transform(self, embedding: torch.Tensor) -> torch.Tensor:
        return embedding

    def factors(self, dims: tuple[int, ...], classes: torch.Tensor | None) -> Factors:
        """The head's factors of the scores that ``combine`` reads."""
        assert isinstance(self.head, NestedHead)
        return self.head.factors(dims, classes)

    def counts(self, batch: Batch) -> torch.Tensor:
        return _labelled(batch[self.config.field]).sum()[None]

    def means(self, embedding: torch.Tensor, batch: Batch, step: int) -> torch.Tensor:
        assert isinstance(self.head, NestedHead)
        labels = batch[self.config.field]
        vectors = self.transform(embedding)
        classes = None
        if self.config.sample_classes is not None and self.config.sample_classes < self.num_classes:
            # a whole head samples around the batch's own labels, so that the sample does not depend on the workers
            kept = labels if self.head.shard.whole else gather_labels(labels)
            classes = choose_classes(kept, self.num_classes, self.config.sample_classes, self.seed, step)
        if not self.head.shard.whole:
            losses = self._over_workers(vectors, labels, classes, step)
        else:
            losses = self._own(vectors, labels, classes, step)
        loss = masked_mean(losses, _labelled(labels))
        return (loss if self.dims_per_step is None else loss + self.touch().to(loss))[None]

    def _own(
        self, vectors: torch.Tensor, labels: torch.Tensor, classes: torch.Tensor | None, step: int
    ) -> torch.Tensor:
        """Losses [n] summed over dims, from a whole head."""
        assert isinstance(self.head, NestedHead)
        dims, weights = self.active(step)
        labels = _positions(labels, classes)
        num_classes = self.num_classes if classes is None else len(classes)
        few = num_classes <= self.config.class_chunk and self.config.nesting == "mrl"
        if few or self.over is None:
            scores = self.head(vectors, dims, classes)
            scores = [values.to(torch.promote_types(values.dtype, torch.float32)) for values in scores]  # of autocast
            return nested_loss(scores, lambda values: self.row_losses(values, labels), weights)
        columns = labels if labels.ndim == 2 else labels[:, None]
        reduced = self._reduce(vectors, columns, dims, classes)
        return _weigh(self.combine(reduced, columns >= 0, num_classes), weights)

    def _over_workers(
        self, vectors: torch.Tensor, labels: torch.Tensor, classes: torch.Tensor | None, step: int
    ) -> torch.Tensor:
        """Losses [n] of this worker's rows, from a head of which every worker holds a part."""
        assert isinstance(self.head, NestedHead)
        assert self.over is not None
        dims, weights = self.active(step)
        (rank, world), shard, n = workers(), self.head.shard, len(vectors)
        everyone = gather_labels(labels)
        columns = everyone if everyone.ndim == 2 else everyone[:, None]
        own, placed = None, torch.where(columns >= 0, columns - shard.first, -1)
        if classes is not None:
            own = classes[(classes >= shard.first) & (classes < shard.stop)] - shard.first
            placed = _positions(placed, own)
        part = self._reduce(gather_rows(vectors, world), placed, dims, own)
        whole = Reduced(
            (logsumexp_workers if self.over == "logsumexp" else sum_workers)(part.over),
            sum_workers(part.picked),
            sum_workers(part.total),
        )
        losses = self.combine(whole, columns >= 0, self.num_classes if classes is None else len(classes))
        return _weigh(losses[:, rank * n : (rank + 1) * n], weights)

    def _reduce(
        self, vectors: torch.Tensor, labels: torch.Tensor, dims: tuple[int, ...], classes: torch.Tensor | None
    ) -> Reduced:
        assert self.over is not None
        vectors = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
        return reduce_scores(
            vectors,
            self.factors(dims, classes),
            labels,
            over=self.over,
            chunk=self.config.class_chunk,
            total=self.config.label_smoothing > 0,
        )


def _labelled(labels: torch.Tensor) -> torch.Tensor:
    """Mask [n] of the rows of labels [n] or [n, K] that have one."""
    return (labels >= 0).any(dim=1) if labels.ndim == 2 else labels >= 0


def _positions(labels: torch.Tensor, classes: torch.Tensor | None) -> torch.Tensor:
    """Where each label stands in the sorted ``classes``; -1 for those that are not there, or below zero."""
    if classes is None:
        return labels
    if not len(classes):
        return torch.full_like(labels, -1)
    places = torch.searchsorted(classes, labels).clamp_max(len(classes) - 1)
    return torch.where(classes[places] == labels, places, -1)


def _weigh(losses: torch.Tensor, weights: tuple[float, ...]) -> torch.Tensor:
    return torch.stack([c * loss for c, loss in zip(weights, losses, strict=True)]).sum(dim=0)


@TASKS.register("softmax")
class SoftmaxTask(ClassTask):
    """Cross-entropy over classes."""

    fields = ONE_CLASS
    settings = (*SCALE, "label_smoothing", "sample_classes")
    over = "logsumexp"

    def row_losses(self, scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return softmax_loss(scores, labels, self.config.label_smoothing)

    def combine(self, reduced: Reduced, labelled: torch.Tensor, num_classes: int) -> torch.Tensor:
        """The same from reductions: smoothing mixes in the mean score of all classes."""
        smoothing = self.config.label_smoothing
        target = (1.0 - smoothing) * reduced.picked[..., 0] + smoothing / num_classes * reduced.total
        return (reduced.over - target) * labelled[:, 0]


@TASKS.register("multilabel_softmax")
class MultilabelSoftmaxTask(ClassTask):
    """Softmax against 1/k on each of k labels."""

    settings = SCALE
    over = "logsumexp"

    def row_losses(self, scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return multilabel_softmax_loss(scores, _as_columns(labels))

    def combine(self, reduced: Reduced, labelled: torch.Tensor, num_classes: int) -> torch.Tensor:
        mean = (reduced.picked * labelled).sum(dim=2) / labelled.sum(dim=1).clamp_min(1)
        return (reduced.over - mean) * labelled.any(dim=1)


@TASKS.register("multilabel_sigmoid")
class MultilabelSigmoidTask(ClassTask):
    """Binary cross-entropy of every class."""

    settings = (*SCALE, "averaging")
    over = "softplus"

    def row_losses(self, scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return multilabel_sigmoid_loss(scores, _as_columns(labels), self.config.averaging)

    def combine(self, reduced: Reduced, labelled: torch.Tensor, num_classes: int) -> torch.Tensor:
        total = reduced.over - (reduced.picked * labelled).sum(dim=2)
        return total / (num_classes if self.config.averaging == "mean" else 1) * labelled.any(dim=1)


@TASKS.register("normalized_softmax")
class NormalizedSoftmaxTask(ClassTask):
    """Classification by cosine to class proxies: the metric-learning task for instances (Zhai and Wu 2019).

    It leaves out their layer norm: over the whole embedding, it would make a prefix depend on the values after it.
    """

    fields = ONE_CLASS
    settings = (*SCALE, "temperature", "sample_classes")
    over = "logsumexp"

    def build_head(self, dims: tuple[int, ...], num_classes: int) -> nn.Module:
        return NestedCosine(dims, num_classes, self.config.nesting, shard=self.shard_of(num_classes))

    def row_losses(self, scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return normalized_softmax_loss(scores, labels, self.config.temperature)

    def factors(self, dims: tuple[int, ...], classes: torch.Tensor | None) -> Factors:
        return replace(super().factors(dims, classes), scale=1.0 / self.config.temperature)

    def combine(self, reduced: Reduced, labelled: torch.Tensor, num_classes: int) -> torch.Tensor:
        return (reduced.over - reduced.picked[..., 0]) * labelled[:, 0]


@TASKS.register("binary")
class BinaryTask(NormalizedSoftmaxTask):
    """Normalised softmax of the code ``x > 0`` of every prefix, which Hamming search over ``binary-signs`` compares.

    Zhai and Wu 2019 binarise after training instead; their layer norm centres values at 0.
    """

    def transform(self, embedding: torch.Tensor) -> torch.Tensor:
        """Codes -1 and 1; the gradient passes straight through."""
        return binarize(embedding)


def _as_columns(labels: torch.Tensor) -> torch.Tensor:
    return labels if labels.ndim == 2 else labels[:, None]
