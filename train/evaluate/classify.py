"""``lookalike classify``: what prefixes of frozen embeddings know about classes, by the MRL paper's protocols.

Nearest class mean and probes at every dim, few shots, and adaptive classification: thresholds learned on a hold-out of
the training rows, accuracy beside the expected dim (Kusupati et al. 2022, section 4.2, appendices D and E). A prefix is
normalised after truncation. Probes are trained here, on frozen vectors: the paper's classifiers are the heads that its
networks were trained with.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field, field_validator

from lookalike import schemas, storage
from lookalike.artifacts import Artifact
from lookalike.errors import UsageError
from lookalike.intervals import group_means
from lookalike.outlook import Outlook, require_column, require_values
from lookalike.plots import create_figure, to_png
from lookalike.progress import track
from lookalike.sampling import mix_keys, stable_keys
from lookalike.stages import Input, Stage, StageConfig, StageRun
from lookalike.telemetry import fields, get_logger
from lookalike.train.evaluate import adaptive
from lookalike.train.evaluate.baselines import normalize_prefix
from lookalike.train.evaluate.classifiers import (
    Classes,
    Floats,
    Linear,
    Vectors,
    calibration_error,
    is_among_best,
    nearest_class_mean,
    ridge,
    softmax,
    softmax_regression,
)
from lookalike.train.evaluate.evaluate import EmbeddingTable, load, row_indices, sort_by_id
from lookalike.train.evaluate.judgements import row_keys

log = get_logger(__name__)
TOP = 5


class ClassifyConfig(StageConfig):
    """Training and test rows, their label, and the protocols' sizes."""

    label: str
    """Column of the class, for example ``category``; a row without one takes no part."""
    train: dict[str, list[str]] = {"split": ["train"]}
    """Column -> values that select the rows to learn from."""
    test: dict[str, list[str]] = {"split": ["test"]}
    """Column -> values that select the rows to classify."""
    dims: tuple[int, ...] | None = None
    """Prefixes to classify by; None: the nested dims of the first embedding. Larger ones than an embedding are left
    out for it, and its full size is always there."""
    group: str | None = "group"
    """Column of rows that belong together, such as pictures of one product: they are held out together, and drawn
    together for intervals. None: each row for itself."""
    holdout: float = Field(0.2, gt=0.0, le=0.5)
    """Share of the training groups that choose the probes' penalties and the thresholds of adaptive classification."""
    max_rows: int = Field(100_000, ge=2)
    """Most training rows, drawn by the hash of their ids; 8 bytes a number of each are in memory."""
    penalties: tuple[float, ...] = Field((1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0), min_length=1)
    """Penalties that a probe chooses from, by accuracy on the hold-out."""
    shots: tuple[int, ...] = (1, 5, 10, 25, 100)
    """Training rows per class of the few-shot curves; a class with fewer gives all it has."""
    draws: int = Field(5, ge=1)
    """How often the rows of each few-shot figure are drawn."""

    @field_validator("penalties")
    @classmethod
    def _positive(cls, penalties: tuple[float, ...]) -> tuple[float, ...]:
        if not all(0 < penalty < np.inf for penalty in penalties):
            raise ValueError(f"penalties {list(penalties)} must be above 0")
        return penalties

    @field_validator("shots")
    @classmethod
    def _growing(cls, shots: tuple[int, ...]) -> tuple[int, ...]:
        if list(shots) != sorted(set(shots)) or (shots and shots[0] < 1):
            raise ValueError(f"shots {list(shots)} must be positive and increasing")
        return shots


@dataclass(frozen=True)
class Problem:
    """Rows of one embedding and their classes."""

    table: EmbeddingTable
    fit: Classes
    """Numbers of the rows to learn from, in order of their ids."""
    held: Classes
    """Rows of the hold-out."""
    test: Classes
    classes: Classes
    """int64 [rows of the table]: class, -1 for none."""
    names: list[str]
    groups: npt.NDArray[np.int64]
    """int64 [test rows]: rows that belong together."""

    @property
    def num_classes(self) -> int:
        """Classes that a row to learn from has."""
        return len(self.names)

    def prefixes(self, rows: Classes, dim: int) -> Vectors:
        """Prefixes of ``rows``, of unit length."""
        return normalize_prefix(self.table.vectors[rows], dim)


