"""Plan stage: index + sample queries -> the cheapest plan that keeps the recall asked for.

How plans are measured, ranked and chosen is in ``lookalike.retrieval.planner``. The choice (with ``rank_by: model``)
and all figures but the times are the same whenever it is run on the same inputs. ``plan.json`` holds the plan, every
candidate, the Pareto front and the check of mAP; ``plan.png`` shows recall over cost.
"""

import io
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from lookalike import storage
from lookalike.artifacts import Artifact
from lookalike.config import runtime
from lookalike.errors import UsageError
from lookalike.retrieval import metrics, planner
from lookalike.retrieval.machine import machine_facts
from lookalike.retrieval.plan import Plan
from lookalike.retrieval.planner import Measured
from lookalike.retrieval.ranking import Floats, Rows
from lookalike.retrieval.searcher import Searcher
from lookalike.seeds import derive_seed, hash_unit
from lookalike.serve.rows import Source, read_source
from lookalike.stages import Input, Stage, StageConfig, StageRun
from lookalike.telemetry import fields, get_logger

log = get_logger(__name__)


class PlanConfig(StageConfig):
    """What the plan must reach, and among which candidates it is sought."""

    target: float = Field(default=0.99, gt=0, le=1)
    """Recall@k against the exact full-dim answer that the plan must reach."""
    decide_by: planner.DecideBy = "lower"
    """Compare the target with the lower end of the 95% interval of the recall, or with its mean."""
    rank_by: planner.RankBy = "model"
    """Call the plan with the least modelled work the cheapest (reproducible), or the one with the least time here."""
    k: int = Field(default=10, ge=1, le=10_000)
    """Results a query asks for."""
    num_queries: int = Field(default=400, ge=1, le=1_000_000)
    """Sample queries, chosen by the hash of their ids; all when there are fewer. As many again, where there are, take
    no part in the choice and tell what the plan is worth."""
    where: dict[str, list[str]] = Field(default_factory=dict)
    """Take queries only from rows whose column has one of the values, as in {"split": ["test"]}."""
    shortlist_ks: tuple[Annotated[int, Field(ge=1)], ...] = (10, 20, 50, 100, 200, 400)
    """Sizes K of the shortlist to try, in rows per shard."""
    ef_search: tuple[int | None, ...] = (None, 64, 128)
    """HNSW candidate lists to try; those not above K are the same as K, which None stands for."""
    nprobe: tuple[Annotated[int, Field(ge=1)], ...] = (4, 16, 64)
    """Lists of an IVF type to look into, to try."""
    scan_dims: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """Prefixes to try also as a scan without an index."""
    funnels: bool = True
    """Try each shortlist with a funnel too, which halves the rows at every nested dim."""
    allow_single_stage: bool = True
    """Let the exact scan, and an index over the full dim, compete with two-stage plans on cost."""
    label: Literal["group", "category"] | None = "group"
    """Column by which mAP@k of plan and exact search are compared; None leaves the comparison out."""
    max_map_loss: float = Field(default=0.1, ge=0, le=100)
    """Largest difference in mAP@k by ``label`` from exact search that a plan may have, in points (0.01)."""
    time_queries: int = runtime(16, ge=1, le=10_000)
    """Queries that are timed, of the sample."""
    time_repeats: int = runtime(3, ge=1, le=1000)
    """Rounds of timing; each runs every candidate, the median counts."""


def sample_queries(source: Source, num: int, seed: int) -> tuple[Floats, list[dict[str, Any]]]:
    """The ``num`` rows whose ids hash lowest: raw vectors [n, dim] and their metadata, sorted by hash."""
    best: list[tuple[float, int, int, dict[str, Any]]] = []
    for number, part in enumerate(source.parts):
        table, places = source.table(part)
        keys = np.array([hash_unit(seed, image_id) for image_id in table["image_id"].to_pylist()])
        lowest = np.argsort(keys, kind="stable")[:num]
        records = table.take(pa.array(lowest)).to_pylist()
        best += [(float(keys[n]), number, int(places[n]), record) for n, record in zip(lowest, records, strict=True)]
        best = sorted(best, key=lambda row: row[:3])[:num]
    vectors = np.empty((len(best), source.dim), np.float32)
    for number, part in enumerate(source.parts):
        mine = sorted((place, target) for target, (_, owner, place, _) in enumerate(best) if owner == number)
        if mine:
            places, targets = np.array(mine, dtype=np.int64).T
            for chosen, values in source.vectors(part, places, 16_384):
                vectors[targets[chosen]] = values
    return vectors, [record for *_, record in best]


