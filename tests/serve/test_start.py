"""What ``lookalike serve`` refuses before Ray has started, with the sum or the place that is wrong."""

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from lookalike import cluster
from lookalike.cluster import background, background_processes, count_cpus
from lookalike.errors import LookalikeError, UsageError
from lookalike.serve import app
from lookalike.serve.app import start
from lookalike.serve.generations.database import Database
from lookalike.serve.index.build import map_tasks
from lookalike.serve.settings.config import EncoderReplicas, ServeConfig, Writes
from lookalike.serve.settings.demand import check_largest, check_room, list_demands
from lookalike.serve.settings.load import Autoscaling, Deployments, ReplicaSettings

if TYPE_CHECKING:
    from tests.serve.conftest import World


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(app, "ensure_ray", fail)
    monkeypatch.setattr(app, "count_cpus", lambda: 2)
    monkeypatch.setattr(app, "WAIT_FOR_STATE_S", 0.0)
    monkeypatch.setattr(app.ray, "is_initialized", lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def test_replicas_that_do_not_fit_are_refused_with_the_sum(world: "World", tmp_path: Path) -> None:
    config = ServeConfig(
        index=world.index,
        placement="sharded",
        port=0,
        num_replicas=4,
        shard_replicas=2,
        cpus_per_replica=0.25,
        encoder_replicas=EncoderReplicas(num_replicas=2),
        writes=Writes(state=str(tmp_path / "state")),
    )
    words = (
        r"the service needs 2.75 CPUs \(ingress 4 x 0.25 \+ 2 shards 4 x 0.25 \+ encoder 2 x 0.25 \+ writer 1 x 0.25\) "
        "and this machine has 2; lower"
    )
    begun = time.monotonic()
    with pytest.raises(UsageError, match=words):
        start(config)
    assert time.monotonic() - begun < 10
    with pytest.raises(AssertionError, match="Ray was started"):
        start(config.model_copy(update={"num_replicas": 1}))


def test_a_sum_counts_what_replicas_may_grow_to() -> None:
    scaled = ReplicaSettings(autoscaling=Autoscaling(max_replicas=6), num_cpus=0.5, memory_mb=100)
    config = ServeConfig(
        index="x",
        placement="staged",
        deployments=Deployments(shards=scaled),
        encoder_replicas=EncoderReplicas(num_gpus=0.5, num_replicas=3),
    )
    demands = list_demands(config, 2, has_encoder=True)
    assert {each.name: each.replicas for each in demands} == {"ingress": 1, "2 shards": 12, "encoder": 3, "rerank": 1}
    room = {"CPU": 7.0, "GPU": 1.5, "memory": float(1200 << 20)}
    check_room(demands, room, "Ray", ["CPU", "GPU", "memory"])
    for resource, words in (("CPU", "needs 7 CPUs"), ("GPU", "needs 1.5 GPUs"), ("memory", "bytes of memory")):
        with pytest.raises(UsageError, match=words):
            check_room(demands, {**room, resource: 0.9 * room[resource]}, "Ray", ["CPU", "GPU", "memory"])


def test_a_replica_larger_than_every_node_is_refused() -> None:
    large = Deployments(ingress=ReplicaSettings(num_cpus=3))
    demands = list_demands(ServeConfig(index="x", deployments=large), 1, has_encoder=False)
    check_largest(demands, [{"CPU": 2.0}, {"CPU": 3.0}], ["CPU"])
    with pytest.raises(UsageError, match="a replica of ingress reserves 3 CPUs and the largest node has 2; let it"):
        check_largest(demands, [{"CPU": 2.0}] * 3, ["CPU"])


def test_a_folder_of_another_service_or_that_is_none_is_refused(world: "World", tmp_path: Path) -> None:
    def refusal(folder: Path) -> str:
        config = ServeConfig(index=world.index, encoder="none", port=0, writes=Writes(state=str(folder)))
        begun = time.monotonic()
        with pytest.raises(LookalikeError) as refused:
            start(config)
        assert time.monotonic() - begun < 10
        return str(refused.value)

    held = Database(str(tmp_path / "held"))
    assert "another service writes to" in refusal(tmp_path / "held")
    held.close()
    (tmp_path / "file").write_text("no folder")
    assert f"writes.state={tmp_path / 'file'} cannot be used" in refusal(tmp_path / "file")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "writes.sqlite").write_text("a recipe for bread, in rather more than a hundred bytes" * 4)
    assert "is not a database of writes" in refusal(tmp_path / "foreign")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "state.json").write_text("{}")
    assert "is of an older version" in refusal(tmp_path / "old")
    with pytest.raises(AssertionError, match="Ray was started"):  # the same folder, free again
        start(ServeConfig(index=world.index, encoder="none", port=0, writes=Writes(state=str(tmp_path / "held"))))


@pytest.mark.parametrize(("files", "expected"), [({"v2": "150000 100000"}, 1), ({"v2": "max 100000"}, 9), ({}, 9)])
def test_cpus_of_a_container_are_those_of_its_quota(
    files: dict[str, str], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(9)))
    monkeypatch.setattr(cluster, "CPU_QUOTAS", [str(tmp_path / "v2"), str(tmp_path / "v1")])
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert count_cpus() == expected
    if not files:
        (tmp_path / "v1").write_text("300000")
        assert count_cpus() == 3


def test_background_work_needs_no_free_cpu() -> None:
    assert background_processes() is None
    with background():
        assert background_processes() == 1
        assert map_tasks(lambda one, two: one + two, [(1, 2), (3, 4)], "sums") == [3, 7]