def pose(embedded: EmbeddingTable, config: ClassifyConfig) -> Problem:
    """Choose rows and classes; ``UsageError`` if there is nothing to learn or to classify."""
    table = embedded.table
    for name in (config.label, *([config.group] if config.group else [])):
        require_column(f"the column {name!r} of {embedded.name!r}", name, table.column_names)
    train = sort_by_id(table, row_indices(table, config.train, "train"))
    test = sort_by_id(table, row_indices(table, config.test, "test"))
    if both := np.intersect1d(train, test).size:
        raise UsageError(f"train {config.train} and test {config.test} share {both} rows; select by split")
    labels = np.array([value or "" for value in _texts(table, config.label)], object)
    names = sorted(set(labels[train]) - {""})
    if len(names) < 2:
        raise UsageError(f"the training rows have {len(names)} classes of {config.label!r}; classifying takes two")
    number = {name: place for place, name in enumerate(names)}
    classes = np.array([number.get(label, -1) for label in labels], np.int64)
    train, test = train[classes[train] >= 0], test[classes[test] >= 0]
    if not len(test):
        raise UsageError(f"no test row has a {config.label!r} of the training rows; choose another label or test")
    if len(train) > config.max_rows:
        log.info("sampled %s", fields(embedding=embedded.name, rows=len(train), max_rows=config.max_rows))
        order = np.argsort(mix_keys(row_keys(table, None)[train], config.seed, "rows"), kind="stable")
        train = train[np.sort(order[: config.max_rows])]
    keys = row_keys(table, config.group)
    held = mix_keys(keys[train], config.seed, "holdout") < np.uint64(config.holdout * 2.0**64)
    if held.all() or not held.any():
        raise UsageError(f"holdout {config.holdout} of the training groups leaves a part empty; give more rows")
    _, groups = np.unique(keys[test], return_inverse=True)
    return Problem(embedded, train[~held], train[held], test, classes, names, groups)


def _texts(table: pa.Table, name: str) -> list[str]:
    return ["" if value is None else str(value) for value in table[name].to_pylist()]


def fit_probe(problem: Problem, dim: int, kind: str, config: ClassifyConfig) -> tuple[Linear, float]:
    """The probe ``ridge`` or ``softmax`` of a dim with the penalty that is best on the hold-out, the larger of equals.

    It is then fitted to the training rows less the hold-out, so that thresholds are learned on rows it has not seen.
    """
    x, y = problem.prefixes(problem.fit, dim), problem.classes[problem.fit]
    penalties = sorted(config.penalties, reverse=True)
    if kind == "ridge":
        probes = ridge(x, y, problem.num_classes, penalties)
    else:
        probes = [softmax_regression(x, y, problem.num_classes, penalty) for penalty in penalties]
    held, classes = problem.prefixes(problem.held, dim), problem.classes[problem.held]
    accuracies = [float(is_among_best(probe.scores(held), classes, 1).mean()) for probe in probes]
    best = int(np.argmax(accuracies))
    return probes[best], penalties[best]


def score(problem: Problem, scores: Floats, seed: int) -> dict[str, Any]:
    """Top-1 with its interval over groups, and top-5, of the test rows' scores [n, C]."""
    y = problem.classes[problem.test]
    right = is_among_best(scores, y, 1)
    ((low, high),) = group_means(right[:, None].astype(np.float64), problem.groups, seed=seed)
    return {
        "top_1": float(right.mean()),
        "top_1_low": low,
        "top_1_high": high,
        f"top_{TOP}": float(is_among_best(scores, y, TOP).mean()),
    }


