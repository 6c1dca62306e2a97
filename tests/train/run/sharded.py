"""One worker of a process group that trains sharded heads, for ``test_sharding``, and what it trains."""

from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn

from lookalike.train.losses.proxies import logsumexp_workers
from lookalike.train.run.curves import Curve
from lookalike.train.run.sharding import (
    clip_gradients,
    ignore_in_ddp,
    load_whole_state,
    sharded_parameters,
    whole_state,
)
from lookalike.train.run.state import Training, build_scaler
from lookalike.train.tasks import MultiTaskModel, TaskConfig, build_tasks

DIMS, WEIGHTS, CLASSES, WORLD, STEPS, ROWS = (2, 5, 8), (1.0, 0.5, 2.0), 7, 2, 3, 6
COUNTS = {"labels": CLASSES, "category": CLASSES, "group": CLASSES}


def configs(*, shard: bool) -> dict[str, TaskConfig]:
    """Every kind that can be sharded, in both nestings, some in chunks, some sampled, beside one that is not."""
    return {
        "softmax": TaskConfig(kind="softmax", field="category", label_smoothing=0.1, class_chunk=2, shard=shard),
        "tied": TaskConfig(kind="softmax", field="group", nesting="mrl-e", shard=shard),
        "weak": TaskConfig(kind="multilabel_softmax", field="labels", nesting="mrl-e", shard=shard),
        "sigmoid": TaskConfig(kind="multilabel_sigmoid", field="labels", shard=shard),
        "identity": TaskConfig(kind="normalized_softmax", field="group", nesting="mrl-e", temperature=0.2, shard=shard),
        "sampled": TaskConfig(kind="normalized_softmax", field="group", temperature=0.2, sample_classes=4, shard=shard),
        "code": TaskConfig(kind="binary", field="category", temperature=0.2, shard=shard),
        "whole": TaskConfig(kind="softmax", field="category"),
    }


def make_model(*, shard: bool, seed: int = 0) -> MultiTaskModel:
    torch.manual_seed(seed)
    tasks = build_tasks(configs(shard=shard), DIMS, COUNTS, WEIGHTS, seed=5)
    return MultiTaskModel(nn.Linear(6, 8, bias=False), tasks).double()


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.01)


def make_batch(step: int, rank: int) -> dict[str, torch.Tensor]:
    """A worker's rows: some without labels, label lists as wide as the worker's longest."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    labels = torch.stack([torch.randperm(CLASSES, generator=generator)[: 2 + rank] for _ in range(ROWS)])
    labels[1, 1:] = -1
    labels[4] = -1
    category, group = (torch.randint(-1, CLASSES, (ROWS,), generator=generator) for _ in range(2))
    return {
        "images": torch.randn(ROWS, 6, generator=generator, dtype=torch.float64),
        "labels": labels,
        "category": category,
        "group": group,
    }


def start_group(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD, timeout=timedelta(minutes=2)
    )


def run_worker(rank: int, folder: str) -> None:
    """Train from the whole state in ``folder/start.pt``; every worker saves what it saw, the first the whole state."""
    start_group(rank, folder)
    model = make_model(shard=True, seed=1)
    optimizer = make_optimizer(model)
    drawn = whole_state(model, optimizer)[0]  # what random_rows drew, before anything is loaded
    start = torch.load(f"{folder}/start.pt")
    load_whole_state(model, optimizer, start["model"], start["optimizer"])
    ignore_in_ddp(model)
    wrapped = nn.parallel.DistributedDataParallel(model)
    losses, norms = [], []
    for step in range(STEPS):
        optimizer.zero_grad()
        batch = make_batch(step, rank)
        total, each = wrapped(batch, step, model.step_shares([batch])[0])
        (total * WORLD).backward()
        norms.append(clip_gradients(model, 1.0))
        optimizer.step()
        losses.append(each)
    state, moments = whole_state(model, optimizer)
    again = make_model(shard=True, seed=2)
    load_whole_state(again, make_optimizer(again), state, moments)
    same = all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    empty = torch.tensor([-torch.inf if rank else 1.0, 2.0])
    torch.save(
        {
            "model": state,
            "optimizer": moments,
            "losses": losses,
            "norms": norms,
            "drawn": drawn,
            "same": same,
            "rows": {name: len(p) for name, (p, _) in sharded_parameters(model).items()},
            "logsumexp": logsumexp_workers(empty),
        },
        f"{folder}/end-{rank}.pt",
    )
    dist.destroy_process_group()


def overflow_worker(rank: int, folder: str) -> None:
    """Three updates by float16's scaler; in the second, one proxy of the last worker's shard overflows."""
    start_group(rank, folder)
    model = make_model(shard=True).float()
    model.encoder.requires_grad_(False)
    training = Training(model, make_optimizer(model), Still(), build_scaler("cpu", enabled=True), None, Curve(STEPS))
    values = []
    for step in range(1, STEPS + 1):
        for name, parameter in model.tasks.named_parameters():
            parameter.grad = torch.full_like(parameter, 65_536.0)
            if step == 2 and rank == WORLD - 1 and name == "identity.head.proxies.0":
                parameter.grad[0] = torch.inf
        training.scaler.scale(torch.ones(()))  # sets the scale up, as the loss does
        training.scaler.unscale_(training.optimizer)
        training.update(step)
        values.append([parameter.detach().clone() for parameter in model.tasks.parameters()])
    report = {"values": values, "scale": training.scaler.get_scale(), "skipped": training.skipped}
    torch.save(report, f"{folder}/overflow-{rank}.pt")
    dist.destroy_process_group()


class Still:
    """A schedule that does nothing."""

    def step(self) -> None:
        pass
