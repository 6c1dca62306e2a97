"""``lookalike evaluate``: exact retrieval per dimension, the embedding beside its baselines, one report.

The first embeddings artifact is the subject; the others are compared with it. Each is measured at its prefixes (plain
truncation, if it was not trained nested) and, if the settings name it, reduced by SVD, by a random choice of features
and by random projection.

Ranks follow one rule: cosines of vectors rounded to multiples of 2^-24, computed exactly, and of equal cosines the row
with the smaller ``image_id`` first. So figures do not depend on the order of the rows, on blocks or on the processor.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field

from lookalike import schemas, storage
from lookalike.artifacts import Artifact
from lookalike.config import Config
from lookalike.errors import UsageError
from lookalike.outlook import Outlook, require_column, require_values
from lookalike.plots import create_figure, to_png
from lookalike.progress import track
from lookalike.registry import nearest
from lookalike.retrieval import metrics
from lookalike.retrieval.relevance import count_equal, judge_labels
from lookalike.stages import Input, Stage, StageConfig, StageRun
from lookalike.train.evaluate.baselines import REDUCTIONS, Floats, grid_prefix
from lookalike.train.evaluate.embed import select_rows

K = 10
QUERY_BLOCK, BASE_BLOCK = 512, 65_536


class RetrievalTask(Config):
    """Queries, a database, and the label column whose equal values make a hit."""

    queries: dict[str, list[str]]
    """Column -> values that select the query rows."""
    database: dict[str, list[str]]
    """Column -> values that select the database rows; a query row is never its own neighbour."""
    label: str
    """Column of the label, for example ``group`` or ``category``."""


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


def neighbour_labels(
    queries: Floats, database: Floats, same: npt.NDArray[np.int64], labels: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """Labels of each query's ``K`` nearest database rows, int64 [q, K]; -1 where a small database has no more."""
    neighbours = nearest_rows(queries, database, same, min(K, len(database)))
    hits = np.where(neighbours == same[:, None], -1, labels[neighbours])  # the query itself is no answer
    return np.pad(hits, ((0, 0), (0, K - hits.shape[1])), constant_values=-1)


def measure_task(
    embedded: EmbeddingTable, vectors: Floats, dims: list[int], task: RetrievalTask
) -> Iterator[dict[str, Any]]:
    """One row of figures per dim for prefixes of ``vectors`` [n, D], each normalised after truncation."""
    query_rows = sort_by_id(embedded.table, row_indices(embedded.table, task.queries, "queries"))
    base_rows = sort_by_id(embedded.table, row_indices(embedded.table, task.database, "database"))
    if task.label not in embedded.table.column_names:
        valid = embedded.table.column_names
        raise UsageError(
            f"task label {task.label!r} is no column{nearest(task.label, valid)}; {embedded.name!r} has "
            f"{', '.join(valid)}"
        )
    column = embedded.table[task.label].to_pylist()
    names = ["" if value is None else str(value) for value in column]
    classes = {name: i for i, name in enumerate(sorted(set(names) - {""}))}
    labels = np.array([classes.get(name, -1) for name in names], np.int64)  # an empty label is no class
    query_rows = query_rows[labels[query_rows] >= 0]  # nothing is right or wrong for a query without a label
    if not len(query_rows):
        raise UsageError(f"no query of {dict(task.queries)} has a {task.label!r}; choose another label")
    place = {int(row): i for i, row in enumerate(base_rows)}
    same = np.array([place.get(int(row), -1) for row in query_rows], np.int64)
    relevant = count_equal(labels[base_rows], labels[query_rows])
    relevant = relevant - (same >= 0)  # the query itself is no answer
    for dim in dims:
        unit = grid_prefix(vectors, dim)
        hits = neighbour_labels(unit[query_rows], unit[base_rows], same, labels[base_rows])
        judged = judge_labels(hits, labels[query_rows], relevant)
        p1 = metrics.mean(metrics.precision(judged, 1))
        yield {
            "dim": dim,
            "queries": len(query_rows),
            "database": len(base_rows),
            "p_at_1": p1,
            "p_at_1_standard_error": float(np.sqrt(p1 * (1 - p1) / len(query_rows))),
            "map_at_10_by_k": metrics.mean(metrics.ap_by_k(judged, K)),
            "recall_at_10": metrics.mean(metrics.recall(judged, K)),
        }


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
                for figures in measure_task(embedded, vectors, usable, task)
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
            "map_at_10_by_k": "mean over queries of (1/10) sum_{i<=10} rel_i P@i, the MRL paper's form",
            "recall_at_10": "relevant items among the first 10, divided by all relevant items in the database",
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
    for outlook in embeddings.values():
        for name, task in config.tasks.items():
            require_values(outlook, f"tasks.{name}.queries", task.queries, columns)
            require_values(outlook, f"tasks.{name}.database", task.database, columns)
            require_column(f"tasks.{name}.label", task.label, columns)
            if outlook.get(task.label) == {}:
                raise UsageError(
                    f"tasks.{name}.label is {task.label!r}, and no row will have a {task.label}; map the source's "
                    f"column to the corpus field {task.label}, or choose another label of {', '.join(columns)}"
                )
        if config.svd_of:
            require_values(outlook, "svd_fit", config.svd_fit, columns)
    return {}


STAGE = Stage(
    name="evaluate",
    kind="report",
    config=EvaluateConfig,
    run=evaluate,
    foresee=foresee,
    version=2,
    inputs={"embeddings": Input("embeddings", many=True)},
)
