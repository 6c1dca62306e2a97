"""Exact search, ours, and faiss alone, on the same vectors, queries and thread: recall, time, memory, build time.

    python -m tests.benchmarks.retrieval [--quick] [--num N] [--dim D] [--seed S] [--plot FILE.png]

One JSON object per line; the last has the ratios. Exact products by faiss, numpy and torch take part, and ratios are
to the fastest of them: the BLAS that comes with one may not know the processor, ``kernels`` says what each uses. The
truth is faiss's exact answer; P@10 counts hits of the query's
class. Queries sent one by one give ``p50_us`` and ``p99_us``; ``cpu_us`` is the processor time per query of a batch,
fastest repeat: the figure to trust on a busy machine. ``held_mb`` is the memory that a search touches besides the rows
it re-ranks, ``disk_mb`` the size of all files. Cases take turns in each repeat, so that all meet the same load.
``retrieval_engines.py`` compares with engines other than faiss.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

import faiss
import numpy as np
import pyarrow as pa
import torch
from threadpoolctl import threadpool_info

from lookalike.plots import create_figure, to_png
from lookalike.retrieval.index_types import EF_CONSTRUCTION, HNSW_M, ShortlistOptions
from lookalike.retrieval.machine import machine_facts
from lookalike.retrieval.metrics import per_query_overlap
from lookalike.retrieval.plan import Plan
from lookalike.retrieval.ranking import Floats, Rows
from lookalike.retrieval.shard_meta import SHARD_META, ShardMeta
from lookalike.retrieval.shard_searcher import ShardSearcher
from lookalike.retrieval.shortlist import build_shortlist, shortlist_name
from lookalike.retrieval.store import PrefixStore
from lookalike.retrieval.store_writer import write_store
from lookalike.retrieval.vectors import normalise
from tests.synthetic import make_vectors

K = 10
FUNNEL = ((512, 25),)
OURS: dict[tuple[str, str], tuple[dict[str, Any], ...]] = {
    ("graph", "float16"): (
        {"shortlist_dim": 64, "shortlist_k": 60},
        {"shortlist_dim": 64, "shortlist_k": 100},
        {"shortlist_dim": 64, "shortlist_k": 100, "stages": FUNNEL},
        {"shortlist_dim": 128, "shortlist_k": 30},
        {"shortlist_dim": 128, "shortlist_k": 40, "stages": FUNNEL},
        {"shortlist_dim": 128, "shortlist_k": 50},
        {"shortlist_dim": 128, "shortlist_k": 50, "stages": FUNNEL},
        {"shortlist_dim": 128, "shortlist_k": 60, "stages": FUNNEL},
        {"shortlist_dim": 128, "shortlist_k": 70, "stages": FUNNEL},
        {"shortlist_dim": 128, "shortlist_k": 100, "stages": FUNNEL},
    ),
    ("graph", "int8"): ({"shortlist_dim": 128, "shortlist_k": 50}, {"shortlist_dim": 128, "shortlist_k": 100}),
    ("ivf-rabitq", "float16"): tuple(
        {"shortlist_dim": 256, "shortlist_k": k, "nprobe": nprobe}
        for k, nprobe in ((30, 4), (50, 4), (50, 8), (100, 8), (100, 16))
    ),
}
"""(type, dtype of the blocks) -> plans; plans with dims that the vectors do not have are skipped."""
EFS = (16, 24, 32, 48, 64, 96, 128)
Search = Callable[[Floats], Rows]


class Case(NamedTuple):
    """One case of the comparison."""

    name: str
    search: Search
    facts: dict[str, Any]


def open_ours(folder: str, data: Floats, **layout: Any) -> tuple[ShardSearcher, dict[int, float]]:
    """A shard in ``folder`` with a ``layout`` as in ``ShardMeta``, and the build time of each shortlist in seconds."""
    meta = ShardMeta(num_rows=len(data), row_offset=0, **layout)
    rows = np.arange(len(data))
    parts = np.array_split(rows, max(1, len(data) // 20_000))
    ids = pa.table({"image_id": [f"{row:012d}" for row in rows]})
    os.makedirs(folder)
    meta = write_store(folder, meta, ids, ((part, data[part]) for part in parts))
    seconds = {}
    for dim in meta.shortlist_dims:
        start = time.perf_counter()
        built = build_shortlist(meta.shortlist, PrefixStore(folder, meta).unit_prefix(dim), ShortlistOptions())
        built.save(f"{folder}/{shortlist_name(dim, meta.shortlist)}")
        seconds[dim] = time.perf_counter() - start
    with open(f"{folder}/{SHARD_META}", "w") as file:
        file.write(meta.model_dump_json())
    return ShardSearcher.open(folder), seconds


def list_ours(folder: str, data: Floats, dims: tuple[int, ...]) -> Iterator[Case]:
    """Our cases; up to 512 dimensions also a graph over all of them, in one stage."""
    for (kind, dtype), plans in OURS.items():
        fitting = [
            Plan(**plan, rerank_dim=dims[-1])
            for plan in plans
            if max(plan["shortlist_dim"], *(d for d, _ in plan.get("stages", ())), 0) < dims[-1]
        ]
        if kind == "graph" and dtype == "float16" and dims[-1] <= 512:
            fitting += [Plan(shortlist_dim=dims[-1], shortlist_k=k, rerank_dim=dims[-1]) for k in (10, 16, 24, 40, 64)]
        if not fitting:
            continue
        wanted = tuple(sorted({plan.shortlist_dim for plan in fitting}))
        shard, seconds = open_ours(
            f"{folder}/{kind}-{dtype}", data, dims=dims, dtype=dtype, shortlist=kind, shortlist_dims=wanted
        )
        disk = sum(entry.stat().st_size for entry in os.scandir(shard.store.folder)) / 1e6

        def search(plan: Plan, shard: ShardSearcher = shard) -> Search:
            return lambda queries: shard.search(queries, K, plan).rows

        if kind == "graph":
            exact = Plan.exact(dims[-1])
            facts = {"held_mb": 0.0, "build_s": 0.0, "disk_mb": round(disk, 1)}
            yield Case(f"ours exact {dtype}", search(exact), facts)
        for plan in fitting:
            size = os.path.getsize(f"{shard.store.folder}/{shortlist_name(plan.shortlist_dim, kind)}")
            yield Case(
                f"ours {kind} {dtype}: {plan.describe()}",
                search(plan),
                {
                    "build_s": round(seconds[plan.shortlist_dim], 1),
                    "held_mb": round(size / 1e6, 1),
                    "bytes_a_row": round(size / len(data), 1),
                    "disk_mb": round(disk, 1),
                },
            )


def list_exact(unit: Floats) -> Iterator[Case]:
    """Exact products of ``unit`` vectors with a batch of queries, by every library that is installed."""
    facts = {"build_s": 0.0, "held_mb": round(unit.nbytes / 1e6, 1)}
    flat = faiss.IndexFlatIP(unit.shape[1])
    flat.add(unit)
    yield Case("faiss exact", lambda q: flat.search(normalise(q), K)[1], facts)

    def by_numpy(queries: Floats) -> Rows:
        scores = -(normalise(queries) @ unit.T)
        rows = np.argpartition(scores, K, axis=1)[:, :K]
        order = np.argsort(np.take_along_axis(scores, rows, axis=1), axis=1)
        return np.take_along_axis(rows, order, axis=1)

    yield Case("numpy exact", by_numpy, facts)
    torch.set_num_threads(1)
    stored = torch.from_numpy(unit)

    def by_torch(queries: Floats) -> Rows:
        return np.asarray(torch.topk(torch.from_numpy(normalise(queries)) @ stored.T, K)[1])

    yield Case("torch exact", by_torch, facts)


def kernels() -> dict[str, str]:
    """Library -> the kernel of its BLAS, or the SIMD level of its own code."""
    module: Any = faiss  # its stubs lack the class
    found = {"faiss": module.SIMDConfig.get_level_name(), "torch": torch.backends.cpu.get_cpu_capability()}
    for pool in threadpool_info():
        if pool["user_api"] == "blas":
            found[f"BLAS of {Path(pool['filepath']).parent.name}"] = f"{pool['version']} {pool.get('architecture')}"
    return found


def list_faiss(data: Floats) -> Iterator[Case]:
    """HNSW over the full vector, and IndexRefine over HNSW of a prefix."""
    module: Any = faiss  # its stubs do not know all keywords
    (num, dim), unit, prefix = data.shape, normalise(data), 64
    start = time.perf_counter()
    full = faiss.IndexHNSWFlat(dim, HNSW_M, faiss.METRIC_INNER_PRODUCT)
    full.hnsw.efConstruction = EF_CONSTRUCTION
    full.add(unit)
    facts = {"build_s": round(time.perf_counter() - start, 1), "held_mb": round(num * 4 * (dim + 2 * HNSW_M) / 1e6, 1)}
    for ef in EFS:
        settings = module.SearchParametersHNSW(efSearch=ef)
        yield Case(f"faiss HNSW full ef{ef}", lambda q, s=settings: full.search(normalise(q), K, params=s)[1], facts)
    start = time.perf_counter()
    graph = faiss.IndexHNSWFlat(prefix, HNSW_M, faiss.METRIC_INNER_PRODUCT)
    graph.hnsw.efConstruction = EF_CONSTRUCTION
    cut = faiss.IndexPreTransform(faiss.NormalizationTransform(prefix, 2.0), graph)
    base = faiss.IndexPreTransform(module.RemapDimensionsTransform(dim, prefix, False), cut)
    refine = faiss.IndexRefine(base, faiss.IndexFlatIP(dim))
    refine.add(unit)
    inner = module.SearchParametersPreTransform(index_params=module.SearchParametersHNSW(efSearch=100))
    outer = module.SearchParametersPreTransform(index_params=inner)
    refining = module.IndexRefineSearchParameters(k_factor=100 / K, base_index_params=outer)
    held = round(num * 4 * (prefix + 2 * HNSW_M) / 1e6, 1)
    facts = {"build_s": round(time.perf_counter() - start, 1), "held_mb": held}
    yield Case("faiss IndexRefine p64 K100", lambda q: refine.search(normalise(q), K, params=refining)[1], facts)


def measure(cases: Sequence[Case], queries: Floats, repeats: int) -> list[dict[str, float]]:
    """Times of all cases, which take turns in each repeat."""
    single: list[list[float]] = [[] for _ in cases]
    batch: list[list[tuple[float, float]]] = [[] for _ in cases]
    for repeat in range(repeats):
        for number, case in enumerate(cases):
            if "exact" in case.name and repeat > 1:
                continue
            start, began = time.process_time(), time.perf_counter()
            case.search(queries)
            batch[number].append((time.process_time() - start, time.perf_counter() - began))
            for query in queries[: 40 if "exact" in case.name else 200]:
                began = time.perf_counter()
                case.search(query[None])
                single[number].append(time.perf_counter() - began)
    return [
        {
            "p50_us": round(float(np.median(one)) * 1e6, 1),
            "p99_us": round(float(np.quantile(one, 0.99)) * 1e6, 1),
            "cpu_us": round(min(cpu for cpu, _ in many) / len(queries) * 1e6, 1),
            "qps_batch": round(len(queries) / min(wall for _, wall in many), 1),
            "qps_single": round(1 / float(np.median(one)), 1),
        }
        for one, many in zip(single, batch, strict=True)
    ]


def main() -> int:
    """Run all cases and print one line each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="20,000 vectors of 256-d instead of 200,000 of 2048-d")
    parser.add_argument("--num", type=int)
    parser.add_argument("--dim", type=int)
    parser.add_argument("--seed", type=int, default=17)
    parser.add_argument("--plot", help="PNG of recall against queries a second")
    options = parser.parse_args()
    num = options.num or (20_000 if options.quick else 200_000)
    dim = options.dim or (256 if options.quick else 2048)
    num_queries = 200 if options.quick else 500
    vectors, classes = make_vectors(num + num_queries, dim, seed=options.seed)
    data, queries = vectors[:num], vectors[num:]
    dims = (*(d for d in (8, 16, 32, 64, 128, 256, 512, 1024) if d < dim), dim)
    facts = {
        "bench": "retrieval",
        "num": num,
        "dim": dim,
        "queries": num_queries,
        "seed": options.seed,
        "threads": 1,
        "machine": machine_facts() | {"kernels": kernels()},
    }
    exact = list(list_exact(normalise(data)))
    truth = exact[0].search(queries)
    with tempfile.TemporaryDirectory(prefix="lookalike-bench-") as folder:
        cases = [*exact, *list_ours(folder, data, dims), *list_faiss(data)]
        times = measure(cases, queries, 3)
        rows = []
        for case, figures in zip(cases, times, strict=True):
            found = case.search(queries)
            good = (classes[found] == classes[num:, None]).mean()
            recall = float(per_query_overlap(found, truth).mean())
            rows.append(
                {
                    "case": case.name,
                    "recall_at_10": round(recall, 4),
                    "p_at_10": round(float(good), 4),
                    **figures,
                    **case.facts,
                }
            )
            print(json.dumps(facts | rows[-1]), flush=True)
    print(json.dumps(facts | {"summary": True, **summarise({row["case"]: row for row in rows})}))
    if options.plot:
        plot(rows, options.plot)
    return 0


