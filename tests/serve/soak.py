"""A service under load and faults, every reply checked; prints one JSON object.

    python -m tests.serve.soak [--seconds S] [--seed N] [--root FOLDER]

A simulated cluster of two nodes serves a made-up index with two replicas of each shard and one to three ingresses.
Two callers search, and for a while many more, until there are three ingresses; another writes, overwrites and deletes.
Meanwhile replicas are killed at random, a node is taken away and comes back, five generations are switched to, one is
rolled back, and the writes are compacted. Once the many have left and there is one ingress again, every process is
killed and the service starts again from its folder.

Checked: a reply is exactly what brute force finds in the generation it names (so no reply mixes two); errors are of the
promised kinds; each acknowledged write is found soon, and all are there after the restart.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from lookalike.artifacts import Artifact
from lookalike.cluster import set_environment
from lookalike.serve.client import Client
from lookalike.serve.settings.config import ServeConfig, Writes
from lookalike.serve.settings.load import Autoscaling, Deployments, ReplicaSettings
from lookalike.serve.wire.errors import RetrievalError
from tests.serve.conftest import publish, publish_embeddings, publish_index
from tests.serve.soak_callers import DIM, PROMISED, Book, K, SoakOutcome, check_written, search, surge, write

NUM_ROWS = 400
GENERATIONS = 5
CALLERS = 2
"""Callers that search all the time."""
SCALING = Autoscaling(max_replicas=3, target_ongoing_requests=5, upscale_delay_s=1, downscale_delay_s=3, look_back_s=3)


def publish_generations(root: str, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """URI -> vectors [n, DIM] of the rows img-000, img-001, ... of each generation."""
    from lookalike.artifacts import Draft

    draft = Draft(root, "encoder", "encoder", "a" * 20)
    draft.write_json("nothing.json", {})
    encoder = publish(draft)
    published = {}
    for number in range(GENERATIONS):
        vectors = rng.normal(size=(NUM_ROWS, DIM)).astype(np.float32)
        named = {f"img-{row:03d}": vector for row, vector in enumerate(vectors)}
        embeddings = publish_embeddings(root, encoder, named, fingerprint=f"{number:020d}")
        index = publish_index(root, embeddings, named, encoder.manifest.fingerprint, fingerprint=f"{number:020d}")
        published[index.uri] = vectors
    return published


def brute_force(vectors: np.ndarray, queries: np.ndarray) -> list[list[str]]:
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    order = np.argsort(-(queries @ unit.T), axis=1)[:, :K]
    return [[f"img-{row:03d}" for row in rows] for rows in order.tolist()]


def replica_names() -> list[tuple[str, str]]:
    """(name, namespace) of the replicas' actors."""
    import ray

    return [
        (actor["name"], actor["namespace"])
        for actor in ray.util.list_named_actors(all_namespaces=True)
        if actor["name"].startswith("SERVE_REPLICA::")
    ]


def kill_one(rng: random.Random, killed: Counter[str], role: str = "") -> None:
    """End a replica at random, or one of ``role``."""
    import ray

    names = [name for name in replica_names() if role in name[0]]
    if not names:
        return
    name, namespace = rng.choice(names)
    with contextlib.suppress(ValueError):  # gone meanwhile
        ray.kill(ray.get_actor(name, namespace=namespace), no_restart=True)
        killed[name.split("#")[1] if "#" in name else name] += 1


def disturb(cluster: Any, rng: random.Random, load: "Future[None]", killed: Counter[str]) -> None:
    """Kill replicas every few seconds, take a node away and bring it back, until the load is over."""
    node = cluster.add_node(num_cpus=2)  # in the main thread, since Ray sets signal handlers
    turn = 0
    while not load.done():
        time.sleep(rng.uniform(3, 5))
        turn += 1
        if turn % 4 == 2 and node is not None:
            cluster.remove_node(node, allow_graceful=False)
            node = None
            killed["node"] += 1
        elif node is None:
            try:
                node = cluster.add_node(num_cpus=2)
            except Exception as error:  # noqa: BLE001  # Ray raises no other; the next turn tries again
                tell(f"no node yet: {error}")
        else:
            kill_one(rng, killed, "#writer#" if turn % 8 == 4 else "")


async def switch_all(address: str, uris: list[str], pause_s: float, outcome: SoakOutcome) -> None:
    """Serve one generation after the other; a rollback serves one of them twice."""
    client = await asyncio.to_thread(Client, address, timeout_s=120)
    for number, uri in enumerate([*uris[1:], uris[0]]):
        await asyncio.sleep(pause_s)
        await again(lambda uri=uri: client.switch(uri, encoder="none", timeout_s=120), outcome)
        outcome.counts["switches"] += 1
        tell(f"switched {number + 1} times")
        if number == 2:
            await again(client.rollback, outcome)
            outcome.counts["rollbacks"] += 1
    client.close()


