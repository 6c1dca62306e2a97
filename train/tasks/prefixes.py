"""Tasks without classes: the loss at a nested dim reads that prefix of the batch's embeddings and how rows relate."""

import torch

from lookalike.seeds import derive_seed
from lookalike.train.losses.pairs import contrastive_loss, cosine_loss, triplet_loss
from lookalike.train.losses.proxies import gather_labels, gather_rows, workers
from lookalike.train.losses.regularizers import embedding_norm_loss, koleo_loss, relational_loss, teacher_cosine_loss
from lookalike.train.tasks.base import ONE_CLASS, TASKS, Batch, Task

RELATIONS = (*ONE_CLASS, "row")


class PrefixTask(Task):
    """A task whose loss at a nested dim is a function of that prefix of all rows; the loss normalises the prefix."""

    def prefix_loss(self, prefix: torch.Tensor, values: torch.Tensor, step: int) -> torch.Tensor:
        """Scalar loss at one nested dim; ``values`` is the task's column of the batch."""
        raise AssertionError(f"{type(self).__name__} must define prefix_loss")

    def forward(self, embedding: torch.Tensor, batch: Batch, step: int = 0) -> torch.Tensor:
        """See ``Task``. Computed in float32 at least, because distances of near rows are differences of large terms."""
        values = batch[self.config.field]
        with torch.autocast(embedding.device.type, enabled=False):
            vectors = embedding.to(torch.promote_types(embedding.dtype, torch.float32))
            terms = [
                c * self.prefix_loss(vectors[:, :m], values, step) for m, c in zip(*self.active(step), strict=True)
            ]
            return torch.stack(terms).sum()


@TASKS.register("triplet")
class TripletTask(PrefixTask):
    """Triplets mined in the worker's batch, at every prefix by that prefix's distances."""

    fields = RELATIONS
    settings = ("mining", "margin", "beta")

    def prefix_loss(self, prefix: torch.Tensor, values: torch.Tensor, step: int) -> torch.Tensor:
        config, (rank, _) = self.config, workers()
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "negatives", rank, step))
        uniform = torch.rand(len(prefix), len(prefix), generator=generator).to(prefix.device)
        return triplet_loss(prefix, values, uniform, mining=config.mining, margin=config.margin, beta=config.beta)


@TASKS.register("contrastive")
class ContrastiveTask(PrefixTask):
    """InfoNCE between rows of equal value; on ``row``, between the views of a picture."""

    fields = RELATIONS
    settings = ("temperature", "across_workers")

    def prefix_loss(self, prefix: torch.Tensor, values: torch.Tensor, step: int) -> torch.Tensor:
        rows, known, offset = prefix, values, 0
        if self.config.across_workers:
            rows, known, offset = gather_rows(prefix), gather_labels(values), workers()[0] * len(prefix)
        return contrastive_loss(prefix, values, rows, known, temperature=self.config.temperature, offset=offset)


@TASKS.register("cosine")
class CosineTask(PrefixTask):
    """Pulls rows of equal value together and pushes others below a cosine."""

    fields = RELATIONS
    settings = ("margin",)

    def prefix_loss(self, prefix: torch.Tensor, values: torch.Tensor, step: int) -> torch.Tensor:
        return cosine_loss(prefix, values, self.config.margin)


@TASKS.register("distill")
class DistillTask(PrefixTask):
    """Every prefix learns the teacher's similarities within the batch, whatever the teacher's size."""

    fields = ("teacher",)
    settings = ("temperature", "cosine")

    def prefix_loss(self, prefix: torch.Tensor, values: torch.Tensor, step: int) -> torch.Tensor:
        loss = relational_loss(prefix, values, self.config.temperature)
        if self.config.cosine and prefix.shape[1] <= values.shape[1]:
            loss = loss + self.config.cosine * teacher_cosine_loss(prefix, values)
        return loss


@TASKS.register("koleo")
class KoLeoTask(PrefixTask):
    """Regulariser: spreads the batch over the sphere."""

    fields = ("images",)
    settings = ()

    def prefix_loss(self, prefix: torch.Tensor, values: torch.Tensor, step: int) -> torch.Tensor:
        return koleo_loss(prefix)


@TASKS.register("embedding_norm")
class EmbeddingNormTask(PrefixTask):
    """Regulariser: keeps the size of every prefix small."""

    fields = ("images",)
    settings = ()

    def prefix_loss(self, prefix: torch.Tensor, values: torch.Tensor, step: int) -> torch.Tensor:
        return embedding_norm_loss(prefix)
