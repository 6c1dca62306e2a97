"""Servers of the serving benchmark; each is a process that ends when its standard input does.

    python -m tests.benchmarks.serving_servers raw|application|prepare SETTINGS_JSON

``raw`` is a hand-written grpc.aio server around the ``Searcher``. It searches and looks up ids and metadata in a thread
(``asyncio.to_thread``), with the messages and answers of the service but without its checks, limits, deadlines and
metrics. ``application`` is this service with its own Ray, and the no-op hop beside it. ``prepare`` builds the indexes.
The first line on standard output is the address of the server.
"""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import numpy as np

from lookalike.artifacts import Draft
from lookalike.retrieval.plan import Plan, load_plan
from lookalike.retrieval.searcher import Searcher
from lookalike.serve.app import free_port, start, stop
from lookalike.serve.proto import retrieval_pb2 as pb
from lookalike.serve.proto.retrieval_pb2_grpc import RetrievalServiceServicer, add_RetrievalServiceServicer_to_server
from lookalike.serve.settings.config import ServeConfig
from lookalike.serve.wire.plans import to_plan
from tests.benchmarks.serving_hop import build_hop
from tests.synthetic import make_vectors, publish_embeddings

START_S = 300.0
HOPS = 4
MODEL = "5" * 20
THROUGHPUT = {"RAY_SERVE_THROUGHPUT_OPTIMIZED": "1", "RAY_SERVE_ENABLE_HA_PROXY": "1"}


class Server(NamedTuple):
    """A running server."""

    address: str
    process: int


@contextmanager
def running(kind: str, settings: dict[str, Any], environment: dict[str, str] | None = None) -> Iterator[Server]:
    """A server in a process of its own; it has ended, with all its children, when the block has."""
    command = [sys.executable, "-m", "tests.benchmarks.serving_servers", kind, json.dumps(settings)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **(environment or {})}
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"the {kind} server ended with {process.wait()} before it listened")
        yield Server(json.loads(line)["address"], process.pid)
    finally:
        process.stdin.close()
        try:
            process.wait(START_S)
        finally:
            process.kill()


def throughput_environment(folder: str) -> dict[str, str]:
    """Serve's throughput mode behind HAProxy, with ports and files that no other cluster here has.

    ``folder`` needs a short name: a socket's path takes 97 characters, and Ray adds 60.
    """
    return {
        **THROUGHPUT,
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{folder}/haproxy.cfg",
        "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{folder}/admin.sock",
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": folder,
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{folder}/server-state",
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
    }


class RawService(RetrievalServiceServicer):  # type: ignore[misc]
    """The searcher behind gRPC, and nothing more."""

    def __init__(self, index: str, plan: str, encoder: str) -> None:
        import torch

        from lookalike.vision.encoder import Encoder

        torch.set_num_threads(1)  # as many as the service's encoder takes
        self._searcher, self._plan = Searcher.open(index), load_plan(plan)
        for shard in self._searcher.shards:
            shard.load()
        self._encoder = Encoder.load(encoder)
        meta = self._searcher.meta
        coverage = pb.Coverage(shards_answered=meta.num_shards, shards_asked=meta.num_shards)
        self._info = pb.SearchInfo(
            plan=to_plan(self._plan),
            index_generation=meta.generation,
            coverage=coverage,
            model_fingerprint=meta.model_fingerprint,
        )

    async def Search(self, request: pb.SearchRequest, context: grpc.aio.ServicerContext) -> pb.SearchResponse:
        (hits,) = await asyncio.to_thread(self._find, [request.query], request.options.k)
        return pb.SearchResponse(hits=hits, info=self._info)

    async def SearchBatch(
        self, request: pb.SearchBatchRequest, context: grpc.aio.ServicerContext
    ) -> pb.SearchBatchResponse:
        found = await asyncio.to_thread(self._find, request.queries, request.options.k)
        return pb.SearchBatchResponse(results=[pb.HitList(hits=hits) for hits in found], info=self._info)

    def _find(self, queries: Sequence[pb.Query], k: int) -> list[list[pb.Hit]]:
        vectors = np.stack(
            [
                np.frombuffer(query.vector, "<f4")
                if query.WhichOneof("kind") == "vector"
                else self._encoder.encode([query.image])[0]
                for query in queries
            ]
        )
        rows, scores = self._searcher.search(vectors, k, self._plan)
        metadata = self._searcher.metadata(rows)
        hits = [
            pb.Hit(id=own.pop("image_id"), score=score, metadata=own)
            for own, score in zip(metadata, scores.ravel().tolist(), strict=True)
        ]
        return [hits[place : place + k] for place in range(0, len(hits), k)]


