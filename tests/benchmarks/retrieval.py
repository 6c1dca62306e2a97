"""Exact search, ours, and faiss alone, on the same vectors, queries and thread: recall, time, memory, build time.

    python tests/benchmarks/retrieval.py [--quick] [--num N] [--dim D] [--seed S]

One JSON object a line; the last one has the ratios. The truth is faiss's exact answer. ``query_us`` is the median of
queries sent one by one, ``cpu_us`` the processor time per query of one batch, the least of the repeats; on a busy
machine the second is the one to trust. ``held_mb`` is what a search touches besides the rows it re-ranks.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

import faiss
import numpy as np
import pyarrow as pa

from lookalike.retrieval.machine import machine_facts
from lookalike.retrieval.metrics import per_query_overlap
from lookalike.retrieval.plan import Plan
from lookalike.retrieval.ranking import Floats, Rows
from lookalike.retrieval.searcher import ShardSearcher
from lookalike.retrieval.shortlist import EF_CONSTRUCTION, HNSW_M, ShortlistOptions, build_shortlist, shortlist_name
from lookalike.retrieval.store import SHARD_META, PrefixStore, ShardMeta, normalise, write_store
from lookalike.retrieval.synthetic import make_vectors

K = 10
SHORTLIST_DIMS = (64, 128)
OURS = (("hnsw", "float32"), ("graph", "float16"))
PLANS: tuple[Any, ...] = (
    (64, 100), (64, 100, (512, 25)), (128, 40), (128, 50), (128, 50, (512, 20)), (128, 70, (512, 25)),
)  # fmt: skip
"""Shortlist dim, K, funnel steps."""
Search = Callable[[Floats], Rows]


def open_ours(
    folder: str, kind: str, dtype: str, data: Floats, dims: tuple[int, ...]
) -> tuple[ShardSearcher, dict[int, float]]:
    """One shard in ``folder`` and the seconds that each shortlist took to build."""
    wanted = tuple(d for d in SHORTLIST_DIMS if d < data.shape[1])
    meta = ShardMeta(num_rows=len(data), row_offset=0, dims=dims, dtype=dtype, shortlist=kind, shortlist_dims=wanted)
    rows = np.arange(len(data))
    parts = np.array_split(rows, max(1, len(data) // 20_000))
    ids = pa.table({"image_id": [f"{row:012d}" for row in rows]})
    os.makedirs(folder)
    meta = write_store(folder, meta, ids, ((part, data[part]) for part in parts))
    seconds = {}
    for dim in wanted:
        start = time.perf_counter()
        built = build_shortlist(kind, PrefixStore(folder, meta).unit_prefix(dim), ShortlistOptions())
        built.save(f"{folder}/{shortlist_name(dim, kind)}")
        seconds[dim] = time.perf_counter() - start
    with open(f"{folder}/{SHARD_META}", "w") as file:
        file.write(meta.model_dump_json())
    return ShardSearcher.open(folder), seconds


def build_faiss(data: Floats, prefix: int) -> tuple[faiss.Index, faiss.Index, dict[str, float]]:
    """(HNSW over the full vector, IndexRefine over HNSW of a prefix) and the seconds each took."""
    unit, seconds = normalise(data), {}
    start = time.perf_counter()
    full = faiss.IndexHNSWFlat(data.shape[1], HNSW_M, faiss.METRIC_INNER_PRODUCT)
    full.hnsw.efConstruction = EF_CONSTRUCTION
    full.add(unit)
    seconds["full"] = time.perf_counter() - start
    start = time.perf_counter()
    graph = faiss.IndexHNSWFlat(prefix, HNSW_M, faiss.METRIC_INNER_PRODUCT)
    graph.hnsw.efConstruction = EF_CONSTRUCTION
    cut = faiss.IndexPreTransform(faiss.NormalizationTransform(prefix, 2.0), graph)
    base = faiss.IndexPreTransform(faiss.RemapDimensionsTransform(data.shape[1], prefix, False), cut)
    refine = faiss.IndexRefine(base, faiss.IndexFlatIP(data.shape[1]))
    refine.add(unit)
    seconds["refine"] = time.perf_counter() - start
    return full, refine, seconds


def measure(search: Search, queries: Floats, truth: Rows, repeats: int) -> dict[str, float]:
    """Recall@10 and times of one case."""
    found = search(queries)
    single = []
    for query in queries[:100]:
        start = time.perf_counter()
        search(query[None])
        single.append(time.perf_counter() - start)
    cpu = []
    for _ in range(repeats):
        start = time.process_time()
        search(queries)
        cpu.append((time.process_time() - start) / len(queries))
    return {"recall_at_10": round(float(per_query_overlap(found, truth).mean()), 4),
            "query_us": round(median(single) * 1e6, 1), "cpu_us": round(min(cpu) * 1e6, 1)}  # fmt: skip


def list_cases(folder: str, data: Floats) -> Iterator[tuple[str, Search, dict[str, Any]]]:
    """(name, search, facts) of everything compared; the first is the truth."""
    num, dim = data.shape
    dims = (*(d for d in (8, 16, 32, 64, 128, 256, 512, 1024) if d < dim), dim)
    flat = faiss.IndexFlatIP(dim)
    flat.add(normalise(data))
    yield "faiss exact", _faiss_case(flat, None), {"held_mb": round(num * dim * 4 / 1e6, 1), "build_s": 0.0}
    del flat
    for kind, dtype in OURS:
        yield from _our_cases(f"{folder}/{kind}-{dtype}", kind, dtype, data, dims)
    full, refine, built = build_faiss(data, 64)
    for ef in (24, 32, 48, 64, 128):
        settings = faiss.SearchParametersHNSW(efSearch=ef)
        facts = {"build_s": round(built["full"], 1), "held_mb": round(num * (dim * 4 + 64 * 4) / 1e6, 1)}
        yield f"faiss HNSW full ef{ef}", _faiss_case(full, settings), facts
    module: Any = faiss  # its stubs do not know these classes' keywords
    beam = module.SearchParametersPreTransform(index_params=module.SearchParametersHNSW(efSearch=100))
    inner = module.SearchParametersPreTransform(index_params=beam)
    refining = module.IndexRefineSearchParameters(k_factor=100 / K, base_index_params=inner)
    facts = {"build_s": round(built["refine"], 1), "held_mb": round(num * (64 * 4 + 64 * 4) / 1e6, 1)}
    yield "faiss IndexRefine p64 K100", _faiss_case(refine, refining), facts


def _our_cases(
    folder: str, kind: str, dtype: str, data: Floats, dims: tuple[int, ...]
) -> Iterator[tuple[str, Search, dict[str, Any]]]:
    ours, seconds = open_ours(folder, kind, dtype, data, dims)

    def case(plan: Plan) -> Search:
        return lambda queries: ours.search(queries, K, plan).rows

    yield f"ours exact {dtype}", case(Plan.exact(dims[-1])), {"held_mb": 0.0, "build_s": 0.0}
    for d, k, *stages in PLANS:
        if d in seconds and all(d < step < dims[-1] for step, _ in stages):
            plan = Plan(shortlist_dim=d, shortlist_k=k, stages=tuple(stages), rerank_dim=dims[-1])
            size = os.path.getsize(f"{folder}/{shortlist_name(d, kind)}")
            facts = {"plan": plan.describe(), "build_s": round(seconds[d], 1), "held_mb": round(size / 1e6, 1)}
            yield f"ours {kind} {dtype} p{d} K{k}{' funnel' if stages else ''}", case(plan), facts


def _faiss_case(index: faiss.Index, settings: faiss.SearchParameters | None) -> Search:
    return lambda queries: index.search(normalise(queries), K, params=settings)[1]


def main() -> int:
    """Run all cases and print one line each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="20,000 vectors of 256-d instead of 100,000 of 768-d")
    parser.add_argument("--num", type=int)
    parser.add_argument("--dim", type=int)
    parser.add_argument("--seed", type=int, default=17)
    arguments = parser.parse_args()
    arguments.num = arguments.num or (20_000 if arguments.quick else 100_000)
    arguments.dim = arguments.dim or (256 if arguments.quick else 768)
    num_queries = 200 if arguments.quick else 500
    vectors, _ = make_vectors(arguments.num + num_queries, arguments.dim, seed=arguments.seed)
    data, queries = vectors[: arguments.num], vectors[arguments.num :]
    facts = {"bench": "retrieval", "num": arguments.num, "dim": arguments.dim, "queries": num_queries,
             "seed": arguments.seed, "threads": 1, "machine": machine_facts()}  # fmt: skip
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="lookalike-bench-") as folder:
        truth: Rows | None = None
        for name, search, more in list_cases(folder, data):
            truth = search(queries) if truth is None else truth
            rows[name] = {"case": name, **measure(search, queries, truth, 3), **more}
            print(json.dumps(facts | rows[name]), flush=True)
    print(json.dumps(facts | {"summary": True, **summarise(rows)}))
    return 0


