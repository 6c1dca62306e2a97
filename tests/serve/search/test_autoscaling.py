"""How many replicas the policy wants, and that Serve makes and ends them."""

import asyncio
import json
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from lookalike.serve.app import build
from lookalike.serve.search.autoscaling import (
    Load,
    LoadPolicy,
    Pace,
    Paced,
    count_replicas,
    paced,
    replica_options,
    to_serve,
)
from lookalike.serve.settings.config import ServeConfig
from lookalike.serve.settings.load import Autoscaling, Deployed, Deployments

if TYPE_CHECKING:
    from tests.serve.conftest import World

LOADS = st.floats(0, 1e4)
BOUNDS = st.tuples(st.integers(1, 20), st.integers(0, 30)).map(lambda pair: (pair[0], pair[0] + pair[1]))
TARGETS = st.tuples(st.floats(0.1, 100), st.none() | st.floats(0.1, 1000))


def count(load: Load, target: float = 4, latency: float | None = 100, lowest: int = 1, highest: int = 10) -> int:
    return count_replicas(load, target_ongoing=target, target_latency_ms=latency, lowest=lowest, highest=highest)


@pytest.mark.parametrize(
    ("load", "wanted"),
    [
        (Load(0, 0, 1), 1),
        (Load(4, 50, 1), 1),
        (Load(5, 10, 1), 2),
        (Load(30, 10, 1), 8),
        (Load(400, 10, 1), 10),
        (Load(4, 150, 2), 3),
        (Load(4, 900, 2), 4),
        (Load(4, 80, 3), 3),
        (Load(4, 40, 3), 2),
        (Load(3, 40, 3), 1),
        (Load(7.9, 40, 3), 3),
        (Load(6.4, 40, 3), 2),
        (Load(0, 0, 10), 1),
    ],
)
def test_either_target_grows_and_only_both_shrink(load: Load, wanted: int) -> None:
    assert count(load) == wanted


def test_without_a_latency_only_requests_count() -> None:
    assert count(Load(4, 1e9, 1), latency=None) == 1


@given(LOADS, LOADS, st.integers(1, 50), BOUNDS, TARGETS)
def test_never_outside_the_bounds(
    ongoing: float, latency: float, replicas: int, bounds: tuple[int, int], targets: tuple[float, float | None]
) -> None:
    assert bounds[0] <= count(Load(ongoing, latency, replicas), *targets, *bounds) <= bounds[1]


@given(st.tuples(LOADS, LOADS), st.tuples(LOADS, LOADS), st.integers(1, 50), BOUNDS, TARGETS)
def test_more_load_never_wants_fewer(
    load: tuple[float, float],
    more: tuple[float, float],
    replicas: int,
    bounds: tuple[int, int],
    targets: tuple[float, float | None],
) -> None:
    less = count(Load(*load, replicas), *targets, *bounds)
    assert less <= count(Load(load[0] + more[0], load[1] + more[1], replicas), *targets, *bounds)


@given(st.integers(1, 50), BOUNDS, TARGETS)
def test_quiet_leads_back_to_the_floor(replicas: int, bounds: tuple[int, int], targets: Any) -> None:
    assert count(Load(0.0, 0.0, replicas), *targets, *bounds) == bounds[0]


@given(st.floats(0, 300), st.integers(1, 10))
def test_a_steady_load_settles(ongoing: float, replicas: int) -> None:
    settled = count(Load(ongoing, 10, count(Load(ongoing, 10, replicas))))
    assert count(Load(ongoing, 10, settled)) == settled


def test_serves_context_is_read() -> None:
    config = to_serve(Autoscaling(min_replicas=2, max_replicas=6, target_ongoing_requests=3, target_latency_ms=50), 9)
    assert config.initial_replicas == 6
    policy = config.policy.get_policy()(**config.policy.policy_kwargs)
    assert type(policy) is LoadPolicy
    context = SimpleNamespace(
        aggregated_metrics={"latency_ms": {"a": 20.0, "b": 120.0}},
        total_num_requests=3,
        target_num_replicas=2,
        capacity_adjusted_min_replicas=2,
        capacity_adjusted_max_replicas=6,
        config=config,
    )
    assert policy(context) == (3, {})
    context.aggregated_metrics = {}
    assert policy(context) == (2, {})


def test_replicas_tell_how_long_calls_take() -> None:
    class Worker(Paced):
        @paced
        async def work(self, seconds: float) -> float:
            await asyncio.sleep(seconds)
            if not seconds:
                raise ValueError
            return seconds

    async def run() -> dict[str, float]:
        worker = Worker()
        assert await worker.record_autoscaling_stats() == {"latency_ms": 0.0}
        assert await worker.work(0.04) == 0.04
        with pytest.raises(ValueError, match=r"^$"):
            await worker.work(0)
        return await worker.record_autoscaling_stats()

    assert asyncio.run(run())["latency_ms"] >= 20


def test_old_calls_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    pace, now = Pace(), 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    pace.add(5.0)
    assert pace.mean_ms == 5000
    now = 111.0
    assert pace.mean_ms == 0


def test_options_of_a_deployment() -> None:
    assert replica_options(Deployed(), 3, 0.2) == {"num_replicas": 3, "ray_actor_options": {"num_cpus": 0.2}}
    own = Deployed(autoscaling=Autoscaling(max_replicas=4), num_cpus=2, memory_mb=100)
    options = replica_options(own, 3, 0.2, 0.5)
    assert options["ray_actor_options"] == {"num_cpus": 2, "num_gpus": 0.5, "memory": 100 << 20}
    assert "num_replicas" not in options
    with pytest.raises(ValidationError, match="below min_replicas"):
        Autoscaling(min_replicas=3, max_replicas=2)


def test_every_deployment_but_the_writer_is_scaled_as_set(world: "World", tmp_path: Any) -> None:
    scaled = Deployed(autoscaling=Autoscaling(max_replicas=3), memory_mb=64)
    config = ServeConfig.model_validate(
        {
            "index": world.index,
            "placement": "staged",
            "shard_replicas": 2,
            "writes": {"state": str(tmp_path)},
            "deployments": Deployments(ingress=scaled, shards=Deployed(num_cpus=0.5), rerank=scaled, encoder=scaled),
        }
    )
    found = {one.name: one for one in deployments_of(build(config))}
    assert set(found) == {"ingress", "shard-000", "shard-001", "rerank", "encoder", "writer"}
    for name in ("ingress", "rerank", "encoder"):
        assert found[name]._deployment_config.autoscaling_config.max_replicas == 3
        assert found[name].ray_actor_options["memory"] == 64 << 20
    assert found["rerank"]._deployment_config.autoscaling_config.initial_replicas == 2
    assert found["shard-001"].num_replicas == 2
    assert found["shard-001"].ray_actor_options["num_cpus"] == 0.5
    assert found["writer"].num_replicas == 1
    assert found["writer"]._deployment_config.autoscaling_config is None


def deployments_of(application: Any) -> list[Any]:
    """The deployments that an application binds, itself first."""
    deployment = application._bound_deployment
    found, waiting = [deployment], list(deployment.init_args)
    while waiting:
        value = waiting.pop()
        if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
            waiting += value
        elif hasattr(value, "_bound_deployment"):
            found += [one for one in deployments_of(value) if one.name not in {known.name for known in found}]
    return found


@pytest.mark.soak
def test_replicas_come_with_the_load_and_go_after_it() -> None:
    often = {f"RAY_SERVE_{who}_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "0.5" for who in ("HANDLE", "REPLICA")}
    done = subprocess.run(
        [sys.executable, "-m", "tests.serve.search.scaling"],
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
