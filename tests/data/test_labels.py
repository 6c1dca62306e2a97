from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lookalike import storage
from lookalike.artifacts import Artifact, Draft
from lookalike.data import labels, shards
from lookalike.errors import UsageError
from lookalike.schemas import SHARD
from lookalike.stages import execute, fingerprint
from tests.data.conftest import make_rows, publish_corpus, publish_embeddings

SETTINGS: dict[str, Any] = {
    "annotations": {"min_images": 4},
    "dictionary": {"positives": 48, "min_units": 6, "terms_per_task": 4},
    "min_images_per_label": 4,
    "report": {"labels": 3, "dropped_terms": 2, "images": 4},
}


LABELS = labels.LabelsConfig.model_validate(SETTINGS)


def inputs(root: str, parts: int) -> dict[str, list[Artifact]]:
    rows = make_rows(240)
    return {"corpus": [publish_corpus(root, rows, parts)], "embeddings": [publish_embeddings(root, rows, 5 - parts)]}


def content(artifact: Artifact, folder: str) -> list[dict[str, Any]]:
    return [
        row
        for uri in artifact.files(folder)
        if uri.endswith(".parquet")
        for row in pq.ParquetFile(uri).read().to_pylist()
    ]


@pytest.fixture(scope="module")
def built(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Artifact]]:
    """Labels and shards of the same rows in one part and in four."""
    results = []
    for parts in (1, 4):
        root = str(tmp_path_factory.mktemp(f"parts{parts}"))
        given = inputs(root, parts)
        made = execute(labels.STAGE, LABELS, given, root, "labels")
        config = shards.ShardsConfig(rows_per_shard=60, min_images_per_category=1, categories="all")
        cut = execute(shards.STAGE, config, {"corpus": given["corpus"], "labels": [made]}, root, "shards")
        results.append({"labels": made, "shards": cut, **{key: value[0] for key, value in given.items()}})
    return results


@pytest.mark.ray
def test_results_do_not_depend_on_the_number_of_parts(built: list[dict[str, Artifact]]) -> None:
    one, four = (made["labels"] for made in built)
    for folder in ("annotations", "dictionary", "clusters", "image_labels", "duplicates"):
        assert content(one, folder) == content(four, folder), folder
        assert content(one, folder)
    assert one.read_json("classes.json") == four.read_json("classes.json")
    assert one.stats == four.stats
    assert {f.path: f.sha256 for f in built[0]["shards"].manifest.files} == {
        f.path: f.sha256 for f in built[1]["shards"].manifest.files
    }


@pytest.mark.ray
def test_visible_words_become_labels_and_the_others_do_not(built: list[dict[str, Artifact]]) -> None:
    made = built[0]["labels"]
    status = {row["term"]: row["status"] for row in content(made, "dictionary")}
    assert all(status[term] == "kept" for term in ("circle", "square", "triangle", "red", "green", "blue"))
    assert status["magick"] == "abstract"
    assert all(row["spelling"] == row["term"] for row in content(made, "dictionary"))
    terms = {term for entry in made.read_json("classes.json") for term in entry["terms"]}
    assert {"circle", "square", "triangle"} <= terms
    assert "magick" not in terms
    assert [row["labels"] >= 1 for row in made.stats["ablation"]] == [True, True, True]


@pytest.mark.ray
def test_test_rows_and_copies_train_nothing(built: list[dict[str, Artifact]]) -> None:
    rows = {row["image_id"]: row for row in make_rows(240)}
    labelled = [row["image_id"] for row in content(built[0]["labels"], "image_labels")]
    dropped = {row["image_id"] for row in content(built[0]["labels"], "duplicates")}
    held_out = {image_id for image_id, row in rows.items() if row["split"] == "test"}
    assert len(dropped) >= 3
    assert set(labelled) == set(rows) - held_out - dropped
    pictures = [rows[image_id]["image"] for image_id in labelled]
    assert len(set(pictures)) == len(pictures)
    assert not set(pictures) & {rows[image_id]["image"] for image_id in held_out}


