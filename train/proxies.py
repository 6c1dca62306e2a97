"""Class proxies by the million: a sample of classes a step, and classes shared out over the workers.

A *sharded* head holds a contiguous block of classes on each worker. Embeddings and labels of all workers are gathered,
every worker scores all rows against its own classes, and log-sum-exp and the labels' scores are combined over the
workers; nothing of size [n, C] moves. Gradients equal those of a head that every worker holds whole: an encoder's come
out as if each worker had its own loss (DDP averages them), a proxy's as the average over workers, with DDP told to
leave it alone. A checkpoint holds whole tensors, so another number of workers can load it.

Legend: n rows of a worker, N those of all, C classes of all workers.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from lookalike.errors import UsageError
from lookalike.seeds import derive_seed

ROWS_AT_ONCE = 1 << 16
State = dict[str, Any]


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
        """Whether it is all classes."""
        return len(self) == self.total

    @classmethod
    def of_worker(cls, total: int, rank: int, world: int) -> "Shard":
        """The block of worker ``rank`` of ``world``; raises ``UsageError`` when there are fewer classes."""
        if total < world:
            raise UsageError(f"{total} classes cannot be sharded over {world} workers; set shard: false")
        return cls(total * rank // world, total * (rank + 1) // world, total)


def workers() -> tuple[int, int]:
    """(rank, world) of the process group; (0, 1) without one."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def random_rows(shard: Shard, shape: tuple[int, ...], draw: Callable[..., torch.Tensor]) -> torch.Tensor:
    """The shard's rows [len(shard), *shape] of ``draw(total, *shape)``: all workers draw all of it, a block at a time,
    so that rows do not depend on how many workers there are and every worker's random state moves on alike."""
    kept = []
    for start in range(0, shard.total, ROWS_AT_ONCE):
        rows = draw(min(ROWS_AT_ONCE, shard.total - start), *shape)
        kept.append(rows[max(0, shard.first - start) : max(0, shard.stop - start)].clone())
    return torch.cat(kept)


def choose_classes(labels: torch.Tensor, num_classes: int, sample: int, seed: int, step: int) -> torch.Tensor:
    """The classes int64 [c], sorted, that a step scores: those of ``labels`` (any shape, below 0 ignored), filled up to
    ``sample`` with others at random (An et al. 2021, section 3.2: positives are always kept).

    Drawn by seed and step alone on the CPU: workers that pass the same labels get the same classes.
    """
    order = torch.rand(num_classes, generator=torch.Generator().manual_seed(derive_seed(seed, "classes", step)))
    positives = torch.unique(labels[labels >= 0])
    order[positives.cpu()] = 2.0
    num = min(num_classes, max(sample, len(positives)))
    return order.topk(num).indices.sort().values.to(labels.device)


def gather_labels(labels: torch.Tensor) -> torch.Tensor:
    """Labels [n, ...] of all workers, in rank order; a second dim is padded with -1 to the widest worker's."""
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
    """Rows [n, ...] of all workers in rank order, [N, ...]; ``scale`` times the summed gradient comes back.

    Every worker must hold as many rows, and call in the same order. 1 is right for a loss of own rows against all.
    """
    gathered: torch.Tensor = rows if workers()[1] == 1 else _Gather.apply(rows, scale)  # type: ignore[no-untyped-call]
    return gathered


def sum_workers(values: torch.Tensor) -> torch.Tensor:
    """Sum over workers of values of one shape. Its gradient is the mean over workers: between ``gather_rows(rows,
    world)`` and this, gradients are those of the mean of the workers' losses, as DDP gives the other parameters."""
    total: torch.Tensor = values if workers()[1] == 1 else _Sum.apply(values)  # type: ignore[no-untyped-call]
    return total


def logsumexp_workers(values: torch.Tensor) -> torch.Tensor:
    """log(sum(exp(values))) over workers of values of one shape; -inf stands for a worker without classes."""
    if workers()[1] == 1:
        return values
    largest = values.detach().clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return sum_workers((values - largest).exp()).log() + largest


