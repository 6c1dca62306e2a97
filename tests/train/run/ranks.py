"""Training in processes of one gloo group, without Ray: what Ray Train starts on each worker."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from lookalike.train.run.checkpoints import last_checkpoint
from lookalike.train.run.curves import NonFiniteLossError
from lookalike.train.run.loop import Place, agree, run_steps
from lookalike.train.tasks import MultiTaskModel
from tests.train.conftest import Bench


def train_rank(rank: int, world: int, root: str, folder: str, settings: dict[str, Any], spoil: int) -> None:  # noqa: PLR0917
    """Train as worker ``rank``, from the last checkpoint in ``folder`` on; the loss of the last worker is no number at
    step ``spoil`` (0: never). What happened is written beside the checkpoints."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}.{world}", rank=rank, world_size=world, timeout=timedelta(minutes=2)
    )
    config = Bench(root).config(**settings)
    training = Bench(root).begin(config)
    if found := agree(last_checkpoint(folder)):
        training.resume(found, rank, world)
    training.join(world)
    if spoil and rank == world - 1:
        _spoil(spoil - training.step)
    wrapped = nn.parallel.DistributedDataParallel(training.model)
    try:
        run_steps(training, wrapped, Place(config, rank, world, torch.device("cpu"), folder))
    except NonFiniteLossError as error:
        Path(f"{folder}.error-{rank}").write_text(str(error))
    finally:
        dist.destroy_process_group()


def _spoil(at: int) -> None:
    forward, calls = MultiTaskModel.forward, iter(range(1, 1000))

    def spoiled(self: MultiTaskModel, batch: Any, step: int, shares: Any) -> Any:
        total, losses = forward(self, batch, step, shares)
        return total * (float("inf") if next(calls) == at else 1.0), losses

    MultiTaskModel.forward = spoiled  # type: ignore[method-assign]
