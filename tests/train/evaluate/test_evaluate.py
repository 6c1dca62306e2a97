"""Evaluation against brute force in plain Python."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lookalike import storage
from lookalike.artifacts import Artifact, Draft
from lookalike.errors import UsageError
from lookalike.stages import execute
from lookalike.train.evaluate.baselines import REDUCTIONS
from lookalike.train.evaluate.embed import embedding_table, select_rows, write_part
from lookalike.train.evaluate.evaluate import (
    STAGE,
    EvaluateConfig,
    RetrievalTask,
    load,
    measure_task,
    nearest_rows,
    row_indices,
)
from lookalike.train.feed.row_groups import list_row_groups

UNKNOWN = range(10)
TASK = RetrievalTask(queries={"view": ["front"]}, database={"dataset": ["furniture"]}, label="group")


def corpus(num: int = 60) -> pa.Table:
    random = np.random.default_rng(6)
    return pa.table(
        {
            "image_id": [f"i{i}" for i in range(num)],
            "group": [f"g{g}" for g in random.integers(0, 9, num)],
            "view": random.choice(["icon", "front"], num).tolist(),
            "split": random.choice(["train", "test"], num).tolist(),
            "dataset": ["furniture" if i % 5 else "clipart" for i in range(num)],
            "category": random.choice(["a", "b"], num).tolist(),
            "title": ["t"] * num,
        }
    )


def vectors(num: int = 60, dim: int = 12) -> np.ndarray:
    return np.random.default_rng(7).normal(size=(num, dim)).astype(np.float32)


def publish(root: str, name: str, data: np.ndarray, dtype: str = "float32") -> Artifact:
    draft, table = Draft(root, "embeddings", name, name[0] * 20), corpus(len(data))
    for i in range(0, len(data), 25):
        write_part(draft.path(f"part-{i:05d}.parquet"), embedding_table(table[i : i + 25], data[i : i + 25], dtype))
    draft.write_json("meta.json", {"dim": data.shape[1], "dims": [4, data.shape[1]], "rows": len(data)})
    return draft.publish(config={}, parents={}, stage_version=1, duration_s=0.0)


@settings(max_examples=40)
@given(st.integers(1, 30), st.integers(2, 40), st.integers(1, 8), st.integers(0, 999))
def test_nearest_rows_are_those_of_a_full_sort_without_the_query(q: int, n: int, k: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    queries, database = (random.integers(-2, 3, (rows, 3)).astype(np.float32) for rows in (q, n))  # many ties
    same = random.integers(-1, n, q)
    k = min(k, n - 1)
    found = nearest_rows(queries, database, same, k)
    for i in range(q):
        candidates = [row for row in range(n) if row != same[i]]
        expected = sorted(candidates, key=lambda row: (-float(queries[i] @ database[row]), row))[:k]
        assert found[i].tolist() == expected


def brute_force(table: pa.Table, data: np.ndarray, dim: int) -> dict[str, float]:
    """P@1, mAP@10 divided by 10 and recall@10, by loops."""
    rows = table.to_pylist()
    first, precision, recall = [], [], []
    for q, query in enumerate(rows):
        if query["view"] != "front":
            continue
        base = [i for i, row in enumerate(rows) if row["dataset"] == "furniture" and i != q]
        cosines = {
            i: float(data[q, :dim] @ data[i, :dim] / np.linalg.norm(data[q, :dim]) / np.linalg.norm(data[i, :dim]))
            for i in base
        }
        ranked = sorted(base, key=lambda i: -cosines[i])[:10]
        hits = [rows[i]["group"] == query["group"] for i in ranked]
        first.append(float(hits[0]))
        precision.append(sum(sum(hits[: r + 1]) / (r + 1) for r in range(10) if hits[r]) / 10)
        relevant = sum(rows[i]["group"] == query["group"] for i in base)
        if relevant:
            recall.append(sum(hits) / relevant)
    return {
        name: float(np.mean(values))
        for name, values in (("p_at_1", first), ("map_at_10_by_k", precision), ("recall_at_10", recall))
    }


def test_figures_are_those_of_brute_force(tmp_path: Path) -> None:
    embedded = load(publish(str(tmp_path), "vectors", vectors()))
    for figures in measure_task(embedded, embedded.vectors, [3, 12], TASK):
        for name, value in brute_force(corpus(), vectors(), figures["dim"]).items():
            assert figures[name] == pytest.approx(value, abs=1e-9), (figures["dim"], name)
        share = figures["p_at_1"]
        answers = np.repeat([1.0, 0.0], [round(share * figures["queries"]), round((1 - share) * figures["queries"])])
        assert figures["p_at_1_standard_error"] == pytest.approx(answers.std() / np.sqrt(len(answers)))
    assert figures["database"] == 48


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 0.0), ("float16", 2e-3)])
def test_vectors_and_columns_come_back_as_they_were_stored(tmp_path: Path, dtype: str, tolerance: float) -> None:
    embedded = load(publish(str(tmp_path), "vectors", vectors(), dtype))
    assert np.abs(embedded.vectors - vectors()).max() <= tolerance
    assert embedded.vectors.dtype == np.float32
    assert embedded.table.to_pydict() == corpus().select(embedded.table.column_names).to_pydict()
    assert embedded.dims == (4, 12)


def test_rows_without_a_label_are_not_asked(tmp_path: Path) -> None:
    embedded = load(publish(str(tmp_path), "vectors", vectors()))
    known = next(measure_task(embedded, embedded.vectors, [12], TASK))
    group = [None if i in UNKNOWN else value for i, value in enumerate(embedded.table["group"].to_pylist())]
    place = embedded.table.column_names.index("group")
    table = embedded.table.set_column(place, "group", pa.array(group))
    fewer = next(measure_task(replace(embedded, table=table), embedded.vectors, [12], TASK))
    asked = sum(embedded.table["view"][i].as_py() == "front" for i in UNKNOWN)
    assert 0 < asked < len(UNKNOWN)
    assert fewer["queries"] == known["queries"] - asked
    assert fewer["database"] == known["database"]


def run(root: str, artifacts: list[Artifact], **settings: Any) -> Artifact:
    values = {"tasks": {"product": TASK, "category": TASK.model_copy(update={"label": "category"})}, "dims": [4, 64]}
    config = EvaluateConfig.model_validate(values | settings)
    return execute(STAGE, config, {"embeddings": artifacts}, root, "evaluate")


def test_the_report_holds_every_embedding_method_and_dim(tmp_path: Path) -> None:
    root = str(tmp_path)
    subject, twin = publish(root, "vectors", vectors()), publish(root, "twin", vectors(dim=6))
    artifact = run(root, [subject, twin], svd_of=["twin"], svd_fit={"split": ["train"]})
    report = artifact.read_json("report.json")
    assert {(r["embedding"], r["method"], r["task"], r["dim"]) for r in report["rows"]} == {
        (name, method, task, dim)
        for task in ("product", "category")
        for name, method, dims in (("vectors", "prefix", (4, 12)), ("twin", "prefix", (4, 6)), ("twin", "svd", (4, 6)))
        for dim in dims
    }
    assert (report["subject"], report["headline_task"]) == ("vectors", "product")
    assert {name: row["dim"] for name, row in report["full_dim"].items()} == {"vectors": 12, "twin": 6}
    full = {
        r["method"]: r["p_at_1"]
        for r in report["rows"]
        if (r["embedding"], r["task"], r["dim"]) == ("twin", "product", 6)
    }
    assert full["svd"] == pytest.approx(full["prefix"])  # at full size the SVD is a rotation
    assert storage.read_bytes(artifact.path("product.png"))[:4] == b"\x89PNG"
    json.dumps(artifact.stats)


def test_reductions_are_measured_as_brute_force_measures_them(tmp_path: Path) -> None:
    subject, other = publish(str(tmp_path), "vectors", vectors()), publish(str(tmp_path), "other", vectors(dim=6))
    run_ = run(str(tmp_path), [subject, other], dims=[3], random_of=["vectors"], jl_of=["vectors"], seed=5)
    rows = [r for r in run_.read_json("report.json")["rows"] if r["task"] == "product"]
    assert {(r["embedding"], r["method"], r["dim"]) for r in rows} == {
        *(("vectors", method, dim) for method in ("prefix", "random", "jl") for dim in (3, 12)),
        *(("other", "prefix", dim) for dim in (3, 6)),
    }
    for row in rows:
        if row["method"] != "prefix":
            reduced = REDUCTIONS[row["method"]](vectors(), vectors(), 5)
            assert row["p_at_1"] == pytest.approx(brute_force(corpus(), reduced, row["dim"])["p_at_1"])
    full = {r["method"]: r["recall_at_10"] for r in rows if r["dim"] == 12}
    assert full["random"] == full["prefix"]  # all features in another order


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"svd_of": ["twn"]}, r"svd_of names \['twn'\]; the embeddings are \['vectors'\]"),
        ({"jl_of": ["twn"]}, r"jl_of names \['twn'\]; the embeddings are \['vectors'\]"),
        ({"tasks": {"t": TASK.model_copy(update={"label": "grup"})}}, r"task label 'grup' .*did you mean 'group'"),
        ({"tasks": {"t": TASK.model_copy(update={"queries": {"vew": ["front"]}})}}, r"names column 'vew'.*view"),
        ({"tasks": {"t": TASK.model_copy(update={"queries": {"view": ["back"]}})}}, r"queries .*back.* select no row"),
    ],
)
def test_mistakes_are_explained(tmp_path: Path, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        run(str(tmp_path), [publish(str(tmp_path), "vectors", vectors())], **settings)


def test_selecting_rows() -> None:
    table = corpus()
    chosen = select_rows(table, {"view": ["front"], "split": ["test"]})
    expected = [r["image_id"] for r in table.to_pylist() if r["view"] == "front" and r["split"] == "test"]
    assert chosen["image_id"].to_pylist() == expected
    numbers = row_indices(table, {"view": ["front"], "split": ["test"]}, "queries")
    assert table["image_id"].take(pa.array(numbers)).to_pylist() == expected


def test_an_empty_selection_still_makes_a_part(tmp_path: Path) -> None:
    part = str(tmp_path / "part-0.parquet")
    write_part(part, embedding_table(corpus()[:0], np.empty((0, 8), np.float32), "float32"))
    assert sum(unit.num_rows for unit in list_row_groups([part])) == 0