def measure_dims(
    problem: Problem, dims: Sequence[int], config: ClassifyConfig, kept: list[Linear]
) -> Iterator[dict[str, Any]]:
    """A row for each dim and classifier; also the calibration error of softmax probes, which are added to ``kept``."""
    for dim in dims:
        x, y = problem.prefixes(problem.fit, dim), problem.classes[problem.fit]
        test = problem.prefixes(problem.test, dim)
        means = nearest_class_mean(x, y, problem.num_classes)
        yield {"method": "class_mean", "dim": dim, **score(problem, means.scores(test), config.seed)}
        for kind in ("ridge", "softmax"):
            probe, penalty = fit_probe(problem, dim, kind, config)
            scores = probe.scores(test)
            row = {"method": kind, "dim": dim, "penalty": penalty, **score(problem, scores, config.seed)}
            if kind == "softmax":
                sure = softmax(scores)
                right = sure.argmax(axis=1) == problem.classes[problem.test]
                kept.append(probe)
                row["calibration_error"] = calibration_error(sure.max(axis=1), right)
            yield row


def measure_shots(problem: Problem, dims: Sequence[int], config: ClassifyConfig) -> Iterator[dict[str, Any]]:
    """Nearest class mean from few rows a class: mean, least and largest top-1 over the draws."""
    train = np.concatenate([problem.fit, problem.held])
    y = problem.classes[train]
    keys = stable_keys([str(problem.table.table["image_id"][int(row)]) for row in train])
    for shots in config.shots:
        found: dict[int, list[float]] = {dim: [] for dim in dims}
        for draw in range(config.draws):
            order = np.lexsort((mix_keys(keys, config.seed, "shots", draw), y))
            first = np.searchsorted(y[order], y[order])
            chosen = order[np.arange(len(order)) - first < shots]
            for dim in dims:
                x = problem.prefixes(train[chosen], dim)
                means = nearest_class_mean(x, y[chosen], problem.num_classes)
                scores = means.scores(problem.prefixes(problem.test, dim))
                found[dim].append(float(is_among_best(scores, problem.classes[problem.test], 1).mean()))
        whole = int((np.bincount(y, minlength=problem.num_classes) >= shots).sum())
        for dim, values in found.items():
            spread = {"top_1": float(np.mean(values)), "top_1_least": min(values), "top_1_most": max(values)}
            yield {"method": "class_mean", "shots": shots, "dim": dim, "classes_with_all": whole, **spread}


def measure_adaptive(
    problem: Problem, dims: Sequence[int], config: ClassifyConfig, probes: Sequence[Linear]
) -> list[dict[str, Any]]:
    """A row for each cascade from the smallest dim up to another, with its thresholds; then the bounds of routing."""

    def probabilities(rows: Classes) -> list[Floats]:
        return [softmax(probe.scores(problem.prefixes(rows, dim))) for dim, probe in zip(dims, probes, strict=True)]

    held, test = probabilities(problem.held), probabilities(problem.test)
    y = problem.classes[problem.test]
    thresholds = adaptive.learn_thresholds(held, problem.classes[problem.held])
    rows: list[dict[str, Any]] = []
    for num in range(2, len(dims) + 1):
        cascade = adaptive.apply_thresholds(test[:num], thresholds[: num - 1])
        last, tried = adaptive.expected_dims(cascade.stops, dims[:num])
        right = (cascade.answers == y)[:, None].astype(np.float64)
        ((low, high),) = group_means(right, problem.groups, seed=config.seed)
        rows.append(
            {
                "method": "cascade",
                "dims": list(dims[:num]),
                "thresholds": thresholds[: num - 1],
                "top_1": float(right.mean()),
                "top_1_low": low,
                "top_1_high": high,
                "expected_dim": last,
                "expected_dims_tried": tried,
            }
        )
    first = adaptive.oracle(test, y)
    rows += [
        {
            "method": "oracle",
            "dims": list(dims),
            "top_1": float((first >= 0).mean()),
            "first_right": [float((first == number).mean()) for number in range(len(dims))],
        },
        {"method": "majority", "dims": list(dims), "top_1": float((adaptive.majority(test) == y).mean())},
    ]
    return rows


