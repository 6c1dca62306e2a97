"""Training with sharded heads: what DDP, gradient clipping and checkpoints do differently for their parameters.

DDP must not average a shard's gradients, the norm of the whole gradient counts every shard once, and a checkpoint holds
whole tensors, so that another number of workers can load it. The heads themselves are in ``losses.proxies``.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from lookalike.train.losses.proxies import Shard, workers

State = dict[str, Any]


class ShardedParameter(NamedTuple):
    """A parameter whose first axis is this worker's part of the classes."""

    parameter: nn.Parameter
    shard: Shard


class WholeState(NamedTuple):
    """State dicts as if nothing had been sharded."""

    model: State
    optimizer: State


def sharded_parameters(module: nn.Module) -> dict[str, ShardedParameter]:
    """Name -> parameter and shard of every sharded head below ``module``, in the module's order."""
    return {
        f"{prefix}.{name}".lstrip("."): ShardedParameter(parameter, shard)
        for prefix, head in module.named_modules()
        if isinstance(shard := getattr(head, "shard", None), Shard) and not shard.whole
        for name, parameter in head.named_parameters()
    }


def ignore_in_ddp(module: nn.Module) -> None:
    """Make DDP leave sharded parameters alone; call it before wrapping ``module``."""
    ddp = nn.parallel.DistributedDataParallel
    names = list(sharded_parameters(module))
    ddp._set_params_and_buffers_to_ignore_for_model(module, names)  # type: ignore[no-untyped-call]  # noqa: SLF001  # no public way


def clip_gradients(module: nn.Module, max_norm: float) -> torch.Tensor:
    """Clip the norm of the whole gradient, the shards of all workers included, and return the norm before clipping.

    Without sharded parameters it is torch's ``clip_grad_norm_``.
    """
    parameters = [parameter for parameter in module.parameters() if parameter.grad is not None]
    sharded = {id(parameter) for parameter, _ in sharded_parameters(module).values()}
    if not sharded:
        return nn.utils.clip_grad_norm_(parameters, max_norm)
    common = [p.grad for p in parameters if p.grad is not None and id(p) not in sharded]
    own = [p.grad for p in parameters if p.grad is not None and id(p) in sharded]
    squares = nn.utils.get_total_norm(own).square()
    dist.all_reduce(squares)
    norm = (nn.utils.get_total_norm(common).square() + squares).sqrt()
    nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def whole_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> WholeState:
    """State dicts of module and optimizer with every shard made whole; tensors that were sharded are on the CPU.

    Every worker must call it, because it gathers; every worker gets the whole.
    """
    sharded = sharded_parameters(module)
    model = dict(module.state_dict())
    for name, (parameter, _) in sharded.items():
        model[name] = _join(parameter.detach())

    def join(value: torch.Tensor, parameter: nn.Parameter, shard: Shard) -> torch.Tensor:
        return _join(value) if value.shape == parameter.shape else value

    return WholeState(model, _map_moments(optimizer, optimizer.state_dict(), sharded, join))


def load_whole_state(
    module: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Any], moments: State
) -> None:
    """Load what ``whole_state`` returned, each worker its part; the number of workers may have changed."""
    sharded = sharded_parameters(module)
    module.load_state_dict(
        {name: _cut(value, sharded[name].shard) if name in sharded else value for name, value in state.items()}
    )

    def cut(value: torch.Tensor, parameter: nn.Parameter, shard: Shard) -> torch.Tensor:
        return _cut(value, shard) if value.shape == (shard.total, *parameter.shape[1:]) else value

    optimizer.load_state_dict(_map_moments(optimizer, moments, sharded, cut))


def _map_moments(
    optimizer: torch.optim.Optimizer,
    state: State,
    sharded: Mapping[str, ShardedParameter],
    change: Callable[[torch.Tensor, nn.Parameter, Shard], torch.Tensor],
) -> State:
    """An optimizer's state dict with ``change`` applied to every tensor of the sharded parameters."""
    # a state dict names parameters by their position in the groups
    flat = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    positions = {id(parameter): position for position, parameter in enumerate(flat)}
    slots = dict(state["state"])
    for parameter, shard in sharded.values():
        position = positions.get(id(parameter))
        if position in slots:
            slots[position] = {
                key: change(value, parameter, shard) if isinstance(value, torch.Tensor) else value
                for key, value in slots[position].items()
            }
    return {**state, "state": slots}


def _cut(value: torch.Tensor, shard: Shard) -> torch.Tensor:
    return value[shard.first : shard.stop].clone()


def _join(rows: torch.Tensor) -> torch.Tensor:
    """Rows of all workers, in rank order, on the CPU; the workers' counts may differ by one."""
    _, world = workers()
    counts = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(world)]
    dist.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
    longest = int(max(counts))
    padded = torch.cat([rows, rows.new_zeros((longest - len(rows), *rows.shape[1:]))])
    parts = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(count)].cpu() for part, count in zip(parts, counts, strict=True)])
