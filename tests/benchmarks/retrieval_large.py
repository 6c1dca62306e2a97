"""An index larger than memory should be: embeddings made part by part, indexed, opened, searched.

    python -m tests.benchmarks.retrieval_large [--quick] [--num N] [--dim D] [--shards S] [--kinds ivf-rabitq graph]

One JSON object per line. ``rss_gib`` is the resident memory of the driver, Ray and its workers together, sampled ten
times a second; it includes mapped files and counts shared pages once per process. ``private_gib`` leaves out pages that
are shared or can be read again from a file. The last build adds a hundredth of new rows, with the index before it as
``previous``. Truth is the exact plan.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from lookalike import storage
from lookalike.artifacts import Artifact, Draft
from lookalike.cluster import ClusterConfig, ensure_ray
from lookalike.retrieval.machine import machine_facts
from lookalike.retrieval.metrics import per_query_overlap
from lookalike.retrieval.plan import Plan
from lookalike.retrieval.ranking import Floats, Rows
from lookalike.retrieval.searcher import Searcher
from lookalike.retrieval.shortlist import shortlist_name
from lookalike.serve.index.build import STAGE, IndexConfig
from lookalike.stages import execute
from tests.synthetic import Hierarchy, embeddings_table, make_part, publish_tables

PART_ROWS, QUERIES, K, SEED, CLASSES = 1 << 16, 200, 10, 7, 1000
QUERY_PART, EXTRA_PART = 1 << 20, 1 << 19
"""Numbers of parts that no database has."""
EFFORTS: dict[str, dict[str, int]] = {"ivf-rabitq": {"shortlist_k": 100, "nprobe": 32}, "graph": {"shortlist_k": 50}}
"""K of the plans over the larger prefix; types not listed take 100."""
LIMIT_GIB = 6.0


class MemoryWatch:
    """Peak memory of this process and its descendants inside a block, sampled."""

    def __init__(self, interval_s: float = 0.1) -> None:
        self.rss_gib = self.private_gib = 0.0
        self._interval_s, self._stop = interval_s, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "MemoryWatch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        me = psutil.Process()
        while not self._stop.wait(self._interval_s):
            rss = private = 0
            for process in [me, *me.children(recursive=True)]:
                with suppress(psutil.Error):
                    held = process.memory_info()
                    rss, private = rss + held.rss, private + held.rss - held.shared
            self.rss_gib = max(self.rss_gib, rss / (1 << 30))
            self.private_gib = max(self.private_gib, private / (1 << 30))

    @property
    def facts(self) -> dict[str, float]:
        """Both peaks."""
        return {"rss_gib": round(self.rss_gib, 2), "private_gib": round(self.private_gib, 2)}


def draw_table(hierarchy: Hierarchy, part: int, size: int) -> pa.Table:
    """A part of ``size`` float16 vectors."""
    vectors, classes = make_part(hierarchy, size, part=part, seed=SEED)
    ids = [f"{part:07d}-{row:06d}" for row in range(size)]
    return embeddings_table(vectors.astype(np.float16), {"image_id": ids, "group": [f"g{n}" for n in classes]})


def make_embeddings(root: str, hierarchy: Hierarchy, num: int) -> Artifact:
    """``num`` vectors, made and written part by part."""
    sizes = [min(PART_ROWS, num - start) for start in range(0, num, PART_ROWS)]
    tables = (draw_table(hierarchy, part, size) for part, size in enumerate(sizes))
    dims = [64, 128, hierarchy.dim] if hierarchy.dim > 128 else [hierarchy.dim // 2, hierarchy.dim]
    return publish_tables(Draft(root, "embeddings", "db", f"{num:020d}"), tables, dims=dims, encoder="none")


def grow_embeddings(base: Artifact, hierarchy: Hierarchy, extra: int) -> Artifact:
    """The same parts and one more with ``extra`` vectors."""
    draft = Draft(base.root, "embeddings", "more", base.manifest.fingerprint)
    storage.make_directory(draft.uri)
    for part in base.files("part-"):
        storage.share_file(part, draft.path(part.rpartition("/")[2]))
    pq.write_table(draw_table(hierarchy, EXTRA_PART, extra), draft.path("part-extra.parquet"), use_dictionary=False)
    facts = base.read_json("meta.json")
    draft.write_json("meta.json", facts | {"rows": facts["rows"] + extra})
    return draft.publish(config={}, parents={}, stage_version=1, duration_s=0.0)


def build(root: str, config: IndexConfig, embeddings: Artifact, previous: Artifact | None) -> tuple[Artifact, Any]:
    """An index and a row about its build."""
    inputs = {"embeddings": [embeddings]} | ({"previous": [previous]} if previous else {})
    start = time.perf_counter()
    with MemoryWatch() as watch:
        index = execute(STAGE, config, inputs, root, config.shortlist)
    wall_s = time.perf_counter() - start
    kept = {key: index.stats[key] for key in ("shards_reused", "shards_appended", "shards_rebuilt")}
    row = {
        "case": f"{'add to' if previous else 'build'} {config.shortlist}",
        "wall_s": round(wall_s, 1),
        "tasks_s": index.manifest.duration_s,
        "publish_s": round(wall_s - index.manifest.duration_s, 1),
        "shortlist_s": shortlist_seconds(index),
        **kept,
        **watch.facts,
        "disk_gib": round(sum(file.size_bytes for file in index.manifest.files) / (1 << 30), 3),
        "shortlist_bytes_per_row": {
            dim: round(size / index.stats["rows"], 1) for dim, size in index.stats["shortlist_bytes"].items()
        },
    }
    return index, row


def shortlist_seconds(index: Artifact) -> dict[str, float]:
    """Dim -> build seconds over all workers, from the times at which each shard's files were finished."""
    meta = Searcher.open(index.uri, check=False).meta
    seconds = {str(dim): 0.0 for dim in meta.shortlist_dims}
    for folder in meta.shards:
        names = ["digests.npy", *(shortlist_name(dim, meta.shortlist) for dim in meta.shortlist_dims)]
        times = [Path(index.path(folder, name)).stat().st_mtime for name in names]
        for dim, before, after in zip(meta.shortlist_dims, times[:-1], times[1:], strict=True):
            seconds[str(dim)] += after - before
    return {dim: round(total, 1) for dim, total in seconds.items()}


