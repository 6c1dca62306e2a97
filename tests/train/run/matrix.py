"""A worker of a run whose start is given, for ``test_matrix``."""

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from lookalike.train.run.loop import Place, run_steps
from lookalike.train.run.sharding import ignore_in_ddp, load_whole_state
from tests.train.conftest import Bench

SCALE = 0.25
"""float16's first loss scale here: at torch's own, 65,536, the first steps overflow and change nothing, and the random
network of these tests has gradients of some thousands."""


def train_from(rank: int, world: int, root: str, folder: str, settings: dict[str, Any], start: str) -> None:  # noqa: PLR0917
    """Train as worker ``rank`` from the whole weights in the file ``start``."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}.{world}", rank=rank, world_size=world, timeout=timedelta(minutes=2)
    )
    config = Bench(root).config(**settings)
    training = Bench(root).begin(config)
    load_whole_state(training.model, training.optimizer, torch.load(start), training.optimizer.state_dict())
    if training.scaler.is_enabled():
        training.scaler.load_state_dict({**training.scaler.state_dict(), "scale": SCALE})
    training.join(world)
    ignore_in_ddp(training.model)
    wrapped = nn.parallel.DistributedDataParallel(training.model)
    try:
        run_steps(training, wrapped, Place(config, rank, world, torch.device("cpu"), folder))
        assert not training.skipped
    finally:
        dist.destroy_process_group()