def summarise(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Ratios of processor time (batch) and of the median of single queries, with the cases compared: the cheapest of
    each side at recall@10 >= .99, the fastest exact product of faiss, numpy and torch, and ours with at most 60 bytes
    per row at >= .95."""
    ours, full = (_cheapest(rows, start, 0.99) for start in ("ours", "faiss HNSW full"))
    small = _cheapest({name: row for name, row in rows.items() if row.get("bytes_a_row", 61) <= 60}, "ours", 0.95)
    exact = "ours exact float16"
    products = [name for name in rows if name.endswith(" exact")]
    batch, single = (min(products, key=lambda name: rows[name][figure]) for figure in ("cpu_us", "p50_us"))

    def ratio(one: str | None, other: str | None, figure: str) -> float | None:
        return round(rows[one][figure] / rows[other][figure], 2) if one in rows and other in rows else None

    refine, same = "faiss IndexRefine p64 K100", "ours graph float16: index at 64-d, 100 rows"
    same = next((name for name in rows if name.startswith(same) and "512" not in name), same)
    return {
        "best": ours,
        "hnsw_full": full,
        "exact": exact,
        "exact_product": batch,
        "exact_product_single": single,
        "small": small,
        "ratios": {
            "qps_vs_exact": ratio(batch, ours, "cpu_us"),
            "qps_vs_hnsw_full": ratio(full, ours, "cpu_us"),
            "single_vs_hnsw_full": ratio(full, ours, "p50_us"),
            "single_vs_exact": ratio(single, ours, "p50_us"),
            "ram_ratio": ratio(batch, ours, "held_mb"),
            "p64_vs_index_refine": ratio(refine, same, "cpu_us"),
            "exact_query_vs_product": ratio(single, exact, "p50_us"),
        },
    }


def _cheapest(rows: dict[str, dict[str, Any]], start: str, recall: float) -> str | None:
    good = [
        name
        for name, row in rows.items()
        if name.startswith(start) and "exact" not in name and row["recall_at_10"] >= recall
    ]
    return min(good, key=lambda name: rows[name]["cpu_us"], default=None)


def plot(rows: Sequence[dict[str, Any]], path: str) -> None:
    """Recall against queries per second of a batch on one thread, one line per family."""
    figure = create_figure(8, 5)
    axes = figure.subplots()
    families: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        name = row["case"].split(":")[0].split(" ef")[0]
        if "index at" in row["case"]:
            name += f", {row['case'].split('index at ')[1].split(',')[0]}"
        families.setdefault(name, []).append(row)
    for name, members in families.items():
        members.sort(key=lambda row: row["recall_at_10"])
        recalls, rates = [row["recall_at_10"] for row in members], [1e6 / row["cpu_us"] for row in members]
        axes.plot(recalls, rates, "o-", ms=4, label=name)
    axes.axvline(0.99, color="0.6", lw=0.8, ls=":")
    axes.set(xlim=(0.9, 1.003), yscale="log", xlabel="recall@10 against exact", ylabel="queries a second, one thread")
    axes.legend(fontsize=7)
    Path(path).write_bytes(to_png(figure))


if __name__ == "__main__":
    sys.exit(main())