async def _serve_raw(settings: dict[str, Any]) -> None:
    server = grpc.aio.server()
    add_RetrievalServiceServicer_to_server(RawService(**settings), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    _announce(f"127.0.0.1:{port}")
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(None)


def _serve_application(settings: dict[str, Any]) -> None:
    import ray
    from ray import serve

    _start_ray()
    address = start(ServeConfig.model_validate(settings))
    serve.run(build_hop(HOPS), name="hop", route_prefix="/hop")
    _announce(address)
    sys.stdin.read()
    stop()
    ray.shutdown()


def _start_ray() -> None:
    from lookalike.cluster import ClusterConfig, ensure_ray

    ensure_ray(ClusterConfig(num_cpus=2, object_store_mb=200, progress_bars=False))


def _prepare(*, root: str, num: int, dim: int, seed: int, shards: Sequence[int], shortlist_dim: int) -> None:
    import ray

    from lookalike.serve.index.build import STAGE, IndexConfig
    from lookalike.stages import execute

    vectors, classes = make_vectors(num, dim, seed=seed)
    dims = (*(size for size in (8, 16, 32, 64, 128, 256, 512, 1024) if size < dim), dim)
    columns = {
        "image_id": [f"{row:09d}" for row in range(num)],
        "title": [f"picture {row}" for row in range(num)],
        "category": [f"class {number}" for number in classes],
    }
    embeddings = publish_embeddings(root, "embeddings", vectors, columns, dims=dims, encoder=MODEL)
    encoder = _publish_encoder(root, dims)
    plan = Plan(shortlist_dim=shortlist_dim, shortlist_k=100, rerank_dim=dim)
    _start_ray()
    made: dict[str, Any] = {"encoder": encoder, "indexes": {}}
    for number in shards:
        config = IndexConfig(num_shards=number, shortlist_dims=(shortlist_dim,))
        index = execute(STAGE, config, {"embeddings": [embeddings]}, root, f"index-{number}")
        draft = Draft(root, "plan", f"plan-{number}", MODEL)
        draft.write_json("plan.json", {"plan": plan.model_dump(mode="json"), "candidates": []})
        draft.publish(config={}, parents={"index": [index]}, stage_version=1, duration_s=0.0)
        made["indexes"][number] = {"index": index.uri, "plan": draft.uri}
    Path(root, "made.json").write_text(json.dumps(made))
    ray.shutdown()
    _announce("")


def _publish_encoder(root: str, dims: tuple[int, ...]) -> str:
    from lookalike.vision.encoder import EncoderConfig, build_model, save_encoder
    from lookalike.vision.transforms import TransformConfig

    config = EncoderConfig(
        backbone="test_vit", num_features=64, dims=dims, projection=True, transform=TransformConfig(size=160)
    )
    draft = Draft(root, "encoder", "encoder", MODEL)
    save_encoder(draft, build_model(config), config, "# random\n")
    return draft.publish(config={}, parents={}, stage_version=1, duration_s=0.0).uri


def _announce(address: str) -> None:
    print(json.dumps({"address": address}), flush=True)


def main() -> int:
    """Serve until standard input ends."""
    kind, settings = sys.argv[1], json.loads(sys.argv[2])
    if kind == "raw":
        asyncio.run(_serve_raw(settings))
    elif kind == "application":
        _serve_application(settings)
    else:
        _prepare(**settings)
    return 0


if __name__ == "__main__":
    sys.exit(main())
