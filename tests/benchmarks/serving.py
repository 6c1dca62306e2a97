"""This service beside a hand-written gRPC server around the same searcher, and the hop between deployments.

    python -m tests.benchmarks.serving [--quick] [--num 60000] [--dim 384] [--seconds 2] [--rounds 3]
        [--modes default throughput] [--layouts fused-1 sharded-1 sharded-2 sharded-4 staged-2] [--clients 1 8 32]

Both servers run on loopback with the same vectors, plan and messages. ``raw`` is a grpc.aio server in another process
(see ``serving_servers``). ``served`` is ``lookalike.serve.app`` with its own Ray, in Serve's default mode and in its
throughput mode behind HAProxy; a layout is a placement and a number of shards. ``hop`` is the time of a call from a
no-op ingress to as many no-op replicas as there are shards, less that of the no-op ingress alone, in the same Serve.
Clients run in this process, each in a closed loop. Windows of load alternate between the servers, and a row holds the
median window.

Queries are single vectors, batches of 32 vectors and, in fused-1 and sharded-2, single JPEGs of the sample corpus
through a small encoder of random weights. ``cpu_ms`` is CPU time per request of all server processes, including Ray's.
Answers of both servers are compared before they are measured. Output is one JSON object per line. The last line has the
ratios with their extremes: ``*_p50_vs_raw``, ``*_p50_minus_hops_vs_raw`` (staged pays two), ``*_batch_qps_vs_raw`` and
``*_batch_p50_vs_raw``, which is steadier on a shared machine.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

import pyarrow.parquet as pq

from lookalike import storage
from lookalike.retrieval.machine import machine_facts
from lookalike.serve.proto import retrieval_pb2 as pb
from tests.benchmarks.serving_load import Call, Figures, apply_load, ask_once, idle_cpu_ms
from tests.benchmarks.serving_servers import Server, running, throughput_environment
from tests.synthetic import make_vectors

SAMPLE = "data/samples/furniture"
K = 20
BATCH = 32
NUM_QUERIES = 256
WITH_IMAGES = ("fused-1", "sharded-2")
HOPS = {"fused": 0, "sharded": 1, "staged": 2}
Row = Callable[..., None]


class Requests(NamedTuple):
    """Serialised requests by kind."""

    single: list[bytes]
    batch: list[bytes]
    image: list[bytes]


class Pair(NamedTuple):
    """A layout of the service in one mode, and the raw server on the same index."""

    mode: str
    layout: str
    raw: Server
    served: Server


def make_requests(options: argparse.Namespace) -> Requests:
    """Queries from the distribution of the indexed vectors, and pictures of the sample corpus."""
    vectors = make_vectors(options.num + NUM_QUERIES, options.dim, seed=options.seed)[0][options.num :]
    queries = [pb.Query(vector=vector.tobytes()) for vector in vectors]
    chosen = pb.SearchOptions(k=K)
    (name,) = storage.list_files(SAMPLE)
    images = pq.read_table(storage.join(SAMPLE, name), columns=["image"])["image"].slice(0, 16).to_pylist()
    return Requests(
        [pb.SearchRequest(query=query, options=chosen).SerializeToString() for query in queries],
        [
            pb.SearchBatchRequest(queries=queries[start : start + BATCH], options=chosen).SerializeToString()
            for start in range(0, NUM_QUERIES, BATCH)
        ],
        [pb.SearchRequest(query=pb.Query(image=image), options=chosen).SerializeToString() for image in images],
    )


def compare_answers(pair: Pair, requests: Requests) -> None:
    """Raise unless both servers give the same ids, scores and metadata for the same vectors."""
    answers = []
    for server in (pair.raw, pair.served):
        single = ask_once(Call(server.address, "Search", requests.single[:BATCH]))
        (batch,) = ask_once(Call(server.address, "SearchBatch", requests.batch[:1]))
        hits = [pb.HitList(hits=pb.SearchResponse.FromString(one).hits) for one in single]
        answers.append((hits, list(pb.SearchBatchResponse.FromString(batch).results)))
    if answers[0] != answers[1]:
        raise AssertionError(f"{pair.mode} {pair.layout}: the service's answers are not those of the raw server")


def list_calls(pair: Pair, requests: Requests) -> dict[str, tuple[Call, int]]:
    """What is measured: name -> call, process of the server."""
    calls = {}
    kinds = ["single", "batch", *(["image"] if pair.layout in WITH_IMAGES else [])]
    for kind in kinds:
        for name, server in (("raw", pair.raw), ("served", pair.served)):
            method = "SearchBatch" if kind == "batch" else "Search"
            calls[f"{name} {kind}"] = (Call(server.address, method, getattr(requests, kind)), server.process)
    shards = int(pair.layout.partition("-")[2])
    hop = pb.EmbedRequest(images=[requests.single[0]] * shards).SerializeToString()
    served = pair.served
    calls["hop without"] = (Call(served.address, "Describe", [b""], "hop"), served.process)
    calls["hop with"] = (Call(served.address, "Embed", [hop], "hop"), served.process)
    return calls


def measure(pair: Pair, requests: Requests, options: argparse.Namespace, row: Row) -> dict[str, list[float]]:
    """Print a row for each number of clients and each call; the ratios of every round, by name."""
    ratios: dict[str, list[float]] = {}
    calls = list_calls(pair, requests)
    for clients in options.clients:
        rounds: list[dict[str, Figures]] = []
        for number in range(options.rounds):
            turn = list(calls.items())[:: 1 if number % 2 else -1]  # no one always goes first
            rounds.append({name: apply_load(call, clients, options.seconds, process) for name, (call, process) in turn})
            for name, value in compare(pair, rounds[-1]):
                ratios.setdefault(f"{name}_c{clients}_{pair.mode}", []).append(value)
        for name in calls:
            windows = [figures[name] for figures in rounds]
            row(
                name,
                mode=pair.mode,
                layout=pair.layout,
                clients=clients,
                **{field: round(median(getattr(one, field) for one in windows), 3) for field in Figures._fields},
            )
    return ratios


def compare(pair: Pair, figures: dict[str, Figures]) -> Iterator[tuple[str, float]]:
    """Ratios of one round."""
    placement, name = pair.layout.partition("-")[0], pair.layout.replace("-", "_")
    hop_ms = figures["hop with"].p50_ms - figures["hop without"].p50_ms
    yield f"{name}_hop_ms", hop_ms
    for kind in ("single", "image"):
        if f"raw {kind}" in figures:
            raw, served = figures[f"raw {kind}"], figures[f"served {kind}"]
            label = name if kind == "single" else f"{name}_{kind}"
            yield f"{label}_p50_vs_raw", served.p50_ms / raw.p50_ms
            hops = HOPS[placement] + (kind == "image" and placement != "fused")  # the encoder's own
            if hops:
                yield f"{label}_p50_minus_hops_vs_raw", (served.p50_ms - hops * hop_ms) / raw.p50_ms
    yield f"{name}_cpu_vs_raw", figures["served single"].cpu_ms / figures["raw single"].cpu_ms
    raw, served = figures["raw batch"], figures["served batch"]
    yield f"{name}_batch_qps_vs_raw", served.qps / raw.qps
    yield f"{name}_batch_p50_vs_raw", served.p50_ms / raw.p50_ms
    yield f"{name}_batch_cpu_vs_raw", served.cpu_ms / raw.cpu_ms


def measure_layout(
    mode: str, layout: str, folder: str, made: dict[str, Any], measuring: Callable[[Pair], dict[str, list[float]]]
) -> dict[str, list[float]]:
    """Start both servers of one layout, measure them, end them."""
    placement, _, shards = layout.partition("-")
    files = {**made["indexes"][shards], "encoder": made["encoder"]}
    config = {**files, "placement": placement, "port": 0, "loopback_only": mode == "default"}
    environment = throughput_environment(f"{folder}/h") if mode == "throughput" else {}
    with running("raw", files) as raw, running("application", config, environment) as served:
        return measuring(Pair(mode, layout, raw, served))


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="10,000 vectors of 128-d, two layouts, one short round")
    parser.add_argument("--num", type=int, default=60_000, help="vectors in the index")
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--seed", type=int, default=17)
    parser.add_argument("--seconds", type=float, default=2.0, help="length of a window of load")
    parser.add_argument("--rounds", type=int, default=3, help="windows of each kind")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--modes", nargs="+", default=["default", "throughput"], choices=["default", "throughput"])
    layouts = ["fused-1", "sharded-1", "sharded-2", "sharded-4", "staged-2"]
    parser.add_argument("--layouts", nargs="+", default=layouts, choices=layouts)
    options = parser.parse_args()
    if options.quick:
        options.num, options.dim, options.seconds, options.rounds = 10_000, 128, 0.5, 1
        options.clients, options.modes, options.layouts = [1, 8], ["throughput"], ["fused-1", "sharded-2"]
    return options


def main() -> int:
    """Measure and print the rows."""
    options = parse_options()
    facts = {
        "bench": "serving",
        "num": options.num,
        "dim": options.dim,
        "k": K,
        "seed": options.seed,
        "seconds": options.seconds,
        "rounds": options.rounds,
        "machine": machine_facts(),
    }

    def row(case: str, **values: Any) -> None:
        print(json.dumps({**facts, "case": case, **values}), flush=True)

    requests, ratios = make_requests(options), dict[str, list[float]]()

    def measuring(pair: Pair) -> dict[str, list[float]]:
        compare_answers(pair, requests)
        row(
            "idle",
            mode=pair.mode,
            layout=pair.layout,
            raw_cpu_ms_per_s=round(idle_cpu_ms(pair.raw.process, 2), 1),
            served_cpu_ms_per_s=round(idle_cpu_ms(pair.served.process, 2), 1),
        )
        return measure(pair, requests, options, row)

    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        shards = sorted({int(layout.partition("-")[2]) for layout in options.layouts})
        settings = {
            "root": folder,
            "num": options.num,
            "dim": options.dim,
            "seed": options.seed,
            "shards": shards,
            "shortlist_dim": 64,
        }
        with running("prepare", settings):
            made = json.loads(Path(folder, "made.json").read_text())
        for mode in options.modes:
            for layout in options.layouts:
                ratios |= measure_layout(mode, layout, folder, made, measuring)
    spread = {
        name: {"median": round(median(values), 3), "min": round(min(values), 3), "max": round(max(values), 3)}
        for name, values in ratios.items()
    }
    print(json.dumps({**facts, "summary": True, "ratios": spread}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
