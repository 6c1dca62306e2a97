"""Ours against the engines that users would embed instead: recall, speed, memory, disk and build time, in one run.

    python -m tests.benchmarks.retrieval_engines [--quick] [--num N] [--dim D] [--seed S] [--k K] [--engines NAME ...]
        [--embeddings URI] [--timeout S] [--plot FILE.png]

All engines get the same vectors and queries, one core, and separate processes to build and to search in; install them
with ``pip install -r tests/benchmarks/retrieval-requirements.txt``. One JSON object per line: a row for each setting of
each engine, a row with ``missing`` or ``error`` for an engine that is not installed, crashed or ran out of time, and
last the ratios. ``--engines package.module:NAME`` takes your own ``Engine``.

``recall`` is against the exact answer. ``qps``, ``p50_us`` and ``p99_us`` are of queries sent one by one and ``cpu_us``
is the processor time per query; the ``batch_`` figures are of all queries in one call, null for an engine without it.
``rss_mb`` is the memory added by opening and searching, with touched pages of mapped files; ``disk_mb`` is all files.
"""

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lookalike.artifacts import Artifact
from lookalike.plots import create_figure, to_png
from lookalike.retrieval.machine import machine_facts
from lookalike.retrieval.ranking import Floats, Rows
from lookalike.retrieval.vectors import normalise
from tests.benchmarks.engine_case import ENGINES, find_engine
from tests.synthetic import make_vectors

ONE_THREAD = dict.fromkeys(
    (
        "OMP_NUM_THREADS",
        "OPENBLAS_NUM_THREADS",
        "MKL_NUM_THREADS",
        "RAYON_NUM_THREADS",
        "TOKIO_WORKER_THREADS",
        "LANCE_CPU_THREADS",
    ),
    "1",
)
RECALLS = (0.99, 0.95)
Row = dict[str, Any]


def read_embeddings(uri: str) -> Floats:
    """All vectors of an ``embeddings`` artifact, float32 [n, dim]."""
    import pyarrow.parquet as pq

    from lookalike import storage

    artifact = Artifact.open(uri, "embeddings")
    blocks = []
    for part in artifact.files("part-", ".parquet"):
        filesystem, path = storage.arrow_filesystem(part)
        column = pq.read_table(path, columns=["vector"], filesystem=filesystem)["vector"].combine_chunks()
        blocks.append(column.flatten().to_numpy().astype(np.float32).reshape(len(column), -1))
    return np.concatenate(blocks)


def split(vectors: Floats, num_queries: int, seed: int) -> tuple[Floats, Floats]:
    """(data, queries), both of unit length; the queries are a seeded choice of rows."""
    order = np.random.default_rng(seed).permutation(len(vectors))
    unit = normalise(vectors)
    return unit[np.sort(order[num_queries:])], unit[np.sort(order[:num_queries])]


def exact_rows(data: Floats, queries: Floats, k: int) -> Rows:
    """The k nearest by inner product, from faiss."""
    import faiss

    index = faiss.IndexFlatIP(data.shape[1])
    index.add(data)
    rows: Rows = index.search(queries, k)[1]
    return rows


def is_installed(module: str) -> bool:
    """Whether ``module`` is installed, without importing it."""
    return importlib.util.find_spec(module.partition(".")[0]) is not None


def run_engine(name: str, folder: Path, k: int, timeout_s: float) -> Iterator[Row]:
    """The rows of one engine; if it is not installed or fails, a row with ``missing`` or ``error``."""
    engine = find_engine(name)
    if not is_installed(engine.module):
        remedy = "pip install -r tests/benchmarks/retrieval-requirements.txt"
        yield {"engine": name, "missing": f"{engine.module.partition('.')[0]} is not installed: {remedy}"}
        return
    shutil.rmtree(folder / "engine", ignore_errors=True)
    (folder / "engine").mkdir()
    for file in ("rows.jsonl", "built.json"):
        (folder / file).unlink(missing_ok=True)
    end = time.monotonic() + timeout_s
    error = run_case("build", name, folder, k, end) or run_case("search", name, folder, k, end)
    built, found = folder / "built.json", folder / "rows.jsonl"
    facts = json.loads(built.read_text()) if built.exists() else {}
    for line in found.read_text().splitlines() if found.exists() else ():
        yield {"engine": name, **json.loads(line), **facts}
    if error:
        yield {"engine": name, "error": error, **facts}


