"""The stage ``classify``: figures from artifacts, against scikit-learn; what is wrong is said before a step runs."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from sklearn.linear_model import Ridge
from sklearn.neighbors import NearestCentroid

from lookalike import storage
from lookalike.artifacts import Artifact, Draft
from lookalike.errors import UsageError
from lookalike.stages import execute
from lookalike.train.evaluate.classify import STAGE, ClassifyConfig
from lookalike.train.evaluate.embed import embedding_table, write_part

NUM, DIM = 600, 32


def make(root: Path, **changed: list[Any]) -> tuple[Artifact, np.ndarray, pa.Table]:
    """Five noisy classes whose first numbers say least, four pictures a product."""
    random = np.random.default_rng(4)
    category = np.repeat(random.integers(0, 5, NUM // 4), 4)
    data = random.normal(size=(5, DIM))[category] * 0.6 + random.normal(size=(NUM, DIM))
    columns = {
        "image_id": [f"i{n:04d}" for n in range(NUM)],
        "group": [f"g{n // 4}" for n in range(NUM)],
        "view": ["front"] * NUM,
        "split": ["test" if n // 4 % 3 == 0 else "train" for n in range(NUM)],
        "dataset": ["d"] * NUM,
        "category": [f"c{c}" for c in category],
        "title": ["t"] * NUM,
    }
    table = pa.table({**columns, **changed})
    draft = Draft(str(root), "embeddings", "vectors", "v" * 20)
    write_part(draft.path("part-00000.parquet"), embedding_table(table, data.astype(np.float32), "float32"))
    draft.write_json("meta.json", {"dim": DIM, "dims": [8, 16, DIM], "rows": NUM})
    return draft.publish(config={}, parents={}, stage_version=1, duration_s=0.0), data.astype(np.float32), table


def report_of(root: Path, artifact: Artifact, **settings: Any) -> dict[str, Any]:
    config = ClassifyConfig.model_validate({"label": "category", "shots": (1, 10), **settings})
    done = execute(STAGE, config, {"embeddings": [artifact]}, str(root), "classify")
    assert storage.exists(done.path("accuracy.png"))
    return json.loads(storage.read_bytes(done.path("report.json")))


def test_figures_are_those_of_scikit_learn(tmp_path: Path) -> None:
    artifact, data, table = make(tmp_path)
    report = report_of(tmp_path, artifact)
    sizes = report["sizes"]["vectors"]
    assert (sizes["classes"], sizes["fit"] + sizes["holdout"], sizes["test"], sizes["test_groups"]) == (5, 400, 200, 50)
    assert sizes["holdout"] % 4 == 0  # products are held out whole
    y, is_test = np.array(table["category"].to_pylist()), np.array(table["split"].to_pylist()) == "test"
    rows = {(r["method"], r.get("dim"), r.get("shots")): r for r in report["rows"]}
    unit = {dim: data[:, :dim] / np.linalg.norm(data[:, :dim], axis=1, keepdims=True) for dim in (8, 16, DIM)}
    for dim, x in unit.items():
        found = rows["ridge", dim, None]
        assert found["top_1_low"] < found["top_1"] < found["top_1_high"]
        assert found["top_1"] <= found["top_5"] == 1.0  # of five classes
        assert 0 < rows["softmax", dim, None]["calibration_error"] < 0.3
        # with all training rows in place of four fifths of them the figures differ a little
        oracle = Ridge(alpha=found["penalty"] * 400).fit(x[~is_test], (y[~is_test, None] == np.unique(y)).astype(float))
        accuracy = np.mean(np.unique(y)[oracle.predict(x[is_test]).argmax(axis=1)] == y[is_test])
        assert found["top_1"] == pytest.approx(accuracy, abs=0.08)
    assert rows["class_mean", DIM, 1]["top_1"] < rows["class_mean", DIM, 10]["top_1"] < 1
    assert rows["class_mean", 8, 10]["classes_with_all"] == 5


def test_all_shots_are_the_class_means_of_all_training_rows(tmp_path: Path) -> None:
    artifact, data, table = make(tmp_path)
    report = report_of(tmp_path, artifact, shots=(1000,), dims=(16,), draws=2)
    x = data[:, :16] / np.linalg.norm(data[:, :16], axis=1, keepdims=True)
    y, is_test = np.array(table["category"].to_pylist()), np.array(table["split"].to_pylist()) == "test"
    accuracy = NearestCentroid().fit(x[~is_test], y[~is_test]).score(x[is_test], y[is_test])
    (row,) = [row for row in report["rows"] if row.get("shots") == 1000 and row["dim"] == 16]
    assert row["top_1"] == row["top_1_least"] == row["top_1_most"] == pytest.approx(accuracy)
    assert row["classes_with_all"] == 0


def test_training_rows_are_bounded(tmp_path: Path) -> None:
    artifact, *_ = make(tmp_path)
    sizes = report_of(tmp_path, artifact, max_rows=120)["sizes"]["vectors"]
    assert (sizes["fit"] + sizes["holdout"], sizes["test"]) == (120, 200)


def test_cascades_spend_fewer_dims_and_lie_below_the_oracle(tmp_path: Path) -> None:
    artifact, *_ = make(tmp_path)
    rows = report_of(tmp_path, artifact)["rows"]
    small, full = [row for row in rows if row["method"] == "cascade"]
    assert (small["dims"], full["dims"]) == ([8, 16], [8, 16, DIM])
    assert small["thresholds"] == full["thresholds"][:1]
    assert 8 <= full["expected_dim"] <= DIM
    assert full["expected_dim"] <= full["expected_dims_tried"] <= 8 + 16 + DIM
    (oracle,) = [row for row in rows if row["method"] == "oracle"]
    assert sum(oracle["first_right"]) == pytest.approx(oracle["top_1"])
    assert oracle["top_1"] >= max(row["top_1"] for row in rows if row["method"] in {"cascade", "softmax", "majority"})


def test_the_figures_do_not_depend_on_the_order_of_rows(tmp_path: Path) -> None:
    artifact, data, table = make(tmp_path)
    expected = report_of(tmp_path, artifact)
    order = np.random.default_rng(0).permutation(NUM)
    draft = Draft(str(tmp_path), "embeddings", "vectors", "w" * 20)
    write_part(draft.path("part-00000.parquet"), embedding_table(table.take(order), data[order], "float32"))
    draft.write_json("meta.json", {"dim": DIM, "dims": [8, 16, DIM], "rows": NUM})
    assert report_of(tmp_path, draft.publish(config={}, parents={}, stage_version=1, duration_s=0.0)) == expected


@pytest.mark.parametrize(
    ("settings", "changed", "words"),
    [
        ({"label": "catgory"}, {}, "names column 'catgory'.*category"),
        ({"group": "product"}, {}, "names column 'product'"),
        ({"test": {"split": ["val"]}}, {}, r"test \{'split': \['val'\]\} select no row"),
        ({"test": {"view": ["front"]}}, {}, r"share 400 rows; select by split"),
        ({"label": "dataset"}, {}, "the training rows have 1 classes of 'dataset'; classifying takes two"),
        ({}, {"category": [None] * NUM}, "the training rows have 0 classes"),
        ({}, {"category": [f"c{n // 4 % 3}" if n // 4 % 3 else "other" for n in range(NUM)]}, "no test row has a"),
        ({"group": "dataset"}, {}, "leaves a part empty"),
    ],
)
def test_what_cannot_be_classified_is_said(
    tmp_path: Path, settings: dict[str, Any], changed: dict[str, Any], words: str
) -> None:
    artifact, *_ = make(tmp_path, **changed)
    with pytest.raises(UsageError, match=words):
        report_of(tmp_path, artifact, **settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"penalties": (0.0,)}, "must be above 0"),
        ({"shots": (5, 1)}, "must be positive and increasing"),
        ({"holdout": 0.9}, "holdout"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ClassifyConfig.model_validate({"label": "category", **settings})