@pytest.mark.ray
def test_shards_hold_every_training_row_once_with_its_classes(built: list[dict[str, Artifact]]) -> None:
    made = built[1]["shards"]
    rows = content(made, "shapes/part-")
    source = {row["image_id"]: row for row in make_rows(240)}
    labels_of = {row["image_id"]: row["labels"] for row in content(built[1]["labels"], "image_labels")}
    classes = made.read_json("classes.json")
    assert sorted(row["image_id"] for row in rows) == sorted(labels_of)
    frequency = np.array(classes["label_frequency"])
    for row in rows:
        origin = source[row["image_id"]]
        assert (row["image"], row["labels"]) == (origin["image"], labels_of[row["image_id"]])
        assert classes["category"][row["category"]] == origin["category"]
        assert row["group"] == -1
        best = max((max(1.0, (0.01 / frequency[label]) ** 0.5) for label in row["labels"]), default=1.0)
        assert row["repeat"] == pytest.approx(best, rel=1e-5)
    assert [row["image_id"] for row in rows] != sorted(row["image_id"] for row in rows)
    files = [pq.ParquetFile(uri) for uri in made.files("shapes/part-")]
    assert len(files) == 4
    assert all(file.schema_arrow.equals(SHARD) for file in files)


@pytest.mark.ray
def test_the_report_shows_what_was_kept_and_dropped(built: list[dict[str, Artifact]]) -> None:
    made = built[0]["labels"]
    html = storage.read_bytes(made.path("report.html")).decode()
    assert "+ visual dictionary" in html
    assert "magick - held-out accuracy" in html
    named = {part.split('"')[0] for part in html.split('src="')[1:]}
    assert named == {f.path for f in made.manifest.files if f.path.endswith(".png")}