def summarise(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Ratios of processor time, and the cases they compare: the cheapest of each side at recall@10 >= .99."""
    ours, full = (_cheapest(rows, start) for start in ("ours", "faiss HNSW full"))
    exact = min((name for name in rows if name.startswith("ours exact")), key=lambda name: rows[name]["query_us"])
    return {"best": ours, "hnsw_full": full, "exact": exact, "ratios": {
        "qps_vs_exact": _ratio(rows, "faiss exact", ours), "qps_vs_hnsw_full": _ratio(rows, full, ours),
        "ram_ratio": None if ours is None else round(rows["faiss exact"]["held_mb"] / rows[ours]["held_mb"], 1),
        "p64_vs_index_refine": _ratio(rows, "faiss IndexRefine p64 K100", "ours graph float16 p64 K100"),
        "exact_query_vs_faiss": round(rows["faiss exact"]["query_us"] / rows[exact]["query_us"], 2),
    }}  # fmt: skip


def _cheapest(rows: dict[str, dict[str, Any]], start: str) -> str | None:
    good = [name for name, row in rows.items() if name.startswith(start) and "exact" not in name
            and row["recall_at_10"] >= 0.99]  # fmt: skip
    return min(good, key=lambda name: rows[name]["cpu_us"], default=None)


def _ratio(rows: dict[str, dict[str, Any]], one: str | None, other: str | None) -> float | None:
    """How many times the processor time of ``other`` that of ``one`` is."""
    return round(rows[one]["cpu_us"] / rows[other]["cpu_us"], 2) if one in rows and other in rows else None


if __name__ == "__main__":
    sys.exit(main())
