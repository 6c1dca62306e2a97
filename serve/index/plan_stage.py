"""Plan stage: index + sample queries -> the cheapest plan with the target recall.

``lookalike.retrieval.planner`` measures plans, ``lookalike.retrieval.choice`` ranks them. With ``rank_by: model`` and
without ``max_p99_ms`` the same inputs always give the same choice and the same figures, except times. ``plan.json``
holds the plan, every candidate with its cost, its times and the limits that it breaks, the Pareto front, a comparison
of one stage with several, and the mAP check; ``plan.png`` shows recall over cost (``serve/index/plan_plot.py``).
"""

from collections.abc import Mapping
from math import ceil, log
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from lookalike import storage
from lookalike.artifacts import Artifact
from lookalike.config import runtime
from lookalike.errors import UsageError
from lookalike.intervals import LEVEL, mean_interval
from lookalike.outlook import Outlook, require_values
from lookalike.retrieval import choice, metrics, planner
from lookalike.retrieval.candidates import list_plans
from lookalike.retrieval.choice import MeasuredPlan, PlanLimits
from lookalike.retrieval.machine import machine_facts
from lookalike.retrieval.plan import Plan
from lookalike.retrieval.ranking import Floats, Rows
from lookalike.retrieval.relevance import judge_labels
from lookalike.retrieval.searcher import Searcher
from lookalike.seeds import derive_seed, hash_unit
from lookalike.serve.index.plan_plot import plot
from lookalike.serve.index.rows import COLUMNS, EmbeddingRows, read_source
from lookalike.stages import Input, Stage, StageConfig, StageRun
from lookalike.telemetry import fields, get_logger

logger = get_logger(__name__)


class PlanConfig(StageConfig):
    """What the plan must reach, and which candidates are tried."""

    target: float = Field(default=0.99, gt=0, le=1)
    """Lowest recall@k of the plan, compared with the exact full-dim answer."""
    max_p99_ms: float | None = Field(default=None, gt=0)
    """Longest 99th percentile of the query time, in milliseconds, for queries sent one by one to a searcher of all
    shards on this machine; None: no limit. A limit makes the choice rest on measured times, of at least 100 queries."""
    max_ram_mb: float | None = Field(default=None, gt=0)
    """Most memory of shortlist and norms that a query walks through, in MB (10^6 bytes): all shards together, without
    the memory-mapped vectors; None: no limit."""
    decide_by: choice.DecideBy = "lower"
    """Compare the target with the lower end of the recall's 95% interval, or with its mean."""
    rank_by: choice.RankBy = "model"
    """The cheapest plan is the one with the least modelled work (reproducible), or the one with the least time here."""
    k: int = Field(default=10, ge=1, le=10_000)
    """Results per query."""
    num_queries: int = Field(default=1000, ge=1, le=1_000_000)
    """Sample queries, chosen by the hash of their ids; all if there are fewer. The next as many do not take part in the
    choice and measure the chosen plan. Even if a plan finds everything, n queries show a recall of 1 - 3.7 / n."""
    where: dict[str, list[str]] = Field(default_factory=dict)
    """Take queries only from rows whose column has one of the values, as in {"split": ["test"]}."""
    shortlist_ks: tuple[Annotated[int, Field(ge=1)], ...] = (10, 20, 30, 50, 70, 100, 200, 400)
    """Shortlist sizes K to try, in rows per shard; a few more are tried below those of the cheapest good plans."""
    ef_search: tuple[int | None, ...] = (None, 64, 128)
    """HNSW candidate lists to try; None stands for K, as does any size not above K."""
    nprobe: tuple[Annotated[int, Field(ge=1)], ...] = (4, 16, 64)
    """Numbers of lists to probe, for an IVF type."""
    scan_dims: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """Prefixes to try also as a scan without an index."""
    funnels: bool = True
    """Also try each shortlist with funnels: one stage at a quarter of the vector, and half the rows at every nested
    dim."""
    early_exit: bool = True
    """Also try the cheapest good plans with margins: rows further below the k-th best are dropped, query by query."""
    allow_single_stage: bool = True
    """Let the exact scan, and an index over the full dim, compete with two-stage plans on cost."""
    label: Literal["group", "category"] | None = "group"
    """Column by which mAP@k of plan and exact search are compared; None skips the comparison."""
    max_map_loss: float = Field(default=0.1, ge=0, le=100)
    """Largest difference in mAP@k by ``label`` between the plan and exact search, in points (0.01)."""
    time_queries: int = runtime(16, ge=1, le=10_000)
    """Sample queries that are timed; at least 100 with ``max_p99_ms``."""
    time_repeats: int = runtime(3, ge=1, le=1000)
    """Rounds of timing, each over every candidate; the median counts."""


