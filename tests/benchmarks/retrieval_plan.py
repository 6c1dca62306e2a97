"""The planner against a dense grid search, its cost model against the clock, a query against the memory's bandwidth.

    python -m tests.benchmarks.retrieval_plan [--quick] [--num N] [--dim D] [--shard FOLDER] [--plot FILE]
    python -m tests.benchmarks.retrieval_plan --fit [--kind KIND] [--without-library]

One JSON object per line; the last has the ratios. Half of the queries are the planner's sample; the other half judges
its plan and every plan of the grid. The best of the grid is chosen on the judging half too, which flatters the grid.
Choices by the lower end of the recall's interval are compared with the grid's best by the same, likewise by the mean.
``cpu_us`` is processor time per query, queries sent one by one, fastest repeat. ``--shard`` takes a shard
folder with queries.npy (raw) in it instead of making one. ``--fit`` prints the prices that ``retrieval/costs.py``
holds, from the times of a grid of plans on the index at hand.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from scipy import optimize, stats

from lookalike.intervals import mean_interval
from lookalike.retrieval import costs, native, planner
from lookalike.retrieval.candidates import calibrate_margins, list_funnels, list_plans
from lookalike.retrieval.choice import DecideBy, MeasuredPlan, RankBy, cost_of, pareto_front, rank_good
from lookalike.retrieval.costs import Counts
from lookalike.retrieval.graph import Graph
from lookalike.retrieval.index_meta import EncoderRef, IndexMeta
from lookalike.retrieval.index_types import ShortlistOptions, effort_of
from lookalike.retrieval.machine import machine_facts
from lookalike.retrieval.plan import Plan
from lookalike.retrieval.planner import PlanSample
from lookalike.retrieval.ranking import Floats
from lookalike.retrieval.searcher import Searcher
from lookalike.retrieval.shard_meta import SHARD_META, ShardMeta
from lookalike.retrieval.shard_searcher import ShardSearcher
from lookalike.retrieval.shortlist import build_shortlist, shortlist_name
from lookalike.retrieval.store import PrefixStore
from lookalike.retrieval.store_writer import write_store
from lookalike.serve.index.plan_plot import plot
from lookalike.serve.index.plan_stage import PlanConfig
from tests.synthetic import make_vectors

K, TARGETS = 10, (0.99, 0.95)
RANKINGS: tuple[RankBy, ...] = ("model", "measured")
DECISIONS: tuple[DecideBy, ...] = ("lower", "mean")
GRID_KS = (15, 20, 25, 30, 35, 40, 45, 50, 60, 70, 85, 100, 140)
GRID_KEEPS, GRID_SHARES = (20, 25, 35), (4, 8)
"""Rows that the one stage of a grid plan keeps, and the parts of the vector at which it stands."""
GRID_QUANTILES = (0.999, 0.995)
FINALISTS = 12
OWN_PRICES = ("rows", "row_numbers", "beam", "centroids", "lists")
"""Prices of an index type; the others are common to all."""
COPY_BYTES, ROW_BYTES = 256 << 20, 256


def recalls_of(sample: PlanSample, plan: Plan) -> dict[DecideBy, float]:
    """Recall@10 of a plan: its mean, and the lower end of its interval."""
    recall = planner.per_query_recall(sample.searcher.search(sample.queries, K, plan), sample.exact, same_dim=True)
    return {"mean": float(recall.mean()), "lower": mean_interval(recall)[0]}


def make_shard(folder: str, kind: str, data: Floats) -> None:
    """A shard of float16 vectors with shortlists over two prefixes, and over the full dim of short vectors."""
    dim = data.shape[1]
    dims = (*(d for d in (8, 16, 32, 64, 128, 256, 512, 1024) if d < dim), dim)
    over = (*(d for d in (64, 128) if d < dim), *([dim] if dim <= 512 else []))
    meta = ShardMeta(num_rows=len(data), row_offset=0, dims=dims, dtype="float16", shortlist=kind, shortlist_dims=over)
    ids = pa.table({"image_id": [f"{row:012d}" for row in range(len(data))]})
    parts = np.array_split(np.arange(len(data)), max(1, len(data) // 20_000))
    meta = write_store(folder, meta, ids, ((part, data[part]) for part in parts))
    for prefix in over:
        built = build_shortlist(kind, PrefixStore(folder, meta).unit_prefix(prefix), ShortlistOptions())
        built.save(f"{folder}/{shortlist_name(prefix, kind)}")
    with open(f"{folder}/{SHARD_META}", "w") as file:
        file.write(meta.model_dump_json())


def open_index(folder: str) -> Searcher:
    """An index of the one shard in ``folder``."""
    shard = ShardSearcher.open(folder)
    meta = IndexMeta(
        dims=shard.meta.dims,
        num_rows=shard.meta.num_rows,
        shards=("shard",),
        shard_rows=(shard.meta.num_rows,),
        dtype=shard.meta.dtype,
        shortlist=shard.meta.shortlist,
        shortlist_dims=shard.meta.shortlist_dims,
        columns=("image_id",),
        encoder=EncoderRef(fingerprint="benchmark"),
    )
    return Searcher(meta, [shard])


def cpu_us(searcher: Searcher, queries: Floats, plans: Sequence[Plan], repeats: int) -> npt.NDArray[np.float64]:
    """Processor time per query of each plan, in microseconds; plans take turns in every repeat."""
    seconds = np.empty((repeats, len(plans)))
    for turn in range(repeats):
        for number, plan in enumerate(plans):
            start = time.process_time()
            for query in queries:
                searcher.search(query[None], K, plan)
            seconds[turn, number] = time.process_time() - start
    return np.asarray(seconds.min(axis=0) / len(queries) * 1e6)


def list_grid(sample: PlanSample) -> Iterator[Plan]:
    """Shortlist dim x K x effort x funnels (also of other sizes and dims than the planner's) x margins."""
    meta, effort = sample.searcher.meta, effort_of(sample.searcher.meta.shortlist)
    for dim in meta.shortlist_dims:
        for size in GRID_KS:
            funnels = {*list_funnels(meta.dims, dim, size, K)}
            funnels |= {
                ((at, keep),)
                for at in meta.dims
                if dim < at and meta.dim // at in GRID_SHARES
                for keep in GRID_KEEPS
                if keep < size
            }
            beams: tuple[int | None, ...] = (None,)
            if effort == "ef_search":
                beams = (None, size * 3 // 2)
            elif effort == "nprobe":
                beams = (2, 4, 8, 16, 32, 64)
            for stages in sorted(funnels) if dim < meta.dim else [()]:
                for beam in beams:
                    plan = Plan(
                        shortlist_dim=dim,
                        shortlist_k=size,
                        stages=stages,
                        rerank_dim=meta.dim,
                        **({effort: beam} if effort else {}),
                    )
                    yield plan
                    if beam == beams[0] and dim < meta.dim:
                        yield from calibrate_margins(
                            sample.searcher,
                            sample.queries[:100],
                            sample.exact.rows[:100],
                            K,
                            plan,
                            quantiles=GRID_QUANTILES,
                        )


def search_grid(sample: PlanSample, judge: PlanSample) -> list[dict[str, Any]]:
    """Recall on the judge's queries and a first processor time of each grid plan that comes near a target."""
    plans = list(list_grid(sample))
    recalls = [recalls_of(judge, plan) for plan in plans]
    chosen = [n for n, recall in enumerate(recalls) if recall["mean"] >= min(TARGETS)]
    times = cpu_us(judge.searcher, judge.queries[:100], [plans[n] for n in chosen], 2)
    return [{"plan": plans[n], "recall": recalls[n], "cpu_us": float(us)} for n, us in zip(chosen, times, strict=True)]


def run_planner(sample: PlanSample, target: float) -> list[MeasuredPlan]:
    """The plan stage's measurements with its defaults, for both ways to decide."""
    config = PlanConfig(target=target)
    plans = list_plans(
        sample.searcher.meta,
        k=K,
        shortlist_ks=config.shortlist_ks,
        efs=config.ef_search,
        nprobes=config.nprobe,
        scan_dims=config.scan_dims,
    )
    measured = planner.measure(sample, plans)
    for decide_by in DECISIONS:
        for measure_more in (planner.measure_between, planner.measure_early_exit):
            measured += measure_more(sample, measured, target, decide_by)
    return planner.time_plans(
        sample.searcher, sample.queries[: config.time_queries], K, measured, repeats=config.time_repeats
    )


def compare(
    grid: list[dict[str, Any]], measured: list[MeasuredPlan], judge: PlanSample, target: float
) -> Iterator[dict[str, Any]]:
    """The grid's best and the planner's choices at one target, timed again side by side."""
    cheapest = sorted(grid, key=lambda row: row["cpu_us"])
    plans: list[tuple[DecideBy, str, Plan]] = []
    for decide_by in DECISIONS:
        reached = [row["plan"] for row in cheapest if row["recall"][decide_by] >= target][:FINALISTS]
        plans += [(decide_by, "grid", plan) for plan in reached]
        for rank_by in RANKINGS:
            ranked = rank_good(measured, target, decide_by=decide_by, rank_by=rank_by, exact=True)
            plans.append((decide_by, rank_by, measured[ranked[0]].plan))
    times = cpu_us(judge.searcher, judge.queries, [plan for *_, plan in plans], 7)
    for decide_by in DECISIONS:
        finalists = [n for n, (by, name, _) in enumerate(plans) if (by, name) == (decide_by, "grid")]
        best = min(finalists, key=lambda n: times[n])
        for number in [best, *(n for n, (by, name, _) in enumerate(plans) if by == decide_by and name != "grid")]:
            _, name, plan = plans[number]
            recall = {f"recall_at_10_{by}": round(value, 4) for by, value in recalls_of(judge, plan).items()}
            yield {
                "case": f"{'grid best' if number == best else name} by {decide_by} at {target}",
                "target": target,
                "plan": plan.describe(),
                **recall,
                "cpu_us": round(float(times[number]), 1),
                "vs_grid": round(float(times[number] / times[best]), 3),
                **bytes_of(judge, plan),
            }


def rank_quality(measured: list[MeasuredPlan], judge: PlanSample, target: float) -> dict[str, Any]:
    """How well modelled and measured times rank the candidates: Spearman, and the regret of choosing by them."""
    some = [row for row in measured if not row.plan.is_exact]
    times = cpu_us(judge.searcher, judge.queries[:100], [row.plan for row in some], 3)
    good = [n for n, row in enumerate(some) if row.recall >= target]
    fastest = times[good].min() if good else 1.0
    facts: dict[str, Any] = {"case": f"ranking of candidates at {target}", "candidates": len(some), "good": len(good)}
    for rank_by in RANKINGS:
        by = [cost_of(row, rank_by) for row in some]
        facts[f"{rank_by}_spearman"] = round(float(stats.spearmanr(by, times).statistic), 3)
        facts[f"{rank_by}_regret"] = round(float(times[min(good, key=lambda n: by[n])] / fastest), 3) if good else None
    off = float(np.median([row.model_us / us for row, us in zip(some, times, strict=True)]))
    return facts | {"model_us_vs_cpu": round(off, 3)}


def bandwidth() -> dict[str, float]:
    """Gigabytes per second of this machine on one thread: read in order, and in rows of 256 bytes at random places."""
    memory = np.ones(COPY_BYTES // 4, np.float32).reshape(-1, ROW_BYTES // 4)
    places = np.random.default_rng(0).integers(0, len(memory), 1 << 16)
    out = np.empty((len(places), memory.shape[1]), np.float32)
    best = {"in_order_gb_s": 0.0, "random_gb_s": 0.0}
    for _ in range(5):
        start = time.process_time()
        memory.sum()
        best["in_order_gb_s"] = max(best["in_order_gb_s"], COPY_BYTES / (time.process_time() - start) / 1e9)
        start = time.process_time()
        np.take(memory, places, axis=0, out=out, mode="clip")
        best["random_gb_s"] = max(best["random_gb_s"], out.nbytes / (time.process_time() - start) / 1e9)
    return {name: round(value, 2) for name, value in best.items()}


def bytes_of(judge: PlanSample, plan: Plan) -> dict[str, float]:
    """Bytes that a query must read (codes and scales, links of the beam, blocks and norms gathered), and the processor
    time per query of one batch, which involves no Python; empty for shortlists other than the int8 graph."""
    searcher = judge.searcher
    index = None if plan.scan else searcher.shards[0].index_over(plan.shortlist_dim)
    if not isinstance(index, Graph):
        return {}
    _, counts, _ = planner.run_plan(judge, plan)
    walked = counts.rows * (plan.shortlist_dim + 4) + counts.beam * index.links.shape[1] * 4
    gathered = counts.numbers * np.dtype(searcher.meta.dtype).itemsize + counts.places * 4
    best = np.inf
    for _ in range(5):
        start = time.process_time()
        searcher.search(judge.queries, K, plan)
        best = min(best, time.process_time() - start)
    return {
        "walk_bytes": round(walked),
        "gather_bytes": round(gathered),
        "batch_cpu_us": round(best / len(judge.queries) * 1e6, 1),
    }


def floor_of(row: dict[str, Any], speed: dict[str, float]) -> dict[str, Any]:
    """Time to read the bytes at both speeds, and the time of a query in a batch over it."""
    if "walk_bytes" not in row:
        return {}
    total = row["walk_bytes"] + row["gather_bytes"]
    floors = {name: total / speed[f"{name}_gb_s"] / 1e3 for name in ("in_order", "random")}
    return {f"floor_{name}_us": round(us, 1) for name, us in floors.items()} | {
        f"bytes_vs_floor_{name}": round(row["batch_cpu_us"] / us, 2) for name, us in floors.items()
    }


def fit(judge: PlanSample) -> dict[str, Any]:
    """Prices from the times of a grid of plans: non-negative least squares on relative errors.

    Those of an index type from its plans; the common ones too when it is the graph, or there is no library, else they
    stay as they are.
    """
    meta = judge.searcher.meta
    plans = list_plans(
        meta, k=K, shortlist_ks=(10, 20, 50, 100, 200, 400), efs=(None, 64, 128, 256), nprobes=(2, 4, 8, 16, 32, 64)
    )
    some = [plan for plan in plans if plan.shortlist_k in {50, 200}]
    for plan in some:
        plans += calibrate_margins(judge.searcher, judge.queries, judge.exact.rows, K, plan, quantiles=(0.99,))
    plans += [
        Plan(shortlist_dim=dim, shortlist_k=size, rerank_dim=meta.dim, scan=True)
        for dim in meta.dims[2:-1]
        for size in (20, 100)
    ]
    counted = [planner.run_plan(judge, plan)[1:] for plan in plans]
    times = cpu_us(judge.searcher, judge.queries, plans, 3) * 1e3
    fitted: dict[str, dict[str, float]] = {}
    facts, common = {}, np.array(costs.prices_of(meta.shortlist))
    for kind in dict.fromkeys((meta.shortlist, "flat")):
        chosen = [n for n, (_, its) in enumerate(counted) if its == kind]
        table, wanted = np.array([counted[n][0] for n in chosen]), times[chosen]
        free = np.ones(len(Counts._fields), bool)
        fits_all = kind == meta.shortlist and (kind == "graph" or not native.AVAILABLE)
        if not fits_all:
            free = np.isin(Counts._fields, OWN_PRICES)
            wanted = wanted - table[:, ~free] @ common[~free]
        weights = 1 / times[chosen]
        prices, _ = optimize.nnls(table[:, free] * weights[:, None], wanted * weights)
        if fits_all:
            common = prices
        fitted[kind] = {
            name: float(f"{price:.3g}")
            for name, price in zip(np.array(Counts._fields)[free], prices, strict=True)
            if price
        }
        error = np.abs(table[:, free] @ prices - wanted) * weights
        facts[kind] = {
            "plans": len(chosen),
            "median_error": round(float(np.median(error)), 3),
            "largest_error": round(float(error.max()), 3),
        }
    return {"case": f"prices {meta.shortlist}", "library": native.AVAILABLE, "prices_ns": fitted, "errors": facts}


def draw(measured: list[MeasuredPlan], path: str, num_queries: int) -> None:
    """The plot of the plan stage."""
    ranked = rank_good(measured, TARGETS[0], decide_by="lower", rank_by="model", exact=True)
    front = pareto_front(measured, "model")
    with open(path, "wb") as file:
        file.write(plot(measured, front, ranked[0], target=TARGETS[0], k=K, rank_by="model", num_queries=num_queries))


def measure_all(sample: PlanSample, judge: PlanSample, plot_to: str | None) -> Iterator[dict[str, Any]]:
    """All rows but the summary."""
    speed = bandwidth()
    yield {"case": "memory", **speed}
    grid = search_grid(sample, judge)
    yield {"case": "grid", "plans_timed": len(grid)}
    for target in TARGETS:
        measured = run_planner(sample, target)
        if plot_to and target == TARGETS[0]:
            draw(measured, plot_to, len(sample.queries))
        yield rank_quality(measured, judge, target)
        for row in compare(grid, measured, judge, target):
            yield row | floor_of(row, speed)


def summarise(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The planner's choices against the grid's best, the model's ranking, and the floor."""
    ratios: dict[str, Any] = {}
    for name, row in rows.items():
        if "vs_grid" in row:
            ratios[f"plan_vs_grid {name}"] = row["vs_grid"]
        if name.startswith("grid best") and "bytes_vs_floor_random" in row:
            ratios[f"bytes_vs_floor {name}"] = {key: row[f"bytes_vs_floor_{key}"] for key in ("in_order", "random")}
        if "model_spearman" in row:
            ratios[name] = {key: row[key] for key in row if key.endswith(("spearman", "regret"))}
    return {"ratios": ratios}


def main() -> int:
    """Run all cases and print one line each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="20,000 vectors of 256-d instead of 50,000 of 768-d")
    parser.add_argument("--num", type=int)
    parser.add_argument("--dim", type=int)
    parser.add_argument("--seed", type=int, default=17)
    parser.add_argument("--kind", default="graph", help="type of the shortlists")
    parser.add_argument("--shard", help="a shard folder with queries.npy in it")
    parser.add_argument("--fit", action="store_true", help="print prices for the model")
    parser.add_argument("--plot", help="where to write plan.png")
    parser.add_argument("--without-library", action="store_true", help="as where there is no C compiler")
    arguments = parser.parse_args()
    if arguments.without_library:
        native.AVAILABLE = False
    num = arguments.num or (20_000 if arguments.quick else 50_000)
    dim = arguments.dim or (256 if arguments.quick else 768)
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="lookalike-bench-") as folder:
        if arguments.shard:
            searcher = open_index(arguments.shard)
            queries = np.load(f"{arguments.shard}/queries.npy").astype(np.float32)
        else:
            vectors, _ = make_vectors(num + 2000, dim, seed=arguments.seed)
            make_shard(folder, arguments.kind, vectors[:num])
            searcher, queries = open_index(folder), vectors[num:].copy()
        facts = {
            "bench": "retrieval_plan",
            "num": searcher.meta.num_rows,
            "dim": searcher.meta.dim,
            "kind": searcher.meta.shortlist,
            "queries": len(queries),
            "threads": 1,
            "machine": machine_facts(),
        }
        nobody = np.full(len(queries), -1)
        halves = [
            planner.take_sample(searcher, queries[half], K, own_rows=nobody[half])
            for half in (slice(0, None, 2), slice(1, None, 2))
        ]
        if arguments.fit:
            few = planner.take_sample(searcher, halves[0].queries[:60], K, own_rows=nobody[:60])
            print(json.dumps(facts | fit(few)))
            return 0
        for row in measure_all(halves[0], halves[1], arguments.plot):
            rows[row["case"]] = row
            print(json.dumps(facts | row), flush=True)
    print(json.dumps(facts | {"summary": True, **summarise(rows)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
