"""Filtered search: the index against a scan of the allowed rows, for half of the rows down to a hundredth.

    python tests/benchmarks/retrieval_filters.py [--quick] [--num N] [--kinds hnsw ivf ivf-rabitq]

One JSON object per line: recall@10 against the exact answer over the allowed rows, processor time per query of a batch
and median time of single queries, both ways. ``retrieval/filters.py`` takes its thresholds from here.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from statistics import median

os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

import numpy as np
import pyarrow as pa

from lookalike.retrieval import filters
from lookalike.retrieval.index_types import ShortlistOptions
from lookalike.retrieval.machine import machine_facts
from lookalike.retrieval.metrics import per_query_overlap
from lookalike.retrieval.plan import Plan
from lookalike.retrieval.ranking import Floats, Mask, Rows
from lookalike.retrieval.shard_meta import SHARD_META, ShardMeta
from lookalike.retrieval.shard_searcher import ShardSearcher
from lookalike.retrieval.shortlist import build_shortlist, shortlist_name
from lookalike.retrieval.store import PrefixStore
from lookalike.retrieval.store_writer import write_store
from tests.synthetic import make_vectors

DIMS, PREFIX, CLASSES, QUERIES = (32, 64, 128), 64, 300, 100
PLAN = Plan(shortlist_dim=PREFIX, shortlist_k=100, rerank_dim=DIMS[-1])


def open_shard(folder: str, kind: str, data: Floats) -> ShardSearcher:
    """One shard of ``kind`` over the 64-d prefix."""
    meta = ShardMeta(num_rows=len(data), row_offset=0, dims=DIMS, shortlist=kind, shortlist_dims=(PREFIX,))
    ids = pa.table({"image_id": [f"{row:012d}" for row in range(len(data))]})
    meta = write_store(folder, meta, ids, [(np.arange(len(data)), data)])
    prefix = PrefixStore(folder, meta).unit_prefix(PREFIX)
    build_shortlist(kind, prefix, ShortlistOptions()).save(f"{folder}/{shortlist_name(PREFIX, kind)}")
    with open(f"{folder}/{SHARD_META}", "w") as file:
        file.write(meta.model_dump_json())
    return ShardSearcher.open(folder)


def make_masks(share: float, classes: Rows) -> dict[str, Mask]:
    """``share`` of the rows, at random and as whole classes."""
    generator = np.random.default_rng(0)
    order = generator.permutation(CLASSES)
    sizes = np.cumsum(np.bincount(classes, minlength=CLASSES)[order])
    chosen = order[: int(np.searchsorted(sizes, share * len(classes))) + 1]
    return {"random": generator.random(len(classes)) < share, "class": np.isin(classes, chosen)}


def measure(shard: ShardSearcher, queries: Floats, mask: Mask, *, scan: bool) -> dict[str, float]:
    """Recall and times by a scan of the allowed rows, or by the index."""
    filters.SCAN_ROWS = len(mask) if scan else 0
    filters.SCAN_GRAPH = filters.SCAN_LISTS = 0
    truth = shard.search(queries, 10, Plan.exact(DIMS[-1]), mask).rows
    start = time.process_time()
    found = shard.search(queries, 10, PLAN, mask).rows
    batch = time.process_time() - start
    single = []
    for query in queries[:30]:
        start = time.perf_counter()
        shard.search(query, 10, PLAN, mask)
        single.append(time.perf_counter() - start)
    name = "scan" if scan else "index"
    return {
        f"{name}_recall_at_10": round(float(per_query_overlap(found, truth).mean()), 4),
        f"{name}_cpu_us": round(batch / len(queries) * 1e6, 1),
        f"{name}_query_us": round(median(single) * 1e6, 1),
    }


def main() -> int:
    """Run all cases and print one line each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="20,000 vectors instead of 100,000")
    parser.add_argument("--num", type=int)
    parser.add_argument("--kinds", nargs="+", default=["hnsw", "ivf", "ivf-rabitq"])
    arguments = parser.parse_args()
    num = arguments.num or (20_000 if arguments.quick else 100_000)
    vectors, classes = make_vectors(num + QUERIES, DIMS[-1], num_classes=CLASSES, seed=3)
    facts = {"bench": "retrieval_filters", "num": num, "dim": DIMS[-1], "threads": 1, "machine": machine_facts()}
    lowest: dict[str, float] = {}
    for kind in arguments.kinds:
        with tempfile.TemporaryDirectory(prefix="lookalike-bench-") as folder:
            shard = open_shard(folder, kind, vectors[:num])
            for share in (0.5, 0.2, 0.1, 0.05, 0.01):
                for name, mask in make_masks(share, classes[:num]).items():
                    case = {"case": f"{kind} {name} {share}", "allowed": int(mask.sum())}
                    for scan in (False, True):
                        case |= measure(shard, vectors[num:], mask, scan=scan)
                    lowest[kind] = min(lowest.get(kind, 1.0), case["index_recall_at_10"])
                    print(json.dumps(facts | case), flush=True)
    ratios = {f"{kind}_lowest_recall": low for kind, low in lowest.items()}
    print(json.dumps(facts | {"summary": True, "ratios": ratios}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
