"""Two workers, four parts, float16, sharded proxies and uneven streams beside one process in float32: 20 steps."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

from lookalike.train.run.checkpoints import last_checkpoint
from tests.train.conftest import TASKS, Bench
from tests.train.run.matrix import train_from

STEPS = 20
SHARDED: dict[str, Any] = {name: {**task, "shard": True} for name, task in TASKS.items()}


def settings(streams: int, **more: Any) -> dict[str, Any]:
    """20 steps of two pictures a part: as many of a stream as of two, 3/4 of them of the 40 of the catalogue."""
    return {
        "batch_size": 8 * streams,
        "epochs": STEPS * 6 * streams / 40,
        "optimizer": {"kind": "sgd", "lr": 0.01, "head_lr": 0.01},
        "checkpoint_every": STEPS,
        **more,
        "workers": {"num": streams, "use_gpu": more.get("compute", {}).get("precision") == "float16"},
        "compute": {"accumulation": 4, **more.get("compute", {})},
    }


def train(bench: Bench, folder: Path, world: int, start: Path, **given: Any) -> dict[str, torch.Tensor]:
    """The weights after the last step of ``world`` processes."""
    given = (world, bench.root, str(folder), given, str(start))
    mp.spawn(train_from, given, nprocs=world, daemon=True)  # type: ignore[no-untyped-call]
    found = last_checkpoint(str(folder))
    assert found is not None
    assert found.step == STEPS
    return dict(found.read()["model"])


@pytest.mark.soak
@pytest.mark.parametrize(
    ("streams", "more", "tolerance"),
    [
        pytest.param(2, {"tasks": SHARDED}, 1e-4, marks=pytest.mark.nightly),
        pytest.param(3, {}, 1e-4, marks=pytest.mark.nightly),
        # half precision rounds each product by up to 5e-4, and 20 steps of a network of 40 layers add up; a mean over
        # parts or workers that is taken wrongly is off by a half
        (2, {"tasks": SHARDED, "compute": {"precision": "float16"}}, 0.05),
        (3, {"compute": {"precision": "float16"}}, 0.05),
    ],
    ids=["sharded", "uneven streams", "sharded in float16", "uneven streams in float16"],
)
def test_workers_end_where_one_process_in_float32_ends(
    bench: Bench, tmp_path: Path, streams: int, more: dict[str, Any], tolerance: float
) -> None:
    """The distance between the two ends, over the way that the weights went."""
    start = tmp_path / "start.pt"
    begun = {
        name: value.clone() for name, value in bench.begin(bench.config(**settings(streams))).model.state_dict().items()
    }
    torch.save(begun, start)
    alone = train(bench, tmp_path / "one", 1, start, **settings(streams))
    two = train(bench, tmp_path / "two", 2, start, **settings(streams, **more))
    assert alone.keys() == two.keys()
    moving = [
        name for name, value in alone.items() if value.is_floating_point() and not torch.equal(value, begun[name])
    ]
    assert {name.partition(".")[0] for name in moving} == {"encoder", "tasks"}

    def norm(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], names: list[str]) -> float:
        return float(torch.stack([(one[name] - other[name]).double().square().sum() for name in names]).sum().sqrt())

    for part in ("encoder.backbone", "encoder.projection", "tasks"):
        names = [name for name in moving if name.startswith(part)]
        assert norm(alone, two, names) <= tolerance * norm(alone, begun, names), part
