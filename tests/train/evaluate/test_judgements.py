"""Evaluation by judged pairs and by any metric: against loops and scikit-learn; what is wrong is said."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError
from sklearn.metrics import ndcg_score

from lookalike.artifacts import Artifact
from lookalike.errors import UsageError
from lookalike.train.evaluate.evaluate import STAGE, RetrievalTask, load, measure_task
from tests.train.evaluate.test_evaluate import corpus, publish, run, vectors

WHERE = {"queries": {"view": ["front"]}, "database": {"dataset": ["furniture"]}}


def cosines(dim: int = 12) -> np.ndarray:
    unit = vectors()[:, :dim] / np.linalg.norm(vectors()[:, :dim], axis=1, keepdims=True)
    return unit @ unit.T


def write_pairs(folder: Path, pairs: list[tuple[Any, ...]], **columns: Any) -> str:
    table = {"query_id": [p[0] for p in pairs], "item_id": [p[1] for p in pairs], "grade": [p[2] for p in pairs]}
    pq.write_table(pa.table({**table, **columns}), folder / "pairs.parquet")
    return str(folder / "pairs.parquet")


def graded() -> list[tuple[str, str, float]]:
    """Three to six graded items for every third query."""
    random = np.random.default_rng(3)
    fronts = [i for i, view in enumerate(corpus()["view"].to_pylist()) if view == "front"]
    return [
        (f"i{q}", f"i{item}", float(random.integers(0, 4)))
        for q in fronts[::3]
        for item in random.choice(60, int(random.integers(3, 7)), replace=False)
    ]


def one_by_one(pairs: list[tuple[str, str, float]]) -> dict[str, float]:
    """P@1, ndcg@5 and recall@3, query by query; the query itself is no answer."""
    table = corpus()
    base = [i for i, name in enumerate(table["dataset"].to_pylist()) if name == "furniture"]
    first, gains, recalls = [], [], []
    for query in sorted({p[0] for p in pairs}):
        q = int(query[1:])
        grades = {int(item[1:]): grade for own, item, grade in pairs if own == query and int(item[1:]) in base}
        grades.pop(q, None)
        if not grades:
            continue
        rows = [i for i in base if i != q]
        ranked = sorted(rows, key=lambda i: -cosines()[q, i])
        first.append(grades.get(ranked[0], 0) > 0)
        relevant = sum(grade > 0 for grade in grades.values())
        if relevant:
            truth = [[grades.get(i, 0) for i in rows]]
            gains.append(ndcg_score(truth, [[cosines()[q, i] for i in rows]], k=5))
            recalls.append(sum(grades.get(i, 0) > 0 for i in ranked[:3]) / relevant)
    return {"p_at_1": np.mean(first), "ndcg_at_5": np.mean(gains), "recall_at_3": np.mean(recalls)}


def test_graded_pairs_give_the_figures_of_a_loop(tmp_path: Path) -> None:
    embedded = load(publish(str(tmp_path), "vectors", vectors()))
    task = RetrievalTask(**WHERE, pairs=write_pairs(tmp_path, graded()), metrics=("ndcg_at_5", "recall_at_3"))
    figures = next(measure_task(embedded, embedded.vectors, [12], task))
    for name, value in one_by_one(graded()).items():
        assert figures[name] == pytest.approx(value, abs=1e-9), name
        assert 0 <= figures[f"{name}_low"] <= figures[name] <= figures[f"{name}_high"] <= 1


def test_clicks_need_no_grade_and_a_least_grade_cuts(tmp_path: Path) -> None:
    embedded = load(publish(str(tmp_path), "vectors", vectors()))
    uri = write_pairs(tmp_path, graded())
    cut = RetrievalTask(**WHERE, pairs=uri, min_grade=2, metrics=("recall_at_3",))
    found = next(measure_task(embedded, embedded.vectors, [12], cut))
    expected = one_by_one([(q, i, grade if grade >= 2 else 0.0) for q, i, grade in graded()])
    assert found["recall_at_3"] == pytest.approx(expected["recall_at_3"])
    pq.write_table(pq.read_table(uri).drop_columns(["grade"]), uri)
    clicks = next(measure_task(embedded, embedded.vectors, [12], RetrievalTask(**WHERE, pairs=uri)))
    assert clicks["p_at_1"] == pytest.approx(one_by_one([(q, i, 1.0) for q, i, _ in graded()])["p_at_1"])


def test_metrics_of_any_k_and_intervals_of_products(tmp_path: Path) -> None:
    """More ranks than rows are padded; products are drawn together."""
    embedded = load(publish(str(tmp_path), "vectors", vectors()))
    names = ("map_at_20_by_relevant", "hit_at_100", "mrr_at_5", "map_at_r", "vote_at_7")
    task = RetrievalTask(**WHERE, label="category", metrics=names, group=None)
    alone = next(measure_task(embedded, embedded.vectors, [12], task))
    assert alone["hit_at_100"] == 1.0
    assert alone["mrr_at_5"] >= alone["p_at_1"]
    columns = embedded.table.column_names
    two = pa.array(["a" if i % 2 else "b" for i in range(60)])
    table = embedded.table.set_column(columns.index("group"), "group", two)
    together = next(
        measure_task(
            type(embedded)("v", embedded.vectors, table, (12,)),
            embedded.vectors,
            [12],
            task.model_copy(update={"group": "group"}),
        )
    )
    assert together["p_at_1"] == alone["p_at_1"]
    assert together["p_at_1_high"] - together["p_at_1_low"] != alone["p_at_1_high"] - alone["p_at_1_low"]


def test_the_report_defines_its_metrics_and_pairs_are_part_of_the_fingerprint(tmp_path: Path) -> None:
    artifact = publish(str(tmp_path), "vectors", vectors())
    uri = write_pairs(tmp_path, graded())
    tasks = {"clicks": RetrievalTask(**WHERE, pairs=uri, metrics=("ndcg_at_5",))}
    first = run(str(tmp_path), [artifact], tasks=tasks)
    notes = first.read_json("report.json")["metric_notes"]
    assert set(notes) == {"p_at_1", "map_at_10_by_k", "recall_at_10", "ndcg_at_5"}
    assert "divided by that of the best list" in notes["ndcg_at_5"]
    write_pairs(tmp_path, graded()[1:])
    assert run(str(tmp_path), [artifact], tasks=tasks).uri != first.uri


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"label": None}, "comes from a label or from pairs; set one of them"),
        ({"pairs": "x.parquet"}, "comes from a label or from pairs; set one of them"),
        ({"label": None, "pairs": "x.parquet", "metrics": ("vote_at_5",)}, "vote_at_5 needs classes, and pairs have"),
        ({"min_grade": 1.0}, "min_grade is about pairs; drop it"),
        ({"metrics": ("ndcg",)}, "unknown metric 'ndcg'; there are.*ndcg_at_{k}"),
        ({"metrics": ("map_at_10",)}, "unknown metric 'map_at_10'.*map_at_{k}_by_relevant"),
    ],
)
def test_a_task_that_cannot_be_measured_is_refused(changed: dict[str, Any], words: str) -> None:
    with pytest.raises((ValidationError, UsageError), match=words):
        RetrievalTask(**{**WHERE, "label": "group", **changed})


@pytest.mark.parametrize(
    ("pairs", "columns", "words"),
    [
        ([("i1", "nobody", 1.0)], {}, "names a query and an item of the database; check its ids"),
        ([("i1", "i2", 1.0)], {"query_id": None}, "has no column 'query_id'"),
        ([("i1", "i2", 1.0)], {"grade": ["good"]}, "has grades of type string"),
        ([("i1", "i2", 1.0)], {"grade": pa.array([None], pa.float64())}, "1 of them null; give numbers"),
    ],
)
def test_pairs_that_cannot_be_read_are_named(tmp_path: Path, pairs: Any, columns: dict[str, Any], words: str) -> None:
    embedded = load(publish(str(tmp_path), "vectors", vectors()))
    uri = write_pairs(tmp_path, pairs)
    table = pq.read_table(uri)
    for name, values in columns.items():
        table = table.drop_columns([name]) if values is None else table.set_column(2, name, pa.array(values))
    pq.write_table(table, uri)
    with pytest.raises(UsageError, match=words):
        next(measure_task(embedded, embedded.vectors, [12], RetrievalTask(**WHERE, pairs=uri)))


def test_pairs_that_name_rows_of_elsewhere_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    embedded: Any = load(publish(str(tmp_path), "vectors", vectors()))
    known = graded()
    uri = write_pairs(tmp_path, [*known, ("nobody", "i2", 1.0), (known[0][0], "none", 1.0)])
    with_odd = next(measure_task(embedded, embedded.vectors, [12], RetrievalTask(**WHERE, pairs=uri)))
    assert f"pairs={len(known) + 2} unknown_query=1 unknown_item=" in caplog.text
    alone = RetrievalTask(**WHERE, pairs=write_pairs(tmp_path, known))
    assert with_odd == next(measure_task(embedded, embedded.vectors, [12], alone))


def test_a_file_that_is_missing_is_refused_before_a_step_runs(tmp_path: Path) -> None:
    task = RetrievalTask(**WHERE, pairs=str(tmp_path / "none.parquet"))
    assert STAGE.foresee is not None
    from lookalike.train.evaluate.evaluate import EvaluateConfig

    with pytest.raises(UsageError, match=r"tasks.clicks.pairs .*none.parquet does not exist"):
        STAGE.foresee(EvaluateConfig(tasks={"clicks": task}, dims=(4,)), {"embeddings": {"vectors": {}}}, None)
    (tmp_path / "none.parquet").write_bytes(b"no parquet")
    embedded: Artifact = publish(str(tmp_path), "vectors", vectors())
    with pytest.raises(UsageError, match=r"none.parquet is no parquet file \(.*\); give one of pairs"):
        run(str(tmp_path), [embedded], tasks={"clicks": task})
