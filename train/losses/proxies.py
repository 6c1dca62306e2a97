"""Class proxies by the million: a sample of classes per step, and classes shared out over the workers.

A *sharded* head holds a contiguous block of classes on each worker. Embeddings and labels of all workers are gathered,
every worker scores all rows against its own classes, and log-sum-exp and the labels' scores are combined over the
workers; nothing of size [n, C] moves. Gradients equal those of a whole head on every worker: the encoder's gradients
are those of each worker's own loss (DDP averages them), a proxy's are the average over workers (DDP must leave them
alone). ``run.sharding`` has what DDP, clipping and checkpoints do differently.

Legend: n rows of a worker, N rows of all workers, C classes of all workers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from lookalike.errors import UsageError
from lookalike.seeds import derive_seed

ROWS_AT_ONCE = 1 << 16


@dataclass(frozen=True)
class Shard:
    """Classes ``first`` .. ``stop - 1`` of ``total``."""

    first: int
    stop: int
    total: int

    def __len__(self) -> int:
        return self.stop - self.first

    @property
    def whole(self) -> bool:
        return len(self) == self.total

    @classmethod
    def of_worker(cls, total: int, rank: int, world: int) -> "Shard":
        """The block of worker ``rank`` of ``world``; raises ``UsageError`` if there are fewer classes than workers."""
        if total < world:
            raise UsageError(f"{total} classes cannot be sharded over {world} workers; set shard: false")
        return cls(total * rank // world, total * (rank + 1) // world, total)


def workers() -> tuple[int, int]:
    """(rank, world) of the process group; (0, 1) without one."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def random_rows(shard: Shard, shape: tuple[int, ...], draw: Callable[..., torch.Tensor]) -> torch.Tensor:
    """The shard's rows [len(shard), *shape] of ``draw(total, *shape)``.

    Every worker draws all rows, a block at a time, so that rows do not depend on the number of workers, and every
    worker's random state advances alike.
    """
    blocks = []
    for start in range(0, shard.total, ROWS_AT_ONCE):
        rows = draw(min(ROWS_AT_ONCE, shard.total - start), *shape)
        blocks.append(rows[max(0, shard.first - start) : max(0, shard.stop - start)].clone())
    return torch.cat(blocks)


def choose_classes(labels: torch.Tensor, num_classes: int, sample: int, seed: int, step: int) -> torch.Tensor:
    """Classes int64 [c], sorted, that a step scores: those of ``labels``, filled up to ``sample`` with random others.

    Labels have any shape; labels below 0 are ignored. Positives are always kept (An et al. 2021, section 3.2). The draw
    depends only on seed and step, so workers that pass the same labels get the same classes.
    """
    order = torch.rand(num_classes, generator=torch.Generator().manual_seed(derive_seed(seed, "classes", step)))
    positives = torch.unique(labels[labels >= 0])
    order[positives.cpu()] = 2.0
    num = min(num_classes, max(sample, len(positives)))
    return order.topk(num).indices.sort().values.to(labels.device)


def gather_labels(labels: torch.Tensor) -> torch.Tensor:
    """Labels [n, ...] of all workers, in rank order; a second dim is padded with -1 to the widest."""
    _, world = workers()
    if world == 1:
        return labels
    if labels.ndim == 2:
        width = torch.tensor(labels.shape[1], device=labels.device)
        dist.all_reduce(width, op=dist.ReduceOp.MAX)
        labels = nn.functional.pad(labels, (0, int(width) - labels.shape[1]), value=-1)
    parts = [torch.empty_like(labels) for _ in range(world)]
    dist.all_gather(parts, labels.contiguous())
    return torch.cat(parts)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, scale: float) -> torch.Tensor:
        ctx.num, ctx.scale = len(rows), scale
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        whole = grads[0].contiguous().clone()
        dist.all_reduce(whole)
        own = whole[dist.get_rank() * ctx.num :][: ctx.num]
        return own * ctx.scale, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:
        total = values.contiguous().clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        total = grads[0].contiguous().clone()
        dist.all_reduce(total)
        return total / dist.get_world_size()


def gather_rows(rows: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """Rows [n, ...] of all workers in rank order, [N, ...]; the gradient is ``scale`` times the workers' sum.

    Every worker must hold the same number of rows and call in the same order. 1 is right for a loss of own rows against
    all rows.
    """
    gathered: torch.Tensor = rows if workers()[1] == 1 else _Gather.apply(rows, scale)  # type: ignore[no-untyped-call]
    return gathered


def sum_workers(values: torch.Tensor) -> torch.Tensor:
    """Sum over workers of values of one shape; the gradient is the mean over workers.

    Between ``gather_rows(rows, world)`` and this sum, gradients are those of the mean of the workers' losses, as DDP
    makes them for the other parameters.
    """
    total: torch.Tensor = values if workers()[1] == 1 else _Sum.apply(values)  # type: ignore[no-untyped-call]
    return total


def logsumexp_workers(values: torch.Tensor) -> torch.Tensor:
    """log(sum(exp(values))) over workers of values of one shape; -inf stands for a worker without classes."""
    if workers()[1] == 1:
        return values
    largest = values.detach().clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return sum_workers((values - largest).exp()).log() + largest