def require_same_model(searcher: Searcher, queries: Artifact) -> None:
    """Raise ``UsageError`` unless queries and index come from the same model."""
    facts = queries.read_json("meta.json")
    theirs = facts["encoder"]["fingerprint"]
    if theirs != searcher.meta.model_fingerprint or int(facts["dim"]) != searcher.meta.dim:
        raise UsageError(f"queries {queries.uri} come from model {theirs} ({facts['dim']}-d), the index from "
                         f"{searcher.meta.model_fingerprint} ({searcher.meta.dim}-d); embed both with one")  # fmt: skip


def check_map(
    searcher: Searcher, queries: Floats, records: list[dict[str, Any]], plan: Plan, *, label: str, k: int
) -> dict[str, Any] | None:
    """mAP@k (divided by k) and P@1 by ``label``, of exact search and of the plan; None when no query has one."""
    known = [place for place, record in enumerate(records) if record.get(label)]
    if not known:
        log.warning("no mAP check %s", fields(label=label, reason="no sample query has one"))
        return None
    own_rows = searcher.find([records[place]["image_id"] for place in known])
    wanted = np.array([records[place][label] for place in known])
    figures: dict[str, Any] = {"label": label, "k": k, "num_queries": len(known)}
    for name, candidate in (("exact", Plan.exact(searcher.meta.dim)), ("plan", plan)):
        hits = planner.search_without(searcher, queries[known], k, candidate, own_rows)
        found = np.array([row.get(label, "") for row in searcher.metadata(hits.rows)]).reshape(hits.rows.shape)
        figures[f"{name}_map_at_{k}_by_k"] = metrics.map_at_k_by_k(found, wanted, k)
        figures[f"{name}_top1"] = metrics.top1(found, wanted)
    gap = figures[f"plan_map_at_{k}_by_k"] - figures[f"exact_map_at_{k}_by_k"]
    return figures | {"difference_points": 100 * gap}