def run_case(verb: str, name: str, folder: Path, k: int, end: float) -> str | None:
    """Build or search in a separate process; return the error, or None."""
    command = [sys.executable, "-m", "tests.benchmarks.engine_case", verb, name, str(folder), str(k)]
    with open(folder / "output.txt", "w+", errors="replace") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=output,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **ONE_THREAD, "PYTHONPATH": os.pathsep.join(sys.path)},
            start_new_session=True,
        )
        try:
            code = process.wait(max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            return f"{verb} ran out of time"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # with whatever it has started
                process.wait()
        output.seek(0)
        said = [line.strip() for line in output.read().splitlines() if line.strip()]
    if code < 0:
        return f"{verb} died of {signal.Signals(-code).name}"
    return f"{verb} failed: {said[-1][:300] if said else f'exit code {code}'}" if code else None


def summarise(rows: Sequence[Row]) -> Row:
    """Our fastest setting over the fastest of the others that reach the same recall, one by one and batched.

    ``case`` names both; a side that no setting of reaches the recall leaves no ratio.
    """
    return {
        f"{figure}_vs_best_other": {
            kind: {str(least): _compare(rows, prefix, figure, least) for least in RECALLS}
            for kind, prefix in (("single", ""), ("batch", "batch_"))
        }
        for figure in ("qps", "cpu")
    }


def _compare(rows: Sequence[Row], prefix: str, figure: str, least: float) -> Row:
    """The best of both sides by rate, or by processor time (then ours is the divisor)."""
    key = f"{prefix}qps" if figure == "qps" else f"{prefix}cpu_us"
    good = [row for row in rows if (row.get(f"{prefix}recall") or 0) >= least and row.get(key)]
    sides = [[row for row in good if row["engine"].startswith("ours") is mine] for mine in (True, False)]
    pick = max if figure == "qps" else min
    best = [pick(side, key=lambda row: float(row[key])) if side else None for side in sides]
    names = [f"{row['engine']} {row['setting']}" if row else None for row in best]
    ours, other = best
    ratio = None
    if ours and other:
        ratio = round(ours[key] / other[key] if figure == "qps" else other[key] / ours[key], 2)
    return {"ratio": ratio, "ours": names[0], "other": names[1]}


def plot(rows: Sequence[Row], path: str, title: str) -> None:
    """Recall against rate, one line per engine, through the settings that no other of its settings beats in both."""
    figure = create_figure(15, 6)
    axes = figure.subplots(1, 2, sharey=True)
    names = sorted(
        {row["engine"] for row in rows if "recall" in row}, key=lambda name: (not name.startswith("ours"), name)
    )
    for axis, (prefix, label) in zip(axes, (("", "one query at a time"), ("batch_", "one batch")), strict=True):
        for number, name in enumerate(names):
            points = frontier(
                [
                    (row[f"{prefix}recall"], row[f"{prefix}qps"])
                    for row in rows
                    if row["engine"] == name and row.get(f"{prefix}recall") is not None
                ]
            )
            if points:
                mine, turn = name.startswith("ours"), number if name.startswith("ours") else number // 10
                axis.plot(
                    *zip(*points, strict=True),
                    marker="os^Dv"[number % 5],
                    markersize=4,
                    label=name,
                    color="black" if mine else f"C{number % 10}",
                    linewidth=2 if mine else 1.2,
                    linestyle=("-", "--", ":")[turn % 3],
                )
        axis.set(xlabel="recall", yscale="log", title=label, xlim=(0.8, 1.003))
        axis.axvline(0.99, color="grey", linewidth=0.5)
        axis.axvline(0.95, color="grey", linewidth=0.5)
        axis.grid(alpha=0.3, which="both")
    axes[0].set_ylabel("queries per second, one core")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right", fontsize="small")
    figure.suptitle(title)
    Path(path).write_bytes(to_png(figure))


def frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points (recall, rate) that no other point beats in both, by ascending recall."""
    best: list[tuple[float, float]] = []
    for recall, rate in sorted(points, reverse=True):
        if not best or rate > best[-1][1]:
            best.append((recall, rate))
    return best[::-1]


def parse_arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="5,000 vectors of 256-d instead of 50,000 of 2048-d")
    parser.add_argument("--num", type=int, help="vectors to search (default: 50,000, or all of the embeddings)")
    parser.add_argument("--dim", type=int, help="size of made vectors (default: 2048)")
    parser.add_argument("--seed", type=int, default=17)
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--queries", type=int, help="default: 500, with --quick 200")
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), help=f"of {', '.join(ENGINES)}")
    parser.add_argument("--embeddings", help="URI of an embeddings artifact to take vectors and queries from")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds an engine may take (default: 300)")
    parser.add_argument("--plot", help="PNG file for recall against queries per second")
    arguments = parser.parse_args(given)
    unknown = [name for name in arguments.engines if name not in ENGINES and ":" not in name]
    if unknown:
        parser.error(f"no engines {unknown}; there are {', '.join(ENGINES)}")
    return arguments


def main(given: Sequence[str] | None = None) -> int:
    """Run the engines one after another and print a line per row."""
    options = parse_arguments(given)
    num_queries = options.queries or (200 if options.quick else 500)
    if options.embeddings:
        vectors = read_embeddings(options.embeddings)[: options.num and options.num + num_queries]
    else:
        num, dim = options.num or (5_000 if options.quick else 50_000), options.dim or (256 if options.quick else 2048)
        vectors, _ = make_vectors(num + num_queries, dim, seed=options.seed)
    data, queries = split(vectors, num_queries, options.seed)
    del vectors
    facts = {
        "bench": "retrieval_engines",
        "num": len(data),
        "dim": data.shape[1],
        "queries": len(queries),
        "k": options.k,
        "seed": options.seed,
        "vectors": options.embeddings or "synthetic",
    }
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="lookalike-engines-") as name:
        folder = Path(name)
        for file, array in (("vectors", data), ("queries", queries), ("truth", exact_rows(data, queries, options.k))):
            np.save(folder / f"{file}.npy", array)
        del data
        for engine in options.engines:
            for row in run_engine(engine, folder, options.k, options.timeout):
                rows.append(row)
                print(json.dumps(facts | row), flush=True)
    print(json.dumps(facts | {"summary": True, "machine": machine_facts(), **summarise(rows)}))
    if options.plot:
        plot(rows, options.plot, f"{facts['num']:,} x {facts['dim']}, recall@{options.k}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
