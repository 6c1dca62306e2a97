"""What a service reserves: the resources of all its replicas, compared with what a machine or cluster has."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from lookalike.errors import UsageError
from lookalike.serve.settings.config import ServeConfig
from lookalike.serve.settings.load import ReplicaSettings

UNITS = {"CPU": "CPUs", "GPU": "GPUs", "memory": "bytes of memory"}
TOLERANCE = 1e-6
"""Sums of tenths are not exact."""


class Demand(NamedTuple):
    """The replicas of one kind of deployment, at their most."""

    name: str
    replicas: int
    each: dict[str, float]
    """Resource -> what a replica reserves."""


def list_demands(config: ServeConfig, num_shards: int, *, has_encoder: bool) -> list[Demand]:
    """The replicas of the service of an index in ``num_shards`` shards.

    A compaction is not among them: it reserves nothing, so that it always has a place.
    """
    kinds, own = config.deployments, config.encoder_replicas
    demands = [_demand(config, "ingress", kinds.ingress, config.num_replicas)]
    if config.placement != "fused":
        shards = _demand(config, f"{num_shards} shards", kinds.shards, config.shard_replicas)
        demands.append(shards._replace(replicas=num_shards * shards.replicas))
        if has_encoder:
            demands.append(_demand(config, "encoder", kinds.encoder, own.num_replicas, num_gpus=own.num_gpus))
    if config.placement == "staged":
        demands.append(_demand(config, "rerank", kinds.rerank, config.shard_replicas))
    if config.writes.state is not None:
        demands.append(_demand(config, "writer", ReplicaSettings(), 1))
    return demands


def _demand(
    config: ServeConfig, name: str, settings: ReplicaSettings, replicas: int, *, num_gpus: float = 0.0
) -> Demand:
    scaling, cpus = settings.autoscaling, settings.num_cpus
    each = {
        "CPU": config.cpus_per_replica if cpus is None else cpus,
        "GPU": num_gpus,
        "memory": float((settings.memory_mb or 0) << 20),
    }
    return Demand(name, replicas if scaling is None else scaling.max_replicas, each)


def check_largest(demands: Sequence[Demand], nodes: Sequence[Mapping[str, float]], resources: Sequence[str]) -> None:
    """Raise ``UsageError`` for a replica that fits on none of the ``nodes``, however much they have together."""
    for resource in resources:
        largest = max((node.get(resource, 0.0) for node in nodes), default=0.0)
        for demand in demands:
            if demand.each[resource] > largest + TOLERANCE:
                raise UsageError(
                    f"a replica of {demand.name} reserves {demand.each[resource]:g} {UNITS[resource]} and the largest "
                    f"node has {largest:g}; let it reserve less (cpus_per_replica, deployments), or add larger nodes"
                )


def check_room(demands: Sequence[Demand], room: Mapping[str, float], where: str, resources: Sequence[str]) -> None:
    """Raise ``UsageError`` with the sum if ``room``, what ``where`` has of each of ``resources``, does not suffice."""
    for resource in resources:
        parts = [demand for demand in demands if demand.each[resource]]
        needed = sum(demand.replicas * demand.each[resource] for demand in parts)
        if needed <= room.get(resource, 0.0) + TOLERANCE:
            continue
        sums = " + ".join(f"{demand.name} {demand.replicas} x {demand.each[resource]:g}" for demand in parts)
        raise UsageError(
            f"the service needs {needed:g} {UNITS[resource]} ({sums}) and {where} has {room.get(resource, 0.0):g}; "
            "lower the numbers of replicas (num_replicas, shard_replicas, autoscaling.max_replicas) or what each "
            "reserves (cpus_per_replica, deployments)"
        )
