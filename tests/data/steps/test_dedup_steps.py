"""The steps on Ray: one task or cells, shuffles or not, embeddings in order or not, stopped or not: the same rows."""

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from lookalike import storage
from lookalike.artifacts import Artifact, Draft
from lookalike.data import labels
from lookalike.data.duplicates.copies import DUPLICATES
from lookalike.data.steps import duplicates, exchange, fates, signing
from lookalike.data.steps.job import LabelJob, LabelsConfig
from lookalike.errors import UsageError
from lookalike.stages import StageRun, execute
from tests.data.conftest import make_rows, publish_corpus, publish_embeddings
from tests.data.test_labels import SETTINGS

pytestmark = pytest.mark.ray
ROWS = 160


def pictures() -> list[dict[str, Any]]:
    """Shapes with copies, re-encoded copies and three splits; copies lie in other parts than what they copy."""
    rows = make_rows(ROWS, seed=3)
    rng = np.random.default_rng(0)
    for number in range(60, ROWS, 2):
        source = rows[int(rng.integers(0, number))]
        rows[number] |= {"image": source["image"], "title": source["title"]}
        if number % 4 == 0:
            buffer = io.BytesIO()
            Image.open(io.BytesIO(source["image"])).convert("RGB").save(buffer, "JPEG", quality=85 + number % 10)
            rows[number]["image"] = buffer.getvalue()
    for number, row in enumerate(rows):
        row["split"] = "train" if number % 8 else ("val" if number % 16 else "test")
        row["group"] = f"p{number // 20}" if number % 5 == 2 else None
    return rows


def publish(root: str, parts: int, order: Any = None) -> dict[str, list[Artifact]]:
    rows = pictures()
    embeddings = publish_embeddings(root, rows, 1 if order is not None else 3)
    if order is not None:  # its one file must be matched by id
        uri = embeddings.files("part-")[0]
        pq.write_table(pq.read_table(uri).take(order), uri)
    return {"corpus": [publish_corpus(root, rows, parts)], "embeddings": [embeddings]}


def job_of(root: str, given: dict[str, list[Artifact]], **dedup: Any) -> LabelJob:
    draft = Draft(root, "labels", "labels", "0" * 20)
    storage.make_directory(draft.uri)
    base = {"sure_cosine": 0.9, "min_cosine": 0.8}
    return LabelJob(StageRun(LabelsConfig.model_validate({"dedup": base | dedup}), given, draft))


def result(job: LabelJob) -> tuple[dict[str, Any], list[dict[str, Any]], list[str]]:
    splits = job.once("sign", signing.sign)["splits"]
    stats = job.once("duplicates", duplicates.find, splits)
    names = storage.list_files(job.out.path("duplicates.parquet"))
    tables = [pq.read_table(job.out.path("duplicates.parquet", name)) for name in names]
    assert all(table.schema.equals(DUPLICATES) for table in tables)
    return stats, [row for table in tables for row in table.to_pylist()], names


