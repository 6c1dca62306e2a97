"""How many replicas Serve is told to keep, and that it starts and ends them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from pydantic import ValidationError

from lookalike.config import parse_config
from lookalike.errors import UsageError
from lookalike.serve.app import build, replica_options
from lookalike.serve.settings.config import ServeConfig
from lookalike.serve.settings.load import Autoscaling, Deployments, ReplicaSettings

if TYPE_CHECKING:
    from tests.serve.conftest import World


def test_options_of_a_deployment() -> None:
    assert replica_options(ReplicaSettings(), 3, 0.2) == {"num_replicas": 3, "ray_actor_options": {"num_cpus": 0.2}}
    scaling = Autoscaling(min_replicas=2, max_replicas=4, target_ongoing_requests=3, downscale_delay_s=9, look_back_s=7)
    own = ReplicaSettings(autoscaling=scaling, num_cpus=2, memory_mb=100)
    options = replica_options(own, 9, 0.2, 0.5)
    given = options["autoscaling_config"]
    assert (given.min_replicas, given.initial_replicas, given.max_replicas) == (2, 4, 4)
    assert (given.target_ongoing_requests, given.downscale_delay_s, given.look_back_period_s) == (3, 9, 7)
    assert options["ray_actor_options"] == {"num_cpus": 2, "num_gpus": 0.5, "memory": 100 << 20}
    assert "num_replicas" not in options
    with pytest.raises(ValidationError, match="below min_replicas"):
        Autoscaling(min_replicas=3, max_replicas=2)


def test_a_latency_is_no_target_any_more() -> None:
    scaling = {"max_replicas": 4, "target_latency_ms": 50}
    with pytest.raises(UsageError, match=r"unknown key 'deployments\.ingress\.autoscaling\.target_latency_ms'"):
        parse_config(ServeConfig, {"index": "x", "deployments": {"ingress": {"autoscaling": scaling}}}, "serve")


def test_every_deployment_but_the_writer_is_scaled_as_set(
    world: "World", deployed: dict[str, Any], tmp_path: Path
) -> None:
    scaled = ReplicaSettings(autoscaling=Autoscaling(max_replicas=3), memory_mb=64)
    config = ServeConfig.model_validate(
        {
            "index": world.index,
            "placement": "staged",
            "shard_replicas": 2,
            "writes": {"state": str(tmp_path)},
            "deployments": Deployments(
                ingress=scaled, shards=ReplicaSettings(num_cpus=0.5), rerank=scaled, encoder=scaled
            ),
        }
    )
    build(config)
    assert set(deployed) == {"ingress", "shard-000", "shard-001", "rerank", "encoder", "writer"}
    for name in ("ingress", "rerank", "encoder"):
        assert deployed[name]["autoscaling_config"].max_replicas == 3
        assert deployed[name]["ray_actor_options"]["memory"] == 64 << 20
    assert deployed["rerank"]["autoscaling_config"].initial_replicas == 2
    assert deployed["shard-001"]["num_replicas"] == 2
    assert deployed["shard-001"]["ray_actor_options"]["num_cpus"] == 0.5
    assert deployed["writer"]["num_replicas"] == 1
    assert "autoscaling_config" not in deployed["writer"]


@pytest.mark.soak
def test_replicas_come_with_the_load_and_go_after_it() -> None:
    often = {f"RAY_SERVE_{who}_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "0.5" for who in ("HANDLE", "REPLICA")}
    done = subprocess.run(
        [sys.executable, "-m", "tests.serve.scaling"],
        env={**os.environ, **often},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        timeout=400,
    )
    seen = json.loads(done.stdout.splitlines()[-1])
    assert (seen["before"], seen["most"], seen["after"]) == (1, 3, 1)
    assert seen["answered"] > 0
    assert not seen["errors"]
