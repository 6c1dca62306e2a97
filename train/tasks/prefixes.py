"""Tasks without classes: the loss at a nested dim reads that prefix of the batch's embeddings and how rows relate."""

from typing import cast

import torch

from lookalike.seeds import derive_seed
from lookalike.train.losses.pairs import contrastive_loss, cosine_losses, relate, triplet_loss
from lookalike.train.losses.proxies import gather_labels, gather_rows, workers
from lookalike.train.losses.regularizers import (
    embedding_norm_loss,
    koleo_loss,
    relational_loss,
    teacher_cosine_loss,
    teacher_known,
)
from lookalike.train.tasks.base import ONE_CLASS, TASKS, Batch, Task

RELATIONS = (*ONE_CLASS, "row")


class PrefixTask(Task):
    """A task whose loss at a nested dim is a function of that prefix of all rows; the loss normalises the prefix."""

    def prefix_loss(self, prefix: torch.Tensor, values: torch.Tensor, seed: int) -> torch.Tensor:
        """Loss at one nested dim, a scalar or its means [t]; ``values`` is what ``values`` returns. ``seed`` is
        for random draws; it differs between batches."""
        raise AssertionError(f"{type(self).__name__} must define prefix_loss")

    def values(self, batch: Batch) -> torch.Tensor:
        """What ``prefix_loss`` reads of the batch: the task's column."""
        return batch[self.config.field]

    def counts(self, batch: Batch) -> torch.Tensor:
        """All rows, for losses without labels."""
        values = batch[self.config.field]
        return torch.tensor([len(values)], device=values.device)

    def means(self, embedding: torch.Tensor, batch: Batch, step: int) -> torch.Tensor:
        """See ``Task``. Computed in float32 at least, because distances of near rows are differences of large terms."""
        values = self.values(batch)
        seed = derive_seed(self.seed, "draws", step, *cast("tuple[int, ...]", batch.get("place", ())))
        with torch.autocast(embedding.device.type, enabled=False):
            vectors = embedding.to(torch.promote_types(embedding.dtype, torch.float32))
            terms = [
                c * self.prefix_loss(vectors[:, :m], values, seed) for m, c in zip(*self.active(step), strict=True)
            ]
            return torch.stack(terms).sum(dim=0).reshape(-1)


@TASKS.register("triplet")
class TripletTask(PrefixTask):
    """Triplets mined in the worker's batch, at every prefix by that prefix's distances."""

    fields = RELATIONS
    settings = ("mining", "margin", "beta")

    def counts(self, batch: Batch) -> torch.Tensor:
        """Pairs (anchor, positive) that have a negative; the margin loss is a mean over fewer terms, those above zero,
        and counts by its pairs."""
        values = batch[self.config.field]
        positives, negatives = relate(values, values)
        return (positives & negatives.any(dim=1, keepdim=True)).sum()[None]

    def prefix_loss(self, prefix: torch.Tensor, values: torch.Tensor, seed: int) -> torch.Tensor:
        config, generator = self.config, torch.Generator().manual_seed(seed)
        uniform = torch.rand(len(prefix), len(prefix), generator=generator).to(prefix.device)
        return triplet_loss(prefix, values, uniform, mining=config.mining, margin=config.margin, beta=config.beta)


@TASKS.register("contrastive")
class ContrastiveTask(PrefixTask):
    """InfoNCE between rows of equal value; on ``row``, between the views of a picture."""

    fields = RELATIONS
    settings = ("temperature", "across_workers")

    def counts(self, batch: Batch) -> torch.Tensor:
        """Anchors that have a positive."""
        values = batch[self.config.field]
        return relate(values, *self._candidates(values)).positives.any(dim=1).sum()[None]

    def prefix_loss(self, prefix: torch.Tensor, values: torch.Tensor, seed: int) -> torch.Tensor:
        rows = gather_rows(prefix) if self.config.across_workers else prefix
        known, offset = self._candidates(values)
        return contrastive_loss(prefix, values, rows, known, temperature=self.config.temperature, offset=offset)

    def _candidates(self, values: torch.Tensor) -> tuple[torch.Tensor, int]:
        """Values of the candidate rows, and where the worker's own begin."""
        if not self.config.across_workers:
            return values, 0
        return gather_labels(values), workers()[0] * len(values)


@TASKS.register("cosine")
class CosineTask(PrefixTask):
    """Pulls rows of equal value together and pushes others below a cosine."""

    fields = RELATIONS
    settings = ("margin",)

    def counts(self, batch: Batch) -> torch.Tensor:
        """Positive pairs and negative pairs."""
        values = batch[self.config.field]
        return torch.stack([mask.sum() for mask in relate(values, values)])

    def prefix_loss(self, prefix: torch.Tensor, values: torch.Tensor, seed: int) -> torch.Tensor:
        return cosine_losses(prefix, values, self.config.margin)


@TASKS.register("distill")
class DistillTask(PrefixTask):
    """Every prefix learns the teacher's similarities within the batch, whatever the teacher's size."""

    fields = ("teacher",)
    settings = ("temperature", "cosine")

    def counts(self, batch: Batch) -> torch.Tensor:
        """Rows that can be compared with another row, and rows that the teacher embedded."""
        known = teacher_known(batch[self.config.field]).sum()
        return torch.stack([torch.where(known > 1, known, 0), known])

    def prefix_loss(self, prefix: torch.Tensor, values: torch.Tensor, seed: int) -> torch.Tensor:
        relations, cosines = relational_loss(prefix, values, self.config.temperature), prefix.sum() * 0.0
        if self.config.cosine and prefix.shape[1] <= values.shape[1]:
            cosines = self.config.cosine * teacher_cosine_loss(prefix, values)
        return torch.stack([relations, cosines])


@TASKS.register("koleo")
class KoLeoTask(PrefixTask):
    """Regulariser: spreads the batch's pictures over the sphere; views of one picture are not pushed apart."""

    fields = ("images",)
    settings = ()

    def counts(self, batch: Batch) -> torch.Tensor:
        """Rows that have a row of another picture."""
        values = self.values(batch)
        return (values[:, None] != values[None]).any(dim=1).sum()[None]

    def values(self, batch: Batch) -> torch.Tensor:
        """The pictures of the rows, int64 [n]; each row its own where the batch does not say."""
        return batch["row"] if "row" in batch else torch.arange(len(batch["images"]))

    def prefix_loss(self, prefix: torch.Tensor, values: torch.Tensor, seed: int) -> torch.Tensor:
        return koleo_loss(prefix, values.to(prefix.device))


@TASKS.register("embedding_norm")
class EmbeddingNormTask(PrefixTask):
    """Regulariser: keeps the size of every prefix small."""

    fields = ("images",)
    settings = ()

    def prefix_loss(self, prefix: torch.Tensor, values: torch.Tensor, seed: int) -> torch.Tensor:
        return embedding_norm_loss(prefix)
