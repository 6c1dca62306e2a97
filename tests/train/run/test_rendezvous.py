"""Workers on one machine meet where no other machine can reach them."""

import json
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch
import torch.distributed as dist
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from lookalike.train.run.rendezvous import LoopbackTorch, torch_config


def add_up(settings: dict[str, Any]) -> None:
    """Add ranks, and write the sum with everything that this worker listens at."""
    numbers = torch.tensor([1.0 + dist.get_rank()])
    dist.all_reduce(numbers)
    doors = {door.laddr.ip for door in psutil.Process().net_connections("tcp") if door.status == "LISTEN"}
    dist.barrier()
    Path(settings["folder"], f"{dist.get_rank()}.json").write_text(json.dumps([numbers.item(), sorted(doors)]))


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_workers_of_one_machine_meet_on_loopback(tmp_path: Path) -> None:
    (tmp_path / "seen").mkdir()
    config = torch_config(use_gpu=False)
    TorchTrainer(
        add_up,
        train_loop_config={"folder": str(tmp_path / "seen")},
        torch_config=config,
        scaling_config=ScalingConfig(num_workers=2, resources_per_worker={"CPU": 1}),
        run_config=RunConfig(name="ray", storage_path=str(tmp_path / "ray")),
    ).fit()
    seen = [json.loads(file.read_text()) for file in sorted((tmp_path / "seen").iterdir())]
    assert [total for total, _ in seen] == [3.0, 3.0]
    doors = {door.removeprefix("::ffff:") for _, doors in seen for door in doors}
    assert doors == {"127.0.0.1"}


def test_a_cluster_meets_as_ray_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = {}
    for address in ("127.0.0.1", "10.1.2.3"):
        monkeypatch.setattr(ray.util, "get_node_ip_address", lambda address=address: address)
        kinds[address] = type(torch_config(use_gpu=True))
    assert kinds == {"127.0.0.1": LoopbackTorch, "10.1.2.3": TorchConfig}
