"""``lookalike evaluate``: exact retrieval per dimension, the embedding beside its baselines, one report.

The first embeddings artifact is the subject; the others are compared with it. Each is measured at its prefixes (plain
truncation, if it was not trained nested) and, if the settings name it, reduced by SVD, by a random choice of features
and by random projection.

Ranks follow one rule: cosines of vectors rounded to multiples of 2^-24, computed exactly, and of equal cosines the row
with the smaller ``image_id`` first. So figures do not depend on the order of the rows, on blocks or on the processor.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field, model_validator

from lookalike import schemas, storage
from lookalike.artifacts import Artifact
from lookalike.config import Config
from lookalike.errors import UsageError
from lookalike.intervals import group_means
from lookalike.outlook import Outlook, require_column, require_values
from lookalike.plots import create_figure, to_png
from lookalike.progress import track
from lookalike.registry import nearest
from lookalike.retrieval import metrics
from lookalike.retrieval.metrics import get_metric
from lookalike.retrieval.relevance import ByClass, ByPairs, Relevance
from lookalike.stages import Input, Stage, StageConfig, StageRun
from lookalike.train.evaluate.baselines import REDUCTIONS, Floats, grid_prefix
from lookalike.train.evaluate.embed import select_rows
from lookalike.train.evaluate.judgements import classes_of, read_pairs, row_keys

ALWAYS = ("p_at_1", "map_at_10_by_k", "recall_at_10")
"""Metrics of every task."""
QUERY_BLOCK, BASE_BLOCK = 512, 65_536


class RetrievalTask(Config):
    """Queries, a database, and the label column whose equal values make a hit."""

    queries: dict[str, list[str]]
    """Column -> values that select the query rows."""
    database: dict[str, list[str]]
    """Column -> values that select the database rows; a query row is never its own neighbour."""
    label: str | None = None
    """Column of the label, for example ``group`` or ``category``."""
    pairs: str | None = None
    """In place of a label: URI of a parquet file of judged pairs, such as clicks or people's grades, with the columns
    ``query_id``, ``item_id`` and perhaps ``grade`` (1 without it, 0 is not relevant). Queries without a pair are not
    asked."""
    min_grade: float = Field(0.0, ge=0.0, allow_inf_nan=False)
    """Pairs below this grade are not relevant."""
    metrics: tuple[str, ...] = ()
    """Metrics beside the three that are always measured, such as ``ndcg_at_5`` or ``map_at_20_by_relevant``; an unknown
    one lists all forms (``lookalike.retrieval.metrics``)."""
    group: str | None = "group"
    """Column of queries that are alike, such as pictures of one product, and are drawn together for 95% intervals; a
    query without a value stands for itself."""

    @model_validator(mode="after")
    def _check(self) -> "RetrievalTask":
        if (self.label is None) == (self.pairs is None):
            raise ValueError("what is relevant comes from a label or from pairs; set one of them")
        if self.pairs is None and self.min_grade:
            raise ValueError("min_grade is about pairs; drop it")
        for name in self.metrics:
            get_metric(name)
            if self.pairs is not None and name.startswith("vote"):
                raise ValueError(f"{name} needs classes, and pairs have none; drop it, or set a label")
        return self


class EvaluateConfig(StageConfig):
    """Retrieval tasks, dims, and the embeddings to reduce."""

    tasks: dict[str, RetrievalTask] = Field(min_length=1)
    """Name -> retrieval task; the first one is the headline."""
    dims: tuple[int, ...] = Field(min_length=1)
    """Sizes to measure, as far as the embedding has them; its full size is always measured."""
    svd_of: list[str] = []
    """Names of embeddings artifacts (steps) to measure after SVD too."""
    svd_fit: dict[str, list[str]] = {"split": ["train"]}
    """Rows on which the SVD is fitted."""
    random_of: list[str] = []
    """Names of embeddings to measure also by m features chosen at random with the stage's seed."""
    jl_of: list[str] = []
    """Names of embeddings to measure also after a Gaussian (Johnson-Lindenstrauss) projection of the stage's seed."""

    @property
    def reduced(self) -> dict[str, list[str]]:
        """Method of ``REDUCTIONS`` -> names of the embeddings to measure by it."""
        return {"svd": self.svd_of, "random": self.random_of, "jl": self.jl_of}


@dataclass(frozen=True)
class EmbeddingTable:
    """An embeddings artifact in memory: vectors float32 [n, D] and its other columns."""

    name: str
    vectors: Floats
    table: pa.Table
    dims: tuple[int, ...]


