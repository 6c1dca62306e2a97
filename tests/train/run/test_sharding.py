"""Sharded heads: two workers with parts of every head train what one process with whole heads trains."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from torch import nn

from lookalike.train.run.sharding import clip_gradients, load_whole_state, sharded_parameters, whole_state
from tests.train.run.sharded import (
    CLASSES,
    STEPS,
    WORLD,
    configs,
    make_batch,
    make_model,
    make_optimizer,
    overflow_worker,
    run_worker,
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two workers saw and saved after a few steps."""
    folder = str(tmp_path_factory.mktemp("group"))
    model = make_model(shard=False)
    torch.save({"model": model.state_dict(), "optimizer": make_optimizer(model).state_dict()}, f"{folder}/start.pt")
    torch.multiprocessing.spawn(run_worker, args=(folder,), nprocs=WORLD, daemon=True)
    return [torch.load(f"{folder}/end-{rank}.pt", weights_only=True) for rank in range(WORLD)]


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """The same by one process with whole heads: the rows of both workers in one batch, torch's own clipping."""
    model, losses, norms = make_model(shard=False), [], []
    optimizer = make_optimizer(model)
    for step in range(STEPS):
        batches = [make_batch(step, rank) for rank in range(WORLD)]
        width = max(batch["labels"].shape[1] for batch in batches)
        for batch in batches:
            batch["labels"] = nn.functional.pad(batch["labels"], (0, width - batch["labels"].shape[1]), value=-1)
        optimizer.zero_grad()
        total, each = model({name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}, step)
        total.backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        optimizer.step()
        losses.append(each)
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "losses": losses, "norms": norms}


@pytest.mark.slow
def test_the_workers_shares_of_each_loss(trained: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    for step in range(STEPS):
        for name in configs(shard=True):
            shares = torch.stack([state["losses"][step][name] for state in trained])
            assert torch.allclose(shares.sum(), alone["losses"][step][name], rtol=1e-9), (step, name)
            assert shares.min() > 0


@pytest.mark.slow
def test_gradient_norms_count_every_shard_once(trained: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    for rank in range(WORLD):
        assert torch.allclose(torch.stack(trained[rank]["norms"]), torch.stack(alone["norms"]), rtol=1e-9)
    assert min(alone["norms"]) > 1.0  # clipping did something


@pytest.mark.slow
def test_weights_and_moments_after_some_steps(trained: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    for state in trained:
        assert state["model"].keys() == alone["model"].keys()
        for name, value in alone["model"].items():
            assert torch.allclose(state["model"][name], value, atol=1e-9), name
        for number, moments in alone["optimizer"]["state"].items():
            for key, value in moments.items():
                found = state["optimizer"]["state"][number][key]
                assert found.shape == value.shape
                assert torch.allclose(found, value, atol=1e-9)


@pytest.mark.slow
def test_each_worker_holds_its_part_and_takes_it_from_a_checkpoint(trained: list[dict[str, Any]]) -> None:
    held = [set(state["rows"].values()) for state in trained]
    assert held == [{3}, {4}]
    names = {name for name, _ in make_model(shard=False).named_parameters()}
    assert trained[0]["rows"].keys() == {n for n in names if n.startswith("tasks.") and ".whole." not in n}
    assert all(state["same"] for state in trained)


@pytest.mark.slow
def test_a_whole_checkpoint_goes_on_with_another_number_of_workers(trained: list[dict[str, Any]]) -> None:
    model = make_model(shard=True, seed=3)  # one process: heads are whole
    optimizer = make_optimizer(model)
    load_whole_state(model, optimizer, trained[0]["model"], trained[0]["optimizer"])
    assert not sharded_parameters(model)
    model(make_batch(9, 0), 9)[0].backward()
    optimizer.step()
    again, moments = whole_state(model, optimizer)
    assert again.keys() == trained[0]["model"].keys()
    assert moments["state"][0]["step"] == STEPS + 1


@pytest.mark.slow
def test_the_random_start_does_not_depend_on_the_workers(trained: list[dict[str, Any]]) -> None:
    for name, value in trained[0]["drawn"].items():
        assert torch.equal(value, trained[1]["drawn"][name])
        if name.startswith("tasks.identity"):
            assert torch.allclose(value.norm(dim=1), torch.ones(CLASSES, dtype=torch.float64))


@pytest.mark.slow
def test_a_worker_without_classes_adds_nothing(trained: list[dict[str, Any]]) -> None:
    expected = torch.tensor([1.0, 2.0 + math.log(2.0)])
    assert all(torch.allclose(state["logsumexp"], expected) for state in trained)


@pytest.mark.slow
def test_workers_skip_a_step_together(tmp_path: Path) -> None:
    """float16 overflows in the shard of one worker: no worker changes a weight or its own loss scale."""
    torch.multiprocessing.spawn(overflow_worker, args=(str(tmp_path),), nprocs=WORLD, daemon=True)
    for rank in range(WORLD):
        report = torch.load(tmp_path / f"overflow-{rank}.pt", weights_only=True)
        first, second, third = report["values"]
        assert all(torch.equal(*pair) for pair in zip(first, second, strict=True)), rank
        assert not any(torch.equal(*pair) for pair in zip(second, third, strict=True)), rank
        assert (report["scale"], report["skipped"]) == (32_768.0, 1)


def test_without_shards_the_gradient_is_clipped_as_torch_does() -> None:
    layer = nn.Linear(2, 2)
    layer(torch.ones(1, 2)).sum().backward()
    expected = torch.cat([p.grad.flatten() for p in layer.parameters() if p.grad is not None]).norm()
    assert torch.allclose(clip_gradients(layer, 1e9), expected)