def sample_queries(source: EmbeddingRows, num: int, seed: int) -> tuple[Floats, list[dict[str, Any]]]:
    """Return the ``num`` rows whose ids hash lowest, sorted by hash: raw vectors [n, dim] and metadata."""
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
    model = facts["encoder"]["fingerprint"]
    if model != searcher.meta.model_fingerprint or int(facts["dim"]) != searcher.meta.dim:
        raise UsageError(
            f"queries {queries.uri} come from model {model} ({facts['dim']}-d), the index from "
            f"{searcher.meta.model_fingerprint} ({searcher.meta.dim}-d); embed both with one"
        )


def check_map(
    searcher: Searcher, queries: Floats, records: list[dict[str, Any]], plan: Plan, *, label: str, k: int
) -> dict[str, Any] | None:
    """Return mAP@k (divided by k) and P@1 by ``label`` for exact search and the plan; None if no query has a label."""
    labelled = [place for place, record in enumerate(records) if record.get(label)]
    if not labelled:
        logger.warning("no mAP check %s", fields(label=label, reason="no sample query has one"))
        return None
    own_rows = searcher.find([records[place]["image_id"] for place in labelled])
    truth = np.array([records[place][label] for place in labelled])
    figures: dict[str, Any] = {"label": label, "k": k, "num_queries": len(labelled)}
    for name, candidate in (("exact", Plan.exact(searcher.meta.dim)), ("plan", plan)):
        hits = planner.search_without(searcher, queries[labelled], k, candidate, own_rows)
        labels = np.array([row.get(label, "") for row in searcher.metadata(hits.rows)]).reshape(hits.rows.shape)
        judged = judge_labels(labels, truth)
        figures[f"{name}_map_at_{k}_by_k"] = metrics.mean(metrics.ap_by_k(judged, k))
        figures[f"{name}_top1"] = metrics.mean(metrics.precision(judged, 1))
    gap = figures[f"plan_map_at_{k}_by_k"] - figures[f"exact_map_at_{k}_by_k"]
    return figures | {"difference_points": 100 * gap}


def measure_plans(searcher: Searcher, queries: Floats, own_rows: Rows, config: PlanConfig) -> list[MeasuredPlan]:
    """Return all candidates, measured, timed and marked with the limits they break; the exact plan comes first."""
    tried = config.model_dump(include={"k", "shortlist_ks", "scan_dims", "funnels"})
    plans = list_plans(
        searcher.meta, **tried, efs=config.ef_search, nprobes=config.nprobe, single_stage=config.allow_single_stage
    )
    sample = planner.take_sample(searcher, queries, config.k, own_rows=own_rows)
    measured = planner.measure(sample, plans)
    measured += planner.measure_between(sample, measured, config.target, config.decide_by)
    if config.early_exit:
        measured += planner.measure_early_exit(sample, measured, config.target, config.decide_by)
    num = max(config.time_queries, planner.P99_QUERIES if config.max_p99_ms else 0)
    if config.max_p99_ms and len(queries) < planner.P99_QUERIES:
        few = fields(queries=len(queries), needed=planner.P99_QUERIES, taken="the slowest", remedy="raise num_queries")
        logger.warning("few queries for a 99th percentile %s", few)
    timed = planner.time_plans(searcher, queries[:num], config.k, measured, repeats=config.time_repeats)
    return PlanLimits(config.max_p99_ms, config.max_ram_mb).mark(timed)


def choose(
    searcher: Searcher, queries: Floats, records: list[dict[str, Any]], measured: list[MeasuredPlan], config: PlanConfig
) -> tuple[int, dict[str, Any] | None]:
    """Return (place, mAP check) of the cheapest good candidate whose mAP is as high as that of exact search.

    Raises ``UsageError``, which names the nearest candidate, if none keeps recall and limits.
    """
    good = choice.rank_good(
        measured, config.target, decide_by=config.decide_by, rank_by=config.rank_by, exact=config.allow_single_stage
    )
    if good in ([], [0]) and not (good and config.allow_single_stage):
        limits = PlanLimits(config.max_p99_ms, config.max_ram_mb)
        _, why = choice.nearest_miss(measured[1:] or measured, config.target, limits, decide_by=config.decide_by)
        why += explain_few(len(queries), config)
        if not good:
            raise UsageError(f"no plan keeps recall@{config.k} of {config.target} within the limits; {why}")
        logger.warning("no two-stage plan %s", fields(target=config.target, chosen="exact scan", nearest=why))
    for place in good:
        if config.label is None:
            return place, None
        check = check_map(searcher, queries, records, measured[place].plan, label=config.label, k=config.k)
        if check is None or abs(check["difference_points"]) <= config.max_map_loss:
            return place, check
    raise UsageError(
        f"no plan within the limits keeps mAP@{config.k} by {config.label} to {config.max_map_loss} "
        "points; raise max_map_loss, or the limit that the exact scan breaks: "
        f"{'; '.join(measured[0].breaks)}"
    )