def load(artifact: Artifact) -> EmbeddingTable:
    """Read all parts of an embeddings artifact."""
    tables = []
    for uri in artifact.files("part-", ".parquet"):
        filesystem, path = storage.arrow_filesystem(uri)
        tables.append(pq.read_table(path, filesystem=filesystem))
    table = pa.concat_tables(tables)
    meta = artifact.read_json("meta.json")
    flat = table["vector"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    vectors = flat.reshape(-1, meta["dim"]).astype(np.float32)
    return EmbeddingTable(artifact.manifest.name, vectors, table.drop_columns(["vector"]), tuple(meta["dims"]))


def row_indices(table: pa.Table, where: Mapping[str, list[str]], what: str) -> npt.NDArray[np.int64]:
    """Numbers of the rows that match ``where``; raises ``UsageError`` if there are none."""
    numbered = table.append_column("__row", pa.array(np.arange(table.num_rows)))
    rows: npt.NDArray[np.int64] = select_rows(numbered, where)["__row"].to_numpy()
    if not len(rows):
        raise UsageError(f"{what} {dict(where)} select no row; check the embeddings' columns")
    return rows


def sort_by_id(table: pa.Table, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The numbers ``rows`` of rows of ``table``, in order of their ``image_id``."""
    order = pc.array_sort_indices(table["image_id"].combine_chunks().take(pa.array(rows)))
    result: npt.NDArray[np.int64] = rows[order.to_numpy()]
    return result


def nearest_rows(queries: Floats, database: Floats, same: npt.NDArray[np.int64], k: int) -> npt.NDArray[np.int64]:
    """The ``k`` best database rows of each query by inner product, of equal ones the smaller row, int64 [q, k].

    Exact for rows of ``grid_prefix``. ``same`` [q]: the database row that is the query itself and comes last, or -1.
    """
    return np.concatenate(
        [
            _nearest_in_blocks(queries[start : start + QUERY_BLOCK], database, same[start : start + QUERY_BLOCK], k)
            for start in range(0, len(queries), QUERY_BLOCK)
        ]
    )


def _nearest_in_blocks(queries: Floats, database: Floats, same: npt.NDArray[np.int64], k: int) -> npt.NDArray[np.int64]:
    wide, rows, best = queries.astype(np.float64), np.empty((len(queries), 0), np.int64), np.empty((len(queries), 0))
    for first in range(0, len(database), BASE_BLOCK):
        scores = wide @ database[first : first + BASE_BLOCK].T.astype(np.float64)
        own = np.flatnonzero((same >= first) & (same < first + BASE_BLOCK))
        scores[own, same[own] - first] = -np.inf
        found = _largest(scores, k)
        rows = np.hstack([rows, found + first])
        best = np.hstack([best, np.take_along_axis(scores, found, axis=1)])
        order = np.argsort(-best, axis=1, kind="stable")[:, :k]  # rows of earlier blocks stand first, and are smaller
        rows, best = np.take_along_axis(rows, order, axis=1), np.take_along_axis(best, order, axis=1)
    return rows


def _largest(scores: npt.NDArray[np.float64], k: int) -> npt.NDArray[np.int64]:
    """Columns of the ``k`` largest of each line, falling, of equal ones the smaller column first."""
    k = min(k, scores.shape[1])
    kth = np.partition(scores, scores.shape[1] - k, axis=1)[:, scores.shape[1] - k]
    found = np.empty((len(scores), k), np.int64)
    for number, line in enumerate(scores):
        columns = np.flatnonzero(line >= kth[number])
        found[number] = columns[np.argsort(-line[columns], kind="stable")[:k]]
    return found


def nearest_answers(queries: Floats, database: Floats, same: npt.NDArray[np.int64], k: int) -> npt.NDArray[np.int64]:
    """``nearest_rows`` without the query itself, int64 [q, k]; -1 where a small database has no more."""
    neighbours = nearest_rows(queries, database, same, min(k, len(database)))
    answers = np.where(neighbours == same[:, None], -1, neighbours)
    return np.pad(answers, ((0, 0), (0, k - answers.shape[1])), constant_values=-1)


class Case(NamedTuple):
    """The queries of a task, the rows that may answer, and what is relevant."""

    queries: npt.NDArray[np.int64]
    """Rows that ask, in order of their ids."""
    database: npt.NDArray[np.int64]
    same: npt.NDArray[np.int64]
    """int64 [queries]: place of the query itself in the database, or -1."""
    relevance: Relevance
    groups: npt.NDArray[Any]
    """[queries]: equal for queries that are alike."""


def pose(embedded: EmbeddingTable, task: RetrievalTask) -> Case:
    """Rows of a task; ``UsageError`` if nothing is asked, or nothing is right or wrong."""
    table = embedded.table
    queries = sort_by_id(table, row_indices(table, task.queries, "queries"))
    database = sort_by_id(table, row_indices(table, task.database, "database"))
    place = {int(row): i for i, row in enumerate(database)}
    if task.pairs is not None:
        pairs = read_pairs(task.pairs, table, queries, database)
        asked, number = np.unique(pairs.queries, return_inverse=True)
        queries = queries[asked]
        relevance: Relevance = ByPairs(
            number, pairs.items, pairs.grades, num_queries=len(queries), min_grade=task.min_grade
        )
    else:
        labels = classes_of(table, str(task.label), embedded.name)
        queries = queries[labels[queries] >= 0]  # nothing is right or wrong for a query without a label
        if not len(queries):
            raise UsageError(f"no query of {dict(task.queries)} has a {task.label!r}; choose another label")
        own = np.arange(len(table))  # the query itself is no answer
        relevance = ByClass(labels[queries], labels[database], (own[queries], own[database]))
    same = np.array([place.get(int(row), -1) for row in queries], np.int64)
    group = task.group if task.group in table.column_names else None
    return Case(queries, database, same, relevance, row_keys(table, group)[queries])


def measure_case(
    case: Case, vectors: Floats, dims: Sequence[int], names: Sequence[str], seed: int
) -> Iterator[dict[str, Any]]:
    """A row of figures per dim: each metric of ``names`` with its interval over the case's groups."""
    wanted = [get_metric(name) for name in dict.fromkeys(names)]
    depth = max(metric.depth(case.relevance.num_relevant) for metric in wanted)
    _, numbered = np.unique(case.groups, return_inverse=True)
    for dim in dims:
        unit = grid_prefix(vectors, dim)
        judged = case.relevance.judge(nearest_answers(unit[case.queries], unit[case.database], case.same, depth))
        scores = np.stack([metric.score(judged) for metric in wanted], axis=1)
        figures: dict[str, Any] = {"dim": dim, "queries": len(case.queries), "database": len(case.database)}
        intervals = group_means(scores, numbered, seed=seed)
        for metric, column, (low, high) in zip(wanted, scores.T, intervals, strict=True):
            figures |= {metric.id: metrics.mean(column), f"{metric.id}_low": low, f"{metric.id}_high": high}
        yield figures


def measure_task(
    embedded: EmbeddingTable, vectors: Floats, dims: list[int], task: RetrievalTask, seed: int = 0
) -> Iterator[dict[str, Any]]:
    """One row of figures per dim for prefixes of ``vectors`` [n, D], each normalised after truncation."""
    case = pose(embedded, task)
    for figures in measure_case(case, vectors, dims, (*ALWAYS, *task.metrics), seed):
        p1 = figures["p_at_1"]
        yield figures | {"p_at_1_standard_error": float(np.sqrt(p1 * (1 - p1) / len(case.queries)))}


def measure(embedded: EmbeddingTable, config: EvaluateConfig) -> list[dict[str, Any]]:
    """Figures of one embedding: a row per method, task and dim."""
    full = embedded.vectors.shape[1]
    dims = sorted({*(dim for dim in config.dims if dim <= full), full})
    coordinates = {"prefix": embedded.vectors}
    fit = embedded.vectors[:0]
    if embedded.name in config.svd_of:
        fit = embedded.vectors[sort_by_id(embedded.table, row_indices(embedded.table, config.svd_fit, "svd_fit"))]
    for method, names in config.reduced.items():
        if embedded.name in names:
            coordinates[method] = REDUCTIONS[method](embedded.vectors, fit, config.seed)
    rows = []
    for method, vectors in coordinates.items():
        usable = [dim for dim in dims if dim <= vectors.shape[1]]
        for name, task in config.tasks.items():
            rows += [
                {"embedding": embedded.name, "method": method, "task": name, **figures}
                for figures in measure_task(embedded, vectors, usable, task, config.seed)
            ]
    return rows


def require_names(config: EvaluateConfig, embeddings: Sequence[str]) -> None:
    """Raise ``UsageError`` if an embedding to reduce is none of ``embeddings``."""
    for method, names in config.reduced.items():
        if unknown := sorted(set(names) - set(embeddings)):
            raise UsageError(
                f"{method}_of names {unknown}{nearest(unknown[0], list(embeddings))}; the embeddings are "
                f"{list(embeddings)}; name some of these, or add the step to inputs.embeddings"
            )


def evaluate(run: StageRun[EvaluateConfig]) -> None:
    """Measure every embedding and write ``report.json`` and a plot per task."""
    config, artifacts = run.config, run.many("embeddings")
    require_names(config, [artifact.manifest.name for artifact in artifacts])
    rows: list[dict[str, Any]] = []
    for artifact in track(artifacts, "evaluate", len(artifacts), unit="embedding"):
        rows += measure(load(artifact), config)
    headline = next(iter(config.tasks))
    subject = artifacts[0].manifest.name
    full_dim = {name: full_dim_row(rows, name, headline) for name in dict.fromkeys(r["embedding"] for r in rows)}
    report = {
        "seed": config.seed,
        "subject": subject,
        "headline_task": headline,
        "metric_notes": {
            name: get_metric(name).definition for task in config.tasks.values() for name in (*ALWAYS, *task.metrics)
        },
        "full_dim": full_dim,
        "rows": rows,
    }
    run.out.write_json("report.json", report)
    for name in config.tasks:
        storage.write_atomic(run.out.path(f"{name}.png"), plot_by_dim([r for r in rows if r["task"] == name], name))
    run.out.stats.update(subject=subject, full_dim_p_at_1={n: round(row["p_at_1"], 4) for n, row in full_dim.items()})


def full_dim_row(rows: list[dict[str, Any]], name: str, task: str) -> dict[str, Any]:
    """Figures of an embedding at its full size."""
    return max(
        (r for r in rows if r["embedding"] == name and r["task"] == task and r["method"] == "prefix"),
        key=lambda row: row["dim"],
    )


def plot_by_dim(rows: list[dict[str, Any]], title: str) -> bytes:
    """P@1 and mAP@10 over the embedding size, one line per embedding and method, as PNG bytes."""
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        lines.setdefault(f"{row['embedding']} ({row['method']})", []).append(row)
    figure = create_figure(11, 4)
    axes = figure.subplots(1, 2)
    for axis, metric, label in zip(axes, ("p_at_1", "map_at_10_by_k"), ("P@1", "mAP@10 (by k)"), strict=True):
        for name, points in lines.items():
            ordered = sorted(points, key=lambda row: row["dim"])
            axis.plot([p["dim"] for p in ordered], [p[metric] for p in ordered], marker="o", markersize=3, label=name)
        axis.set_xscale("log", base=2)
        axis.set_xlabel("dimensions")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    figure.suptitle(title)
    return to_png(figure)


def foresee(config: EvaluateConfig, given: Mapping[str, Mapping[str, Outlook]], made: Artifact | None) -> Outlook:
    """See ``Stage.foresee``: queries, a database and labels in every embedding, and the names of those to reduce."""
    columns, embeddings = ("image_id", *schemas.CARRIED), given["embeddings"]
    if not any("/" in source for source in embeddings):  # an artifact of elsewhere is opened later, and has any name
        require_names(config, list(embeddings))
    for name, task in config.tasks.items():
        if task.pairs is not None and not storage.exists(task.pairs):
            raise UsageError(
                f"tasks.{name}.pairs {task.pairs} does not exist; give a parquet file of query_id, item_id"
            )
    for outlook in embeddings.values():
        for name, task in config.tasks.items():
            require_values(outlook, f"tasks.{name}.queries", task.queries, columns)
            require_values(outlook, f"tasks.{name}.database", task.database, columns)
            if task.label is None:
                continue
            require_column(f"tasks.{name}.label", task.label, columns)
            if outlook.get(task.label) == {}:
                raise UsageError(
                    f"tasks.{name}.label is {task.label!r}, and no row will have a {task.label}; map the source's "
                    f"column to the corpus field {task.label}, or choose another label of {', '.join(columns)}"
                )
        if config.svd_of:
            require_values(outlook, "svd_fit", config.svd_fit, columns)
    return {}


def _sources(config: EvaluateConfig) -> list[str]:
    return [task.pairs for task in config.tasks.values() if task.pairs is not None]


STAGE = Stage(
    name="evaluate",
    kind="report",
    config=EvaluateConfig,
    run=evaluate,
    foresee=foresee,
    version=3,
    sources=_sources,
    inputs={"embeddings": Input("embeddings", many=True)},
)