async def again(call: Any, outcome: SoakOutcome, attempts: int = 20) -> Any:
    """Repeat an operator's call while the writer is away."""
    for _ in range(attempts):
        try:
            return await asyncio.to_thread(call)
        except RetrievalError as error:
            outcome.errors[f"admin {error.code.name}"] += 1
            if error.code.name not in {*PROMISED, "INTERNAL"}:  # INTERNAL: the ingress died meanwhile
                raise
            await asyncio.sleep(1)
    raise AssertionError("the writer does not come back")


@contextlib.contextmanager
def cluster_of_two() -> Iterator[Any]:
    """Ray with a head node; the caller adds the second."""
    import ray
    from ray.cluster_utils import Cluster

    set_environment()  # as a cluster's manifests do
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 3, "object_store_memory": 150 << 20, "include_dashboard": False},
    )
    os.environ["RAY_ADDRESS"] = cluster.address
    try:
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()
        os.environ.pop("RAY_ADDRESS", None)


def run(seconds: float, seed: int, root: str) -> dict[str, Any]:
    """Run the whole soak; return its figures."""
    from lookalike.serve.app import start, stop

    generator = np.random.default_rng(seed)
    worlds = publish_generations(f"{root}/artifacts", generator)
    queries = generator.normal(size=(50, DIM)).astype(np.float32)
    uris = list(worlds)
    config = ServeConfig(
        index=uris[0],
        encoder="none",
        placement="sharded",
        port=0,
        shard_replicas=2,
        timeout_s=8,
        cpus_per_replica=0.2,
        deployments=Deployments(ingress=ReplicaSettings(autoscaling=SCALING)),
        writes=Writes(state=f"{root}/state", compact_rows=None),
    )
    outcome, book, killed = SoakOutcome(), Book(seed), Counter[str]()
    before: list[str] = []
    """The generation that is compacted: the index that comes of it has the same rows, and the written ones."""

    async def under_load(address: str) -> None:
        stopping = asyncio.Event()
        tasks = [asyncio.ensure_future(search(address, queries, outcome, stopping, seed + n)) for n in range(CALLERS)]
        tasks.append(asyncio.ensure_future(write(address, book, outcome, stopping)))
        many = asyncio.ensure_future(surge(address, queries, outcome, seconds / 4, seed + CALLERS))
        await switch_all(address, uris, seconds / (GENERATIONS + 1), outcome)
        with Client(address, timeout_s=300) as client:
            before.append((await again(client.status, outcome)).current)
            await again(client.compact, outcome)
        tell("compacted")
        await many
        tell(f"ingresses {outcome.ingresses}")
        stopping.set()
        await asyncio.gather(*tasks)

    with cluster_of_two() as cluster:
        address = start(config)
        tell(f"serving at {address}")
        with ThreadPoolExecutor(1) as pool:
            load = pool.submit(asyncio.run, under_load(address))
            disturb(cluster, random.Random(seed), load, killed)
            load.result()
        end_all(cluster)
    with cluster_of_two():
        address = start(config)
        tell("everything was killed, and serves again")
        outcome.counts["rows after restart"] = asyncio.run(check_written(address, book, outcome.wrong))
        stop()
    expected = {
        Artifact.open(uri, check=False).manifest.fingerprint: brute_force(vectors, queries)
        for uri, vectors in worlds.items()
    }
    for name, number, ids in outcome.replies:
        wanted = expected.get(name, expected[before[0]])[number]
        if ids != wanted:
            outcome.wrong.append(f"{name} query {number}: {ids} for {wanted}")
    late = np.array(outcome.late_ms)
    return {
        "bench": "serve_soak",
        "seconds": seconds,
        "seed": seed,
        **outcome.counts,
        "errors": dict(outcome.errors),
        "killed": dict(killed),
        "ingresses": outcome.ingresses,
        "generations_seen": len({name for name, _, _ in outcome.replies}),
        "found_after_ms": {"p50": round(float(np.median(late)), 1), "p99": round(float(np.percentile(late, 99)), 1)},
        "num_wrong": len(outcome.wrong),
        "wrong": outcome.wrong[:10],
    }


def tell(what: str) -> None:
    """Print progress, with the time."""
    print(f"{time.strftime('%X')} soak: {what}", file=sys.stderr, flush=True)


def end_all(cluster: Any) -> None:
    """Kill every replica's process and the controller at once, as a power cut does."""
    import ray

    names = [(actor["name"], actor["namespace"]) for actor in ray.util.list_named_actors(all_namespaces=True)]
    for name, namespace in names:
        with contextlib.suppress(ValueError):
            ray.kill(ray.get_actor(name, namespace=namespace), no_restart=True)
    del cluster


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="about how long the faults last")
    parser.add_argument("--seed", type=int, default=17)
    parser.add_argument("--root", type=Path, help="where indexes and writes go; default: a temporary folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        print(json.dumps(run(options.seconds, options.seed, str(options.root or temporary))))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    os.environ.setdefault("RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S", "0.5")
    main()
