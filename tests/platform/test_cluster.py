"""Where a Ray that is started here listens, and that one which is joined stays as it is."""

import json
import os
import subprocess
import sys

import pytest
import ray

from lookalike.cluster import LOOPBACK_VARIABLE, ensure_ray

START = """
import json, psutil, ray, ray.data, ray.train
from lookalike.cluster import ClusterConfig, ensure_ray

ensure_ray(ClusterConfig(num_cpus=1, object_store_mb=80))
assert ray.data.range(3).map(lambda row: row).count() == 3
family = [psutil.Process(), *psutil.Process().children(recursive=True)]
doors = [door.laddr.ip for each in family for door in each.net_connections("tcp") if door.status == "LISTEN"]
print(json.dumps(doors))
"""


@pytest.mark.ray
def test_a_stage_opens_ray_to_nobody_else() -> None:
    """As a stage does it: Ray is imported long before it is started."""
    environment = {name: text for name, text in os.environ.items() if name not in ("RAY_ADDRESS", LOOPBACK_VARIABLE)}
    done = subprocess.run([sys.executable, "-c", START], capture_output=True, text=True, check=True, env=environment)
    doors = json.loads(done.stdout.splitlines()[-1])
    assert len(doors) >= 5  # GCS, raylet, its agents, workers
    assert set(doors) <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


@pytest.mark.parametrize(
    ("address", "chosen", "expected"), [("", None, "0"), ("", "1", "1"), ("10.0.0.1:6379", None, None)]
)
def test_a_cluster_of_several_machines_stays_as_it_is(
    monkeypatch: pytest.MonkeyPatch, address: str, chosen: str | None, expected: str | None
) -> None:
    """One that is joined, and one that the user lets others join."""
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setenv(LOOPBACK_VARIABLE, chosen or "")
    if chosen is None:
        monkeypatch.delenv(LOOPBACK_VARIABLE)
    seen = []
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **given: seen.append(os.environ.get(LOOPBACK_VARIABLE)))
    monkeypatch.setattr(ray, "cluster_resources", dict)
    monkeypatch.setattr(ray, "nodes", list)
    monkeypatch.setattr("lookalike.cluster.configure_data", lambda config: None)
    ensure_ray()
    assert seen == [expected]