def sharded_parameters(module: nn.Module) -> dict[str, tuple[nn.Parameter, Shard]]:
    """Name -> (parameter, its part of the first axis) of every sharded head below ``module``, in the module's order."""
    found = {}
    for prefix, part in module.named_modules():
        shard = getattr(part, "shard", None)
        if isinstance(shard, Shard) and not shard.whole:
            found.update(
                {f"{prefix}.{name}".lstrip("."): (parameter, shard) for name, parameter in part.named_parameters()}
            )
    return found


def ignore_in_ddp(module: nn.Module) -> None:
    """Make DDP leave sharded parameters alone; call it before wrapping ``module``."""
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(  # type: ignore[no-untyped-call]
        module, list(sharded_parameters(module))
    )


def clip_gradients(module: nn.Module, max_norm: float) -> torch.Tensor:
    """Clip the norm of the whole gradient, shards of all workers included, and return it (before clipping); without
    sharded parameters it is torch's ``clip_grad_norm_``."""
    parameters = [parameter for parameter in module.parameters() if parameter.grad is not None]
    sharded = {id(parameter) for parameter, _ in sharded_parameters(module).values()}
    if not sharded:
        return nn.utils.clip_grad_norm_(parameters, max_norm)
    same = [p.grad for p in parameters if p.grad is not None and id(p) not in sharded]
    own = [p.grad for p in parameters if p.grad is not None and id(p) in sharded]
    squares = nn.utils.get_total_norm(own).square()
    dist.all_reduce(squares)
    norm = (nn.utils.get_total_norm(same).square() + squares).sqrt()
    nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def whole_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[State, State]:
    """State dicts of module and optimizer with every shard made whole, as if nothing had been sharded.

    Every worker must call it (it gathers); every worker gets the whole, on the CPU for what was sharded.
    """
    parameters = sharded_parameters(module)
    state, moments = dict(module.state_dict()), optimizer.state_dict()
    for name, (parameter, _) in parameters.items():
        state[name] = _join(parameter.detach())
    numbers = _numbers(optimizer)
    kept = dict(moments["state"])
    for parameter, _ in parameters.values():
        number = numbers.get(id(parameter))
        if number in kept:
            kept[number] = {
                key: _join(value) if _is_like(value, parameter) else value for key, value in kept[number].items()
            }
    return state, {**moments, "state": kept}


def load_whole_state(
    module: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Any], moments: Mapping[str, Any]
) -> None:
    """Load what ``whole_state`` gave, each worker taking its part; the number of workers may have changed."""
    parameters = sharded_parameters(module)
    module.load_state_dict(
        {name: _cut(value, parameters[name][1]) if name in parameters else value for name, value in state.items()}
    )
    numbers = _numbers(optimizer)
    kept = dict(moments["state"])
    for parameter, shard in parameters.values():
        number = numbers.get(id(parameter))
        if number in kept:
            kept[number] = {
                key: _cut(value, shard) if _is_like(value, parameter, shard.total) else value
                for key, value in kept[number].items()
            }
    optimizer.load_state_dict({**moments, "state": kept})


def _numbers(optimizer: torch.optim.Optimizer) -> dict[int, int]:
    """id of a parameter -> its number in the optimizer's state dict (groups in order)."""
    flat = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {id(parameter): number for number, parameter in enumerate(flat)}


def _is_like(value: Any, parameter: torch.Tensor, num_rows: int | None = None) -> bool:
    """Whether an optimizer's value is one a row of the parameter (a moment), not a step counter."""
    shape = (len(parameter) if num_rows is None else num_rows, *parameter.shape[1:])
    return isinstance(value, torch.Tensor) and tuple(value.shape) == shape


def _cut(value: torch.Tensor, shard: Shard) -> torch.Tensor:
    return value[shard.first : shard.stop].clone()


def _join(rows: torch.Tensor) -> torch.Tensor:
    """Rows of all workers, in rank order, on the CPU; their numbers may differ by one."""
    _, world = workers()
    counts = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(world)]
    dist.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
    longest = int(max(counts))
    padded = torch.cat([rows, rows.new_zeros((longest - len(rows), *rows.shape[1:]))])
    parts = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(count)].cpu() for part, count in zip(parts, counts, strict=True)])