def explain_few(num: int, config: PlanConfig) -> str:
    """Say how many queries the target needs if ``num`` cannot show it, however good a plan is; empty if they can."""
    best, _ = mean_interval(np.ones(num))
    if config.decide_by == "mean" or best >= config.target:
        return ""
    remedy = "set decide_by=mean or a target below 1"
    if config.target < 1:
        remedy = f"set num_queries of at least {ceil(log((1 - LEVEL) / 2) / log(config.target))}, or a lower target"
    return f"; {num} queries with a recall of 1 show at least {best:.4f}: {remedy}"


def compare_stages(measured: list[MeasuredPlan], place: int, config: PlanConfig) -> dict[str, Any]:
    """Compare the cheapest good plans of one stage and of several; log it if a plan of one stage is chosen."""
    good = choice.rank_good(measured, config.target, decide_by=config.decide_by, rank_by=config.rank_by, exact=True)
    facts = choice.compare_stages(measured, good, config.rank_by)
    if config.allow_single_stage and measured[place].plan.is_single_stage:
        several, plan = facts["several_stages"], measured[place].plan.describe()
        best = "none is good enough" if several is None else measured[int(several)].plan.describe()
        shown = fields(plan=plan, several_to_one=facts["several_to_one"], several=best)
        logger.info("one stage is the cheapest %s", shown)
    return facts


def check_holdout(
    searcher: Searcher, queries: Floats, records: list[dict[str, Any]], plan: Plan, config: PlanConfig
) -> dict[str, Any] | None:
    """Return recall, its interval and the mAP check of ``plan`` on queries that did not choose it; None without any."""
    if not len(queries):
        logger.warning("no holdout %s", fields(reason="every query took part in the choice; lower num_queries"))
        return None
    own_rows = searcher.find([record["image_id"] for record in records])
    sample = planner.take_sample(searcher, queries, config.k, own_rows=own_rows)
    _, measured = planner.measure(sample, [plan])
    label = config.label
    check = None if label is None else check_map(searcher, queries, records, plan, label=label, k=config.k)
    recall = measured.model_dump(include={"recall", "recall_low", "recall_high"})
    return {"num_queries": len(queries), **recall, "map_check": check}


def run(stage: StageRun[PlanConfig]) -> None:
    """Measure, choose, check, and write ``plan.json`` and ``plan.png``."""
    config, index = stage.config, stage.one("index")
    searcher = Searcher.open(index.uri, check=False)  # the runner opened it, which checks it
    require_same_model(searcher, stage.one("queries"))
    source = read_source(stage.one("queries"), config.where)
    sample, sampled = sample_queries(source, 2 * config.num_queries, derive_seed(config.seed, "plan", "queries"))
    queries, records = sample[: config.num_queries], sampled[: config.num_queries]
    if not len(queries):
        raise UsageError(f"where {config.where} keeps no query of {stage.one('queries').uri}; check its values")
    own_rows = searcher.find([record["image_id"] for record in records])
    measured = measure_plans(searcher, queries, own_rows, config)
    front = choice.pareto_front(measured, config.rank_by)
    place, map_check = choose(searcher, queries, records, measured, config)
    chosen = measured[place]
    holdout = check_holdout(searcher, sample[len(queries) :], sampled[len(queries) :], chosen.plan, config)
    facts = {
        "plan": chosen.plan.model_dump(mode="json"),
        "description": chosen.plan.describe(),
        "index": {"uri": index.uri, "generation": searcher.meta.generation},
        **config.model_dump(include={"target", "k", "max_p99_ms", "max_ram_mb"}),
        "num_queries": len(queries),
        "chosen": place,
        "front": front,
        "map_check": map_check,
        "holdout": holdout,
        "stages": compare_stages(measured, place, config),
        "candidates": [row.model_dump(mode="json") | {"description": row.plan.describe()} for row in measured],
        "machine": machine_facts(),
        "ranked_by": config.rank_by,
        "decided_by": config.decide_by,
    }
    stage.out.write_json("plan.json", facts)
    png = plot(
        measured, front, place, target=config.target, k=config.k, rank_by=config.rank_by, num_queries=len(queries)
    )
    storage.write_atomic(stage.out.path("plan.png"), png)
    stage.out.stats |= {
        "plan": chosen.plan.describe(),
        "candidates": len(measured),
        "queries": len(queries),
        **chosen.model_dump(include={"recall", "model_us", "exact_ratio", "ram_mb", "shard_ram_mb", "p99_us"}),
        "map_difference_points": map_check and map_check["difference_points"],
    }
    logger.info("plan %s", fields(plan=chosen.plan.describe(), recall=chosen.recall, us=chosen.query_us))


def foresee(config: PlanConfig, given: Mapping[str, Mapping[str, Outlook]], made: Artifact | None) -> Outlook:
    """See ``Stage.foresee``: rows that ``where`` keeps."""
    for outlook in given["queries"].values():
        require_values(outlook, "where", config.where, COLUMNS)
    return {}


STAGE: Stage[PlanConfig] = Stage(
    name="plan",
    kind="plan",
    config=PlanConfig,
    run=run,
    foresee=foresee,
    version=2,
    inputs={"index": Input("index"), "queries": Input("embeddings")},
)