def search(index: Artifact, queries: Floats, truth: Rows | None) -> tuple[dict[str, Any], Rows]:
    """A row about searching an index, and the exact answer, computed unless given."""
    with MemoryWatch() as watch:
        start = time.perf_counter()
        searcher = Searcher.open(index.uri, check=False)
        for shard in searcher.shards:
            shard.load()
        open_s = time.perf_counter() - start
        meta = searcher.meta
        start = time.perf_counter()
        exact = searcher.search(queries, K).rows if truth is None else truth
        exact_s = time.perf_counter() - start
        effort: Any = EFFORTS.get(meta.shortlist, {"shortlist_k": 100})
        plan = Plan(shortlist_dim=meta.shortlist_dims[-1], rerank_dim=meta.dim, **effort)
        searcher.search(queries, K, plan)
        start = time.process_time()
        found = searcher.search(queries, K, plan).rows
        cpu_s = time.process_time() - start
        single = []
        for query in queries:
            start = time.perf_counter()
            searcher.search(query, K, plan)
            single.append(time.perf_counter() - start)
    row = {
        "case": f"search {meta.shortlist}",
        "plan": plan.describe(),
        "rows": meta.num_live,
        "open_s": round(open_s, 2),
        "recall_at_10": round(float(per_query_overlap(found, exact).mean()), 4),
        "query_us": round(median(single) * 1e6),
        "query_p99_us": round(float(np.quantile(single, 0.99)) * 1e6),
        "cpu_us": round(cpu_s / len(queries) * 1e6),
        **watch.facts,
    }
    return row | ({} if truth is not None else {"exact_batch_us": round(exact_s / len(queries) * 1e6)}), exact


def main() -> int:
    """Run all cases and print one line each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="20,000 vectors of 128-d")
    parser.add_argument("--num", type=int)
    parser.add_argument("--dim", type=int)
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--kinds", nargs="+", default=["ivf-rabitq", "graph"])
    parser.add_argument("--shortlist-dims", type=int, nargs="+", help="default: 64 and 128")
    parser.add_argument("--root", help="where to keep the artifacts; a temporary folder by default")
    arguments = parser.parse_args()
    num = arguments.num or (20_000 if arguments.quick else 2_000_000)
    dim = arguments.dim or (128 if arguments.quick else 512)
    facts = {"bench": "retrieval_large", "num": num, "dim": dim, "shards": arguments.shards, "machine": machine_facts()}
    root = arguments.root or tempfile.mkdtemp(prefix="lookalike-bench-")
    peaks: dict[str, float] = {}

    def report(row: dict[str, Any]) -> None:
        peaks[row["case"]] = row["rss_gib"]
        print(json.dumps(facts | row), flush=True)

    try:
        run(root, num, dim, arguments, report)
    finally:
        if not arguments.root:
            shutil.rmtree(root, ignore_errors=True)
    ratios = {"rss_of_6_gib": round(max(peaks.values()) / LIMIT_GIB, 3)}
    print(json.dumps(facts | {"summary": True, "ratios": ratios, "peaks_gib": peaks}))
    return 0


def run(root: str, num: int, dim: int, arguments: argparse.Namespace, report: Any) -> None:
    """Run all cases; ``report`` takes the row of each."""
    hierarchy = Hierarchy(np.random.default_rng(SEED), dim, CLASSES)
    start = time.perf_counter()
    with MemoryWatch() as watch:
        embeddings = make_embeddings(root, hierarchy, num)
        more = grow_embeddings(embeddings, hierarchy, min(PART_ROWS, max(1, num // 100)))
    report({"case": "embeddings", "wall_s": round(time.perf_counter() - start, 1), **watch.facts})
    ensure_ray(ClusterConfig(num_cpus=2, object_store_mb=100, progress_bars=False))
    with MemoryWatch() as watch:
        time.sleep(1)
    report({"case": "ray alone", **watch.facts})
    queries, _ = make_part(hierarchy, QUERIES, part=QUERY_PART, seed=SEED)
    truth = None
    for kind in arguments.kinds:
        config = IndexConfig(
            num_shards=arguments.shards, shortlist=kind, dtype="float16", shortlist_dims=arguments.shortlist_dims
        )
        index, row = build(root, config, embeddings, None)
        report(row)
        row, truth = search(index, queries, truth)
        report(row)
        grown, row = build(root, config, more, index)
        report(row)
        shutil.rmtree(index.uri)
        row, _ = search(grown, queries, None)
        report(row | {"case": f"search grown {kind}"})
        shutil.rmtree(grown.uri)


if __name__ == "__main__":
    sys.exit(main())