@pytest.mark.ray
@pytest.mark.parametrize("interrupted", ["dictionary"])
def test_an_interrupted_run_continues_to_the_same_result(
    interrupted: str, built: list[dict[str, Artifact]], root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, done = labels.LabelsConfig.model_validate(SETTINGS), built[1]
    given = {key: [done[key]] for key in ("corpus", "embeddings")}
    ran: list[str] = []
    original = labels.LabelJob.once

    def once(self: labels.LabelJob, name: str, step: Any, *inputs: Any) -> Any:
        def work(job: labels.LabelJob) -> Any:
            ran.append(name)
            return step(job, *inputs)

        result = original(self, name, work)
        if name == interrupted and ran.count("crash") == 0:
            ran.append("crash")
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(labels.LabelJob, "once", once)
    with pytest.raises(KeyboardInterrupt):
        execute(labels.STAGE, config, given, root, "labels")
    draft = Draft(root, "labels", "labels", fingerprint(labels.STAGE, config, given))
    assert not storage.exists(draft.path("manifest.json"))
    again = execute(labels.STAGE, config, given, root, "labels")
    assert ran.count(interrupted) == 1
    assert [f.model_dump() for f in again.manifest.files] == [f.model_dump() for f in done["labels"].manifest.files]
    assert again.stats == done["labels"].stats


@pytest.mark.ray
def test_embeddings_of_another_corpus_are_refused(built: list[dict[str, Artifact]], root: str) -> None:
    rows = make_rows(240)
    given = {"corpus": [built[0]["corpus"]], "embeddings": [publish_embeddings(root, rows[:200], 1)]}
    with pytest.raises(UsageError, match="40 images of the corpus have no embedding, 'id-0200' for one"):
        execute(labels.STAGE, labels.LabelsConfig.model_validate(SETTINGS), given, root, "other")


def test_categories_that_are_no_classes_are_counted_and_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    columns = {"category": ["sofa", "sofa", "cat", "cat", "cat", None], "group": ["p", "q", None, None, None, None]}
    rows = pa.table({"dataset": ["d"] * 6, **columns, "labels": [[0], [], [], [], [], []]})
    expected = {  # rule, least images -> classes, rows left out
        ("all", 1): (["cat", "sofa"], {}),
        ("all", 3): (["cat"], {"too_few_images": 2}),
        ("grouped", 1): (["sofa"], {"no_group": 3}),
        ("grouped", 3): ([], {"no_group": 3, "too_few_images": 2}),
        ("none", 1): ([], {"categories_none": 5}),
    }
    assert shards.ShardsConfig().categories == "all"
    for (rule, least), (names, left_out) in expected.items():
        census = {(r["kind"], r["name"]): r["images"] for r in shards.take_census(rows, rule).to_pylist()}
        config = shards.ShardsConfig.model_validate({"categories": rule, "min_images_per_category": least})
        classes = shards.Classes(census, 1, config, 1)
        caplog.clear()
        assert (classes.categories, shards.categories_left_out(census, classes)) == (names, left_out)
        assert bool(left_out) == ("categories: all keeps rows without a group" in caplog.text)


@pytest.mark.ray
def test_without_words_copies_go_all_the_same_and_classes_are_the_corpus_own(ray_session: None, tmp_path: Path) -> None:
    """What trains is what trains with words; a later run with words starts from nothing."""
    rows = [{**row, "title": None, "keywords": None, "group": f"g{n // 4}"} for n, row in enumerate(make_rows(240))]
    given = {
        "corpus": [publish_corpus(str(tmp_path), rows, 2)],
        "embeddings": [publish_embeddings(str(tmp_path), make_rows(240), 3)],
    }
    settings = labels.LabelsConfig.model_validate({"words": False})
    made = execute(labels.STAGE, settings, given, str(tmp_path), "labels")
    labelled = content(made, "image_labels")
    dropped = {row["image_id"] for row in content(made, "duplicates")}
    assert len(dropped) >= 3
    assert {row["image_id"] for row in labelled} == {r["image_id"] for r in rows if r["split"] == "train"} - dropped
    assert all(row["labels"] == [] == row["interests"] for row in labelled)
    assert made.read_json("classes.json") == []
    assert (made.stats["images"], made.stats["labels"]) == (len(labelled), 0)
    config = shards.ShardsConfig(rows_per_shard=60)
    cut = execute(shards.STAGE, config, {"corpus": given["corpus"], "labels": [made]}, str(tmp_path), "shards")
    classes = cut.read_json("classes.json")
    group_of = {row["image_id"]: row["group"] for row in rows}
    groups = {group_of[row["image_id"]] for row in labelled}  # those of test rows are held out whole
    assert (classes["labels"], len(classes["category"]), set(classes["group"])) == ([], 3, groups)
    written = content(cut, "shapes/part-")
    assert sorted(row["image_id"] for row in written) == sorted(row["image_id"] for row in labelled)
    assert {(tuple(row["labels"]), row["repeat"]) for row in written} == {((), 1.0)}
    worded = inputs(str(tmp_path / "worded"), 1)
    again = execute(labels.STAGE, LABELS, {**worded, "previous": [made]}, str(tmp_path / "worded"), "labels")
    assert again.stats["carried_over"] == 0
    assert again.stats["labels"] > 0


@pytest.mark.ray
def test_pictures_without_words_are_told_the_setting(ray_session: None, tmp_path: Path) -> None:
    rows = [{**row, "title": None, "keywords": None, "category": None} for row in make_rows(60)]
    given = {
        "corpus": [publish_corpus(str(tmp_path), rows, 1)],
        "embeddings": [publish_embeddings(str(tmp_path), make_rows(60), 1)],
    }
    with pytest.raises(UsageError, match="check the text columns; pictures without words take words: false"):
        execute(labels.STAGE, LABELS, given, str(tmp_path), "labels")