def plot(measured: list[Measured], front: list[int], chosen: int, config: PlanConfig) -> bytes:
    """A PNG of recall over cost: all candidates, the Pareto front, the target and the choice."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    costs = [planner.cost_of(one, config.rank_by) for one in measured]
    dims = sorted({one.plan.shortlist_dim for one in measured})
    for dim in dims:
        places = [n for n, one in enumerate(measured) if one.plan.shortlist_dim == dim]
        axes.plot([costs[n] for n in places], [measured[n].recall for n in places], "o", ms=4, alpha=0.6,
                  label=f"shortlist at {dim}-d")  # fmt: skip
    axes.plot([costs[n] for n in front], [measured[n].recall for n in front], "-", color="0.4", lw=1, label="front")
    axes.plot(costs[chosen], measured[chosen].recall, "*", color="crimson", ms=15,
              label=f"chosen: {measured[chosen].plan.describe()}")  # fmt: skip
    axes.axhline(config.target, color="crimson", lw=0.8, ls=":")
    axes.set(xscale="log", xlabel=f"{config.rank_by} cost of a query [us]", ylabel=f"recall@{config.k} against exact")
    axes.legend(fontsize=7, loc="lower right")
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    return content.getvalue()


def measure_plans(searcher: Searcher, queries: Floats, own_rows: Rows, config: PlanConfig) -> list[Measured]:
    """All candidates of the configuration, measured and timed; the exact plan comes first."""
    plans = planner.list_plans(
        searcher.meta, k=config.k, shortlist_ks=config.shortlist_ks, efs=config.ef_search, nprobes=config.nprobe,
        scan_dims=config.scan_dims, funnels=config.funnels, single_stage=config.allow_single_stage,
    )  # fmt: skip
    seed = derive_seed(config.seed, "plan", "bootstrap")
    measured = planner.measure(searcher, queries, config.k, plans, own_rows=own_rows, seed=seed)
    return planner.time_plans(searcher, queries[: config.time_queries], config.k, measured, repeats=config.time_repeats)


def choose(
    searcher: Searcher, queries: Floats, records: list[dict[str, Any]], measured: list[Measured], config: PlanConfig
) -> tuple[int, dict[str, Any] | None]:
    """(place of the plan, its mAP check): the cheapest good candidate whose mAP is that of the exact answer."""
    good = planner.rank_good(measured, config.target, decide_by=config.decide_by, rank_by=config.rank_by,
                             exact=config.allow_single_stage)  # fmt: skip
    if good == [0] and not config.allow_single_stage:
        best = max(measured[1:], key=lambda one: one.recall_low, default=measured[0])
        log.warning("no two-stage plan %s", fields(
            target=config.target, decide_by=config.decide_by, best=best.plan.describe(), recall=best.recall,
            recall_low=best.recall_low, chosen="exact scan", remedy="lower target, or try scan_dims or larger "
            "shortlist_ks"))  # fmt: skip
    for place in good:
        if config.label is None:
            return place, None
        checked = check_map(searcher, queries, records, measured[place].plan, label=config.label, k=config.k)
        if checked is None or abs(checked["difference_points"]) <= config.max_map_loss:
            return place, checked
    raise AssertionError("the exact plan differs from itself")


def check_plan(
    searcher: Searcher, queries: Floats, records: list[dict[str, Any]], plan: Plan, config: PlanConfig
) -> dict[str, Any] | None:
    """Recall, its interval and the mAP check of ``plan`` on queries that did not choose it; None without any."""
    if not len(queries):
        log.warning("no holdout %s", fields(reason="every query took part in the choice; lower num_queries"))
        return None
    own_rows = searcher.find([record["image_id"] for record in records])
    seed = derive_seed(config.seed, "plan", "holdout")
    _, found = planner.measure(searcher, queries, config.k, [plan], own_rows=own_rows, seed=seed)
    checked = None
    if config.label is not None:
        checked = check_map(searcher, queries, records, plan, label=config.label, k=config.k)
    return {"num_queries": len(queries), "recall": found.recall, "recall_low": found.recall_low,
            "recall_high": found.recall_high, "map_check": checked}  # fmt: skip


def run(stage: StageRun[PlanConfig]) -> None:
    """Measure, choose, check, and write ``plan.json`` and ``plan.png``."""
    config, index = stage.config, stage.one("index")
    searcher = Searcher.open(index.uri, check=False)  # the runner has opened, and so checked, it
    require_same_model(searcher, stage.one("queries"))
    source = read_source(stage.one("queries"), config.where)
    sample, sampled = sample_queries(source, 2 * config.num_queries, derive_seed(config.seed, "plan", "queries"))
    queries, records = sample[: config.num_queries], sampled[: config.num_queries]
    if not len(queries):
        raise UsageError(f"where {config.where} keeps no query of {stage.one('queries').uri}; check its values")
    own_rows = searcher.find([record["image_id"] for record in records])
    measured = measure_plans(searcher, queries, own_rows, config)
    front = planner.pareto_front(measured, config.rank_by)
    place, checked = choose(searcher, queries, records, measured, config)
    chosen = measured[place]
    kept_out = check_plan(searcher, sample[len(queries) :], sampled[len(queries) :], chosen.plan, config)
    facts = {
        "plan": chosen.plan.model_dump(mode="json"), "description": chosen.plan.describe(),
        "index": {"uri": index.uri, "generation": searcher.meta.generation}, "target": config.target, "k": config.k,
        "num_queries": len(queries), "chosen": place, "front": front, "map_check": checked,
        "holdout": kept_out,
        "candidates": [one.model_dump(mode="json") | {"description": one.plan.describe()} for one in measured],
        "machine": machine_facts(), "ranked_by": config.rank_by, "decided_by": config.decide_by,
    }  # fmt: skip
    stage.out.write_json("plan.json", facts)
    storage.write_atomic(stage.out.path("plan.png"), plot(measured, front, place, config))
    stage.out.stats |= {"plan": chosen.plan.describe(), "recall": chosen.recall, "candidates": len(measured),
                        "queries": len(queries), "model_us": chosen.model_us, "exact_ratio": chosen.exact_ratio,
                        "map_difference_points": checked and checked["difference_points"]}  # fmt: skip
    log.info("plan %s", fields(plan=chosen.plan.describe(), recall=chosen.recall, us=chosen.query_us))


STAGE: Stage[PlanConfig] = Stage(
    name="plan", kind="plan", config=PlanConfig, run=run,
    inputs={"index": Input("index"), "queries": Input("embeddings")},
)  # fmt: skip