@pytest.fixture(scope="module")
def whole(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """All pictures in one part, compared by one task."""
    root = str(tmp_path_factory.mktemp("whole"))
    return result(job_of(root, publish(root, 1)))[:2]


def test_counts_add_up(whole: tuple[dict[str, Any], list[dict[str, Any]]]) -> None:
    stats, rows = whole
    assert sum(stats["rows"].values()) == ROWS
    assert stats["dropped"] == len(rows) == sum(stats["reasons"].values())
    assert stats["kept"] == stats["rows"]["train"] - len(rows)
    assert stats["overlaps"] == {split: sum(r["split"] == split for r in rows) for split in ("test", "val")}
    assert sum(stats["overlaps"].values()) == stats["reasons"]["overlaps_test"]
    assert set(stats["reasons"]) == {"duplicate", "near_duplicate", "overlaps_test", "group_in_test"}
    assert min(stats["reasons"].values()) >= 3


@pytest.mark.parametrize("pairs_in_task", [10**6, 0])
def test_one_cell_over_parts_finds_what_one_task_finds(
    pairs_in_task: int, whole: tuple[Any, Any], root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fates, "PAIRS_IN_TASK", pairs_in_task)
    order = np.random.default_rng(1).permutation(ROWS)
    stats, rows, names = result(job_of(root, publish(root, 4, order), exact_rows=0, cell_rows=1000))
    assert (stats, rows) == whole
    assert names == [f"part-{number:06d}.parquet" for number in range(4)]


@pytest.mark.soak
def test_shuffles_give_what_single_tasks_give_in_several_cells(
    whole: tuple[Any, Any], root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = {"exact_rows": 0, "cell_rows": 40, "probes": 2}
    one = result(job_of(root, publish(root, 1), **cells))[:2]
    monkeypatch.setattr(exchange, "LOCAL_ROWS", 0)
    monkeypatch.setattr(exchange, "ROWS_PER_PARTITION", 100)
    other = str(tmp_path / "other")
    assert result(job_of(other, publish(other, 5), **cells))[:2] == one
    found, exact = ({row["image_id"] for row in rows} for _, rows in (one, whole))
    assert len(found & exact) >= 0.9 * len(exact)


def test_a_stopped_search_keeps_its_finished_cells(
    whole: tuple[Any, Any], root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_of(root, publish(root, 3), exact_rows=0, cell_rows=1000)
    monkeypatch.setattr(fates, "send_fates", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        result(job)
    monkeypatch.undo()
    marks = {name: storage.read_bytes(job.out.work(name)) for name in storage.list_files(job.out.work())}
    for marker in ("sign.json", "copies.json", "cells.json", "pairs.json", "fates.json"):
        storage.resolve(job.out.work(marker))[0].rm_file(job.out.work(marker))  # as if killed before each was written
    before = {
        name: os.stat(job.out.work(name)).st_mtime_ns
        for name in marks
        if name.startswith(("pairs/", "sign")) and name.endswith(".parquet")
    }
    assert result(job)[:2] == whole
    assert {name: os.stat(job.out.work(name)).st_mtime_ns for name in before} == before


def test_labelled_pairs_are_looked_up_and_judged(whole: tuple[Any, Any], root: str, tmp_path: Path) -> None:
    rows = pictures()
    copies = [row for row in whole[1] if row["keeper_id"] is not None][:20]
    lines = [f"{row['image_id']},{row['keeper_id']},1" for row in copies]
    lines += [f"id-0000,id-{number:04d},0" for number in range(1, 60) if rows[number]["image"] != rows[0]["image"]]
    (tmp_path / "pairs.csv").write_text("\n".join(["left,right,duplicate", *lines]) + "\n")
    given = publish(root, 2)
    stats = result(job_of(root, given, labelled_pairs=str(tmp_path / "pairs.csv")))[0]["labelled"]
    assert (stats["pairs"], stats["duplicates"]) == (len(lines), 20)
    assert stats["recall"] == 1
    assert stats["recall_at_p95"] > 0.9
    (tmp_path / "pairs.csv").write_text("left,right,duplicate\nid-0000,nobody,1\n")
    with pytest.raises(UsageError, match="1 images that are not in the corpus, 'nobody' for one"):
        duplicates.judge_labelled(job_of(root, given, labelled_pairs=str(tmp_path / "pairs.csv")))


@pytest.mark.parametrize("text", ["left,right\na,b\n", "left,right,duplicate\na,,1\n", "left,right,duplicate\na,b,x\n"])
def test_a_table_that_holds_no_labelled_pairs_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "pairs.csv").write_text(text)
    with pytest.raises(UsageError, match=r"labelled_pairs .*pairs\.csv"):
        duplicates.read_labelled(str(tmp_path / "pairs.csv"))


def test_copies_may_stay_but_the_firewall_stands(ray_session: None, root: str) -> None:
    rows = make_rows(120)
    rows[11]["image"] = rows[10]["image"]  # row 10 is held out: its copy is a leak
    given = {"corpus": [publish_corpus(root, rows, 2)], "embeddings": [publish_embeddings(root, rows, 2)]}
    settings = {**SETTINGS, "dedup": {"within_train": False}}
    made = execute(labels.STAGE, labels.LabelsConfig.model_validate(settings), given, root, "labels")
    assert set(made.stats["duplicates"]["reasons"]) == {"overlaps_test"}
    assert made.stats["duplicates"]["dropped"] >= 1