def classify(run: StageRun[ClassifyConfig]) -> None:
    """Measure every embedding and write ``report.json`` and a plot."""
    config, artifacts = run.config, run.many("embeddings")
    rows: list[dict[str, Any]] = []
    sizes: dict[str, Any] = {}
    for artifact in track(artifacts, "classify", len(artifacts), unit="embedding"):
        embedded = load(artifact)
        problem, full = pose(embedded, config), embedded.vectors.shape[1]
        dims = sorted({*(dim for dim in config.dims or embedded.dims if dim <= full), full})
        probes: list[Linear] = []
        measured = [*measure_dims(problem, dims, config, probes), *measure_shots(problem, dims, config)]
        if len(dims) > 1:
            measured += measure_adaptive(problem, dims, config, probes)
        rows += [{"embedding": embedded.name, **row} for row in measured]
        sizes[embedded.name] = {
            "classes": problem.num_classes,
            "fit": len(problem.fit),
            "holdout": len(problem.held),
            "test": len(problem.test),
            "test_groups": int(problem.groups.max() + 1),
        }
    report = {"seed": config.seed, "label": config.label, "sizes": sizes, "rows": rows}
    run.out.write_json("report.json", report)
    storage.write_atomic(run.out.path("accuracy.png"), plot(rows, config.label))
    best = {name: max(r["top_1"] for r in rows if r["embedding"] == name and "penalty" in r) for name in sizes}
    run.out.stats.update(label=config.label, best_probe_top_1={name: round(value, 4) for name, value in best.items()})


def plot(rows: list[dict[str, Any]], label: str) -> bytes:
    """Top-1 over the dim, and over the expected dim of cascades, as PNG bytes."""
    figure = create_figure(11, 4)
    by_dim, by_expected = figure.subplots(1, 2)
    for name in dict.fromkeys(row["embedding"] for row in rows):
        own = [row for row in rows if row["embedding"] == name]
        for method in ("class_mean", "ridge", "softmax"):
            points = [row for row in own if row["method"] == method and "shots" not in row]
            line = [row["dim"] for row in points], [row["top_1"] for row in points]
            by_dim.plot(*line, marker="o", markersize=3, label=f"{name} ({method})")
            if method == "softmax":
                by_expected.plot(*line, marker="o", markersize=3, label=f"{name}, fixed dim")
        cascades = [row for row in own if row["method"] == "cascade"]
        line = [row["expected_dim"] for row in cascades], [row["top_1"] for row in cascades]
        by_expected.plot(*line, marker="x", label=f"{name}, adaptive")
    for axis, what in ((by_dim, "dimensions"), (by_expected, "expected dimension")):
        axis.set_xscale("log", base=2)
        axis.set_xlabel(what)
        axis.set_ylabel("top-1")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.suptitle(label)
    return to_png(figure)


def foresee(config: ClassifyConfig, given: Mapping[str, Mapping[str, Outlook]], made: Artifact | None) -> Outlook:
    """See ``Stage.foresee``: rows to learn from and to classify, and their label, in every embedding."""
    columns = ("image_id", *schemas.CARRIED)
    for outlook in given["embeddings"].values():
        require_values(outlook, "train", config.train, columns)
        require_values(outlook, "test", config.test, columns)
        require_column("label", config.label, columns)
        if config.group is not None:
            require_column("group", config.group, columns)
        if outlook.get(config.label) == {}:
            raise UsageError(
                f"label is {config.label!r}, and no row will have a {config.label}; map the source's column to the "
                f"corpus field {config.label}, or choose another label of {', '.join(columns)}"
            )
    return {}


STAGE = Stage(
    name="classify",
    kind="report",
    config=ClassifyConfig,
    run=classify,
    foresee=foresee,
    inputs={"embeddings": Input("embeddings", many=True)},
)
