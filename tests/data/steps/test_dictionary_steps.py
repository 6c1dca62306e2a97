"""The visual dictionary step on Ray: however it is cut, shuffled, resumed or continued, the scores are the same."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from lookalike import storage
from lookalike.artifacts import Draft
from lookalike.data.parts import read_table
from lookalike.data.steps import dictionary, duplicates, signing, text
from lookalike.data.steps.job import LabelJob, LabelsConfig
from lookalike.errors import UsageError
from lookalike.stages import StageRun
from tests.data.conftest import make_rows, publish_corpus, publish_embeddings

pytestmark = pytest.mark.ray
SETTINGS: dict[str, Any] = {"annotations": {"min_images": 4}, "dictionary": {"positives": 48, "terms_per_task": 2}}


def make_job(given: dict[str, Any], root: str, previous: Draft | None = None, **more: Any) -> LabelJob:
    settings = {**SETTINGS, "dictionary": {**SETTINGS["dictionary"], **more}}
    inputs = {**given, "previous": [] if previous is None else [previous]}
    return LabelJob(StageRun(LabelsConfig.model_validate(settings), inputs, Draft(root, "labels", "x", "0" * 20)))


def splits_of(job: LabelJob) -> dict[str, int]:
    return dict(job.once("sign", signing.sign)["splits"])


def score(job: LabelJob) -> dict[str, Any]:
    return dictionary.score(job, splits_of(job), {})


@pytest.fixture(scope="module")
def annotated(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """Inputs, and the root of a draft that has everything up to the annotations."""
    root, rows = str(tmp_path_factory.mktemp("annotated")), make_rows(240)
    given = {"corpus": [publish_corpus(root, rows, 4)], "embeddings": [publish_embeddings(root, rows, 2)]}
    job = make_job(given, root)
    storage.make_directory(job.out.uri)
    job.once("duplicates", duplicates.find, splits_of(job))
    job.once("vocabulary", text.mine)
    job.once("annotations", text.annotate_all)
    return given, root


def copy(annotated: tuple[dict[str, Any], str], folder: Path, **more: Any) -> LabelJob:
    shutil.copytree(Path(annotated[1]) / "labels", folder / "labels")
    return make_job(annotated[0], str(folder), **more)


def dictionary_of(job: LabelJob) -> pa.Table:
    return read_table(job.out.path("dictionary.parquet"))


@pytest.fixture(scope="module")
def scored(annotated: tuple[dict[str, Any], str], tmp_path_factory: pytest.TempPathFactory) -> tuple[LabelJob, Any]:
    job = copy(annotated, tmp_path_factory.mktemp("scored"))
    return job, score(job)


def test_every_term_is_scored_or_too_few(scored: tuple[LabelJob, dict[str, Any]]) -> None:
    job, stats = scored
    table = dictionary_of(job)
    assert table["term"].to_pylist() == sorted(job.vocabulary())
    assert stats["terms"] == stats.get("kept", 0) + stats.get("abstract", 0) + stats.get("too_few", 0)
    assert (stats["trained"], stats["reused"]) == (table["digest"].drop_null().length(), 0)
    assert stats["trained"] >= 7
    assert len(job.work_items("scores-9")) >= 4


def test_shuffle_limits_and_size_of_buckets_change_nothing(
    scored: tuple[LabelJob, Any], annotated: tuple[dict[str, Any], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way of a large corpus: limits first, then a shuffle by bucket; and all terms in one bucket."""
    one = copy(annotated, tmp_path / "one", terms_per_task=1000)
    assert score(one) == scored[1]
    monkeypatch.setattr(dictionary, "FEW_SPANS", 1)
    monkeypatch.setattr("lookalike.data.steps.exchange.LOCAL_ROWS", 0)
    large = copy(annotated, tmp_path / "large", terms_per_task=3)
    assert score(large) == scored[1]
    assert dictionary_of(large).equals(dictionary_of(scored[0]))
    assert dictionary_of(one).equals(dictionary_of(scored[0]))
    bucket = large.work_items("sketch-6")[0]["uri"]
    assert read_table(bucket)["key"].to_pylist() == sorted(read_table(bucket)["key"].to_pylist())


