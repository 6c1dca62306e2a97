"""What a sharded head asks of DDP, of clipping and of checkpoints: see ``losses.proxies``."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from lookalike.train.losses.proxies import Shard, workers

State = dict[str, Any]


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
