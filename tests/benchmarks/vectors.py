"""From a file of vectors to the first answer: ours in one command, beside LanceDB and Qdrant Edge, in one run.

    python -m tests.benchmarks.vectors [--quick] [--num N] [--dim D] [--seed S] [--k K] [--engines NAME ...]

An empty folder gets ``vectors.npy`` and ``columns.parquet``. Ours is `lookalike vectors vectors.npy --table
columns.parquet --serve`: checked, indexed, planned and served over gRPC, asked by a client in another process. The
others are libraries: a process reads the file, builds the index with the settings of ``engines_stores.py`` and asks
it; they neither check rows nor measure a plan nor serve. ``first_answer_s`` is wall time from the start (for the
others without Python's own); ``recall`` is against the exact answer, over queries that are not stored. Vectors are
rotated, so that prefixes of them are no embeddings, as with most models. One JSON object per line; an engine that is
not installed is a row that says so.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lookalike.retrieval.machine import machine_facts
from lookalike.retrieval.metrics import per_query_overlap
from lookalike.retrieval.ranking import Floats, Rows
from lookalike.retrieval.vectors import normalise
from lookalike.serve.client import Client
from tests.benchmarks.engine_case import find_engine
from tests.synthetic import make_vectors

ENGINES = ("lancedb-hnsw-sq", "qdrant-edge")
NUM_QUERIES = 200
Row = dict[str, Any]


def make_files(folder: Path, num: int, dim: int, seed: int) -> Floats:
    """Write vectors and columns; return queries float32 [n, dim] from the same distribution."""
    drawn, classes = make_vectors(num + NUM_QUERIES, dim, seed=seed)
    rotation, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((dim, dim)))
    vectors: Floats = drawn @ rotation.astype(np.float32)
    np.save(folder / "vectors.npy", vectors[:num])
    columns = {"id": [f"item-{row}" for row in range(num)], "title": [f"thing {row}" for row in range(num)]}
    columns["group"] = [f"class-{number}" for number in classes[:num].tolist()]
    pq.write_table(pa.table(columns), folder / "columns.parquet")
    return vectors[num:]


def exact(folder: Path, queries: Floats, k: int) -> Rows:
    """The ``k`` rows nearest to each query by cosine, int64 [n, k]."""
    vectors = np.load(folder / "vectors.npy")
    scores = normalise(queries) @ normalise(vectors).T
    best = np.argpartition(-scores, k, axis=1)[:, :k]
    return np.take_along_axis(best, np.argsort(-np.take_along_axis(scores, best, axis=1), axis=1), axis=1)


def run_ours(folder: Path, queries: Floats, truth: Rows, k: int) -> Row:
    """One command, and a client."""
    command = [sys.executable, "-m", "lookalike.cli", "vectors", "vectors.npy", "--table", "columns.parquet"]
    start = time.perf_counter()
    with subprocess.Popen(
        [*command, "--serve", "--set", "port=0"], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as service:
        assert service.stdout is not None
        assert service.stderr is not None
        told = ""
        try:
            line = service.stdout.readline()
            found = re.search(r" at (\S+:\d+)", line)
            if found is None:
                return {"error": (line + service.stderr.read())[-2000:]}
            with Client(found[1], timeout_s=60.0) as client:
                client.wait_ready(60.0)
                client.search(vector=queries[0], k=k)
                first = time.perf_counter() - start
                ids, times = [], []
                for query in queries:
                    begun = time.perf_counter()
                    ids.append([int(hit.id.removeprefix("item-")) for hit in client.search(vector=query, k=k).hits])
                    times.append(time.perf_counter() - begun)
        finally:
            service.send_signal(signal.SIGINT)
            told = service.stderr.read()
    stages = {f"{name}_s": float(seconds) for name, seconds in re.findall(r"done step=(\w+) .*seconds=([\d.]+)", told)}
    plan = re.search(r'I plan plan="([^"]*)"', told)
    return {
        "first_answer_s": round(first, 1),
        **stages,
        "recall": float(per_query_overlap(np.array(ids), truth).mean()),
        "p50_ms": round(1000 * float(np.median(times)), 2),
        "plan": plan[1] if plan else None,
        "lines": 1,
    }


def run_engine(name: str, folder: Path, k: int) -> Row:
    """The engine in a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.vectors", "--case", name, "--folder", str(folder), "--k", str(k)]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1][-300:]}
    row: Row = json.loads(done.stdout.splitlines()[-1])
    return {**row, "process_s": round(time.perf_counter() - start, 1)}


def run_case(name: str, folder: Path, k: int) -> Row:
    """Read the file, build, open, ask: the first setting of the engine that was measured to reach .95, or its last."""
    start = time.perf_counter()
    engine = find_engine(name)
    vectors, queries, truth = (np.load(folder / f"{part}.npy") for part in ("vectors", "queries", "truth"))
    target = folder / name
    target.mkdir()
    engine.build(normalise(vectors), str(target))
    prepare = engine.open(str(target), vectors.shape[1])
    prepare(k, **engine.settings[0])(normalise(queries[:1]))
    first, row = time.perf_counter() - start, {}
    for setting in engine.settings:
        search, times, rows = prepare(k, **setting), [], []
        for query in normalise(queries):
            begun = time.perf_counter()
            rows.append(search(query[None])[0])
            times.append(time.perf_counter() - begun)
        recall = float(per_query_overlap(np.array(rows), truth).mean())
        row = {"recall": recall, "p50_ms": round(1000 * float(np.median(times)), 2), "setting": dict(setting)}
        if recall >= 0.99:
            break
    return {"first_answer_s": round(first, 1), **row}


def main() -> None:
    """Run all engines and print a JSON object for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="5,000 vectors of 128 numbers")
    parser.add_argument("--num", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--engines", nargs="*", default=["ours", *ENGINES])
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(run_case(options.case, options.folder, options.k)))
        return
    num, dim = (5000, 128) if options.quick else (options.num, options.dim)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(Path("platform").resolve()), str(Path.cwd()), os.environ.get("PYTHONPATH", "")])
    )
    times: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="lookalike-vectors-") as name:
        folder = Path(name)
        queries = make_files(folder, num, dim, options.seed)
        truth = exact(folder, queries, options.k)
        np.save(folder / "queries.npy", queries)
        np.save(folder / "truth.npy", truth)
        for engine in options.engines:
            ours = engine == "ours"
            row = run_ours(folder, queries, truth, options.k) if ours else run_engine(engine, folder, options.k)
            times |= {engine: row["first_answer_s"]} if "first_answer_s" in row else {}
            facts = {"bench": "vectors", "case": engine, "num": num, "dim": dim, "k": options.k}
            print(json.dumps({**facts, **row, "machine": machine_facts()}), flush=True)
    others = [name for name in times if name != "ours" and "ours" in times]
    ratios = {f"first_answer_{name}_to_ours": times[name] / times["ours"] for name in others}
    print(json.dumps({"bench": "vectors", "summary": True, "ratios": ratios}))


if __name__ == "__main__":
    main()