def test_a_run_that_was_cut_off_scores_what_is_missing(scored: tuple[LabelJob, Any], tmp_path: Path) -> None:
    job, stats = scored
    shutil.copytree(Path(job.out.root) / "labels", tmp_path / "labels")
    again = make_job({"corpus": [job.corpus], "embeddings": [job.embeddings]}, str(tmp_path))
    first, *others = (item["uri"] for item in again.work_items("scores-9"))
    os.remove(first)
    os.remove(again.out.path("dictionary.parquet"))
    before = [os.stat(uri).st_mtime_ns for uri in others]
    assert score(again) == stats
    assert dictionary_of(again).equals(dictionary_of(job))
    assert [os.stat(uri).st_mtime_ns for uri in others] == before


def test_with_earlier_labels_only_changed_terms_train(
    scored: tuple[LabelJob, Any], annotated: tuple[dict[str, Any], str], tmp_path: Path
) -> None:
    same = copy(annotated, tmp_path / "same", previous=scored[0].out)
    stats = score(same)
    assert (stats["trained"], stats["reused"]) == (0, scored[1]["trained"])
    assert dictionary_of(same).equals(dictionary_of(scored[0]))
    results = []
    for name, previous in (("fresh", None), ("continued", scored[0].out)):
        job = copy(annotated, tmp_path / name, previous=previous)
        part = job.out.path("annotations.parquet/part-000000.parquet")
        table = read_table(part)
        red = pc.equal(table["term"], "magick")
        pq.write_table(table.filter(pc.invert(red)), part)  # in this part no image is called so any more
        results.append((score(job), dictionary_of(job)))
    (fresh, expected), (continued, found) = results
    assert found.equals(expected)
    old = dict(zip(*(dictionary_of(scored[0])[name].to_pylist() for name in ("term", "digest")), strict=True))
    new = dict(zip(*(found[name].to_pylist() for name in ("term", "digest")), strict=True))
    changed = [term for term, digest in new.items() if digest is not None and digest != old[term]]
    assert "magick" in changed
    assert continued["trained"] == len(changed) < fresh["trained"]
    assert continued["trained"] + continued["reused"] == fresh["trained"]


def test_the_boundary_from_retrieval_and_from_words(scored: tuple[LabelJob, Any], tmp_path: Path) -> None:
    job, stats = scored
    shutil.copytree(Path(job.out.root) / "labels", tmp_path / "labels")
    given = {"corpus": [job.corpus], "embeddings": [job.embeddings]}
    chosen = {"criterion": "retrieval", "split": "test", "images": 100}
    found = score(make_job(given, str(tmp_path), boundary_from=chosen))
    assert found["criterion"] == "P@1 of the validation images"
    assert found["queries"] == sum(row["split"] == "test" and row["category"] is not None for row in make_rows(240))
    values = {row["boundary"]: row["value"] for row in found["curve"]}
    assert found["boundary"] in values
    assert values[found["boundary"]] >= max(values.values()) - found["standard_error"] - 1e-9
    assert max(values.values()) > 0.8
    assert sum(found.get(name, 0) for name in ("kept", "abstract", "too_few")) == found["terms"]
    assert json.loads(json.dumps(found)) == found
    words = tmp_path / "words.csv"
    words.write_text("term,concrete\ncircle,1\nred,1\nmagick,0\n")
    with pytest.raises(UsageError, match="2 concrete and 1 abstract"):
        score(make_job(given, str(tmp_path), boundary_from={"criterion": "words", "words": str(words)}))
    with pytest.raises(UsageError, match="0 images that share"):
        score(make_job(given, str(tmp_path), boundary_from={"criterion": "retrieval"}))
    assert stats["boundary"] == 0.65
