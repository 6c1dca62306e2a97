"""Several workers: the number of workers that share the streams changes nothing but rounding; bad losses stop all."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

from lookalike.train.run.checkpoints import last_checkpoint
from tests.train.conftest import Bench
from tests.train.run.ranks import train_rank

SGD = {"kind": "sgd", "lr": 0.01, "head_lr": 0.01}


def train(bench: Bench, folder: Path, world: int, spoil: int = 0, **settings: Any) -> dict[str, Any]:
    """The last checkpoint of a run of ``world`` processes."""
    given = (world, bench.root, str(folder), settings, spoil)
    mp.spawn(train_rank, given, nprocs=world, daemon=True)  # type: ignore[no-untyped-call]
    found = last_checkpoint(str(folder))
    assert found is not None
    assert found.world == world
    return found.read()


def close(one: dict[str, Any], other: dict[str, Any], tolerance: float) -> bool:
    return all(
        torch.allclose(one["model"][name], value, rtol=tolerance, atol=tolerance)
        for name, value in other["model"].items()
    )


@pytest.mark.soak
def test_workers_share_the_streams_and_a_run_may_shrink(bench: Bench, tmp_path: Path) -> None:
    settings = {"workers": {"num": 2}, "optimizer": SGD}
    two = train(bench, tmp_path / "two", 2, **settings)
    one = train(bench, tmp_path / "one", 1, **settings)
    # a sum of two does not depend on its order, and halving is exact
    assert close(one, two, 0.0)
    for mine, theirs in zip(one["curve"]["points"], two["curve"]["points"], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-6)
    stopped = train(bench, tmp_path / "shrunk", 2, spoil=6, **settings)
    assert (stopped["step"], stopped["worlds"]) == (4, [[0, 2]])
    shrunk = train(bench, tmp_path / "shrunk", 1, **settings)
    assert shrunk["step"] == 12
    assert close(shrunk, two, 0.0)


@pytest.mark.soak
def test_streams_need_not_divide_among_workers(bench: Bench, tmp_path: Path) -> None:
    settings = {"workers": {"num": 4}, "batch_size": 16, "epochs": 1.2, "optimizer": SGD}
    one = train(bench, tmp_path / "one", 1, **settings)
    three = train(bench, tmp_path / "three", 3, **settings)
    assert close(one, three, 1e-5)
    for mine, theirs in zip(one["curve"]["points"], three["curve"]["points"], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)


@pytest.mark.soak
def test_every_worker_stops_at_a_bad_loss_of_one(bench: Bench, tmp_path: Path) -> None:
    train(bench, tmp_path / "run", 2, spoil=6, workers={"num": 2})
    said = [Path(f"{tmp_path}/run.error-{rank}").read_text() for rank in (0, 1)]
    assert said[0] == said[1]
    assert "not finite at step 6 on rank 1, images" in said[0]
    assert "rank 0" not in said[0]
    assert "step-00000004" in said[0]
