"""The corpus stage: the same rows for any cut and any accident, and every record accounted for."""

import io
import json
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from lookalike import storage
from lookalike.artifacts import Artifact
from lookalike.data.corpus import STAGE, CorpusConfig, count_left_out, merge_quarantine, plan_units, tally
from lookalike.data.sources.ingest import IDS, UnitFiles, check_unit, drop_repeated, find_repeated
from lookalike.errors import CorpusError
from lookalike.stages import execute
from tests.data.conftest import make_rows


def write_source(folder: str, row_group: int, rows: list[dict[str, Any]] | None = None) -> str:
    """A parquet source; the default one has every kind of bad record, and ids that repeat across row groups."""
    if rows is None:
        rows = make_rows(60)
        rows[5]["image"], rows[6]["image"], rows[7]["image"] = b"", rows[7]["image"][:100], b"no image at all"
        rows[20]["image_id"] = rows[45]["image_id"] = rows[3]["image_id"]
        rows[45]["title"] = "\x00"  # repaired first, then refused as a duplicate: told once
        rows[21]["image_id"] = None
        rows[30]["title"] = ""
    table = pa.table({key: [row[key] for row in rows] for key in ("image_id", "image", "title", "keywords", "split")})
    uri = f"{folder}/source.parquet"
    pq.write_table(table, uri, row_group_size=row_group)
    return uri


def build(root: str, uri: str, name: str = "c", rows_per_part: int = 2048, **settings: object) -> Artifact:
    source = {"uri": uri, "dataset": "shapes", **settings}
    config = CorpusConfig.model_validate({"sources": [source], "rows_per_part": rows_per_part})
    return execute(STAGE, config, {}, root, name)


def read(artifact: Artifact) -> list[dict[str, Any]]:
    return [row for uri in artifact.files("part-") for row in pq.ParquetFile(uri).read().to_pylist()]


def run_here(config: CorpusConfig, out: str) -> tuple[list[dict[str, Any]], dict[str, Any], list[dict[str, Any]]]:
    """Rows, statistics and quarantine of the stage's own functions, called one after the other without Ray."""
    places = UnitFiles(out, f"{out}/_work")
    items = plan_units(config)
    summaries = []
    for item in items:
        reader = config.reader(item["source"])
        summary = check_unit(item["number"], json.loads(item["unit"]), reader, places, config.checks)
        summaries.append({**summary, "source": item["source"]})
    repeated = find_repeated(pa.concat_tables([places.read("ids", item["number"], IDS) for item in items]))
    dropped: dict[int, Counter[str]] = {}
    for unit in sorted(set(repeated["unit"].to_pylist())):
        chosen = repeated.filter(pa.compute.equal(repeated["unit"], unit))
        for row in drop_repeated(chosen, places).to_pylist():
            dropped.setdefault(unit, Counter())[row["split"]] += row["rows"]
    counts = merge_quarantine(summaries, dropped, places, f"{out}/quarantine.parquet")
    parts = [name for name in storage.list_files(out) if name.startswith("part-")]
    rows = [row for name in parts for row in pq.ParquetFile(f"{out}/{name}").read().to_pylist()]
    stats = tally(config, summaries, dropped, counts, count_left_out(config, summaries, places))
    return rows, stats, pq.read_table(f"{out}/quarantine.parquet").to_pylist()


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_corpus_is_the_same_for_any_row_groups_and_loses_nothing(tmp_path: Path, root: str) -> None:
    small = build(root, write_source(f"{tmp_path}", 7), "small", rows_per_part=7)
    large = build(root, write_source(f"{tmp_path}", 1000), "large")
    assert len(small.files("part-")) == 9
    assert read(small) == read(large)
    assert (
        small.stats
        == large.stats
        == {
            "records": 60,
            "images": 54,
            "datasets": {"shapes": {"test": 4, "train": 50}},
            "quarantine_rows": 7,
            "passed_over": {},
            "refused": {
                "image: empty": 1,
                "image: not_an_image": 1,
                "image: truncated": 1,
                "image_id: duplicate": 2,
                "image_id: null": 1,
            },
            "repaired": {"title: empty": 1},
        }
    )
    assert small.stats["records"] == small.stats["images"] + sum(small.stats["refused"].values())
    bad = pq.ParquetFile(small.path("quarantine.parquet")).read().to_pylist()
    assert bad == pq.ParquetFile(large.path("quarantine.parquet")).read().to_pylist()
    assert [row["row"] for row in bad] == [5, 6, 7, 20, 21, 30, 45]
    assert {row["source"] for row in bad} == {f"{tmp_path}/source.parquet"}


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (number % 256, number // 256, 7)).save(buffer, "PNG")
    return buffer.getvalue()


IMAGES = [png(number) for number in range(40)]


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    ids=st.lists(st.sampled_from(["a", "b", "c", "d", "e", "f", None]), min_size=1, max_size=40),
    bad=st.sets(st.integers(0, 39)),
    cut=st.integers(0, 40),
    rows_per_part=st.integers(1, 9),
)
def test_of_acceptable_records_with_the_same_id_the_first_stays(
    tmp_path_factory: pytest.TempPathFactory, ids: list[str | None], bad: set[int], cut: int, rows_per_part: int
) -> None:
    folder = tmp_path_factory.mktemp("ids")
    rows = [
        {"image_id": name, "image": b"" if n in bad else IMAGES[n], "title": "" if n % 3 else "t"}
        for n, name in enumerate(ids)
    ]
    schema = pa.schema([("image_id", pa.string()), ("image", pa.binary()), ("title", pa.string())])
    for name, part in (("1", rows[:cut]), ("2", rows[cut:])):
        pq.write_table(pa.Table.from_pylist(part, schema=schema), f"{folder}/{name}.parquet", row_group_size=4)
    sources = [{"uri": f"{folder}/{name}.parquet", "dataset": f"d{name}"} for name in "12"]
    config = CorpusConfig.model_validate({"sources": sources, "rows_per_part": rows_per_part})
    expected: dict[str, int] = {}
    for number, name in enumerate(ids):
        if name is not None and number not in bad:
            expected.setdefault(name, number)
    got, stats, quarantine = run_here(config, f"{folder}/out")
    assert [(row["image_id"], row["image"]) for row in got] == [(name, IMAGES[n]) for name, n in expected.items()]
    refused = [(row["source"][-9:-8], row["row"]) for row in quarantine if not row["reason"].startswith("repaired")]
    lost = sorted(set(range(len(ids))) - set(expected.values()))
    empty = [("1", 0)] * (cut == 0), [("2", 0)] * (cut >= len(ids))  # a file without records has one row
    assert refused == [*empty[0], *(("1", n) if n < cut else ("2", n - cut) for n in lost), *empty[1]]
    assert stats["refused"].get("record: no_records", 0) == len(empty[0] + empty[1])
    assert stats["records"] == len(ids) + len(empty[0] + empty[1])
    assert stats["images"] == len(expected)
    assert stats["repaired"].get("title: empty", 0) == sum(bool(n % 3) for n in expected.values())
    assert sum(sum(splits.values()) for splits in stats["datasets"].values()) == len(expected)


def test_a_drop_that_was_cut_off_is_completed_by_a_rerun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"image_id": f"{n % 10}", "image": IMAGES[n], "title": "t"} for n in range(40)]
    pq.write_table(pa.Table.from_pylist(rows), f"{tmp_path}/source.parquet", row_group_size=10)
    source = {"uri": f"{tmp_path}/source.parquet", "dataset": "d"}
    config = CorpusConfig.model_validate({"sources": [source], "rows_per_part": 10})
    calm = run_here(config, f"{tmp_path}/calm")
    remove = storage.remove_file

    def cut_off(uri: str) -> None:
        remove(uri)
        raise KeyboardInterrupt

    monkeypatch.setattr(storage, "remove_file", cut_off)
    for _ in range(2):  # each time one part further
        with pytest.raises(KeyboardInterrupt):
            run_here(config, f"{tmp_path}/out")
    monkeypatch.undo()
    assert run_here(config, f"{tmp_path}/out") == calm
    assert [row["image_id"] for row in calm[0]] == [str(n) for n in range(10)]
    assert calm[1]["refused"] == {"image_id: duplicate": 30}


def test_a_part_has_at_most_twice_the_rows_asked_for(tmp_path: Path) -> None:
    with tarfile.open(f"{tmp_path}/all.tar", "w") as tar:
        for number, data in enumerate(IMAGES):
            member = tarfile.TarInfo(f"{number:03d}.png")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    source = {"uri": f"{tmp_path}", "dataset": "d", "format": "webdataset"}
    config = CorpusConfig.model_validate({"sources": [source], "rows_per_part": 8})
    rows, _, _ = run_here(config, f"{tmp_path}/out")
    assert [row["image_id"] for row in rows] == [f"{n:03d}" for n in range(40)]
    parts = [name for name in storage.list_files(f"{tmp_path}/out") if name.startswith("part-")]
    assert [pq.read_metadata(f"{tmp_path}/out/{name}").num_rows for name in parts] == [16, 16, 8]


def mixed_sources(folder: Path) -> list[dict[str, Any]]:
    """One source a format, ten images each, a bad one in each; ids of the first two sources are the same."""
    folder.mkdir()
    for number in range(10):
        (folder / f"{number}.png").write_bytes(IMAGES[number] if number else b"text named png")
    lines = [json.dumps({"image_id": f"{n}.png", "image_uri": f"{n}.png", "tags": {"a": 2}}) for n in range(9)]
    (folder / "rows.jsonl").write_text("\n".join([*lines, "{broken"]))
    (folder / "rows.csv").write_text("key,image_uri\n" + "".join(f"c{n},{n}.png\n" for n in range(9)) + "c9,gone.png\n")
    with tarfile.open(folder / "a.tar", "w") as tar:
        for number in range(10):
            tar.add(folder / f"{number}.png", f"t{number}.png")
    return [
        {"uri": str(folder), "format": "folder", "dataset": "folder", "constants": {"licence": "cc0"}},
        {"uri": f"{folder}/rows.jsonl", "format": "jsonl", "dataset": "jsonl", "columns": {"annotations": "tags"}},
        {"uri": f"{folder}/rows.csv", "format": "csv", "dataset": "csv", "columns": {"image_id": "key"}},
        {"uri": f"{folder}/a.tar", "format": "webdataset", "dataset": "tar", "id_prefix": "x/"},
    ]


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_sources_of_all_formats_in_one_corpus(tmp_path: Path, root: str) -> None:
    config = CorpusConfig.model_validate({"sources": mixed_sources(tmp_path / "in"), "rows_per_part": 4})
    artifact = execute(STAGE, config, {}, root, "mixed")
    rows, stats, quarantine = run_here(config, f"{tmp_path}/here")
    assert (read(artifact), artifact.stats) == (rows, stats)
    assert pq.read_table(artifact.path("quarantine.parquet")).to_pylist() == quarantine
    assert artifact.stats["datasets"] == {"csv": {"train": 8}, "folder": {"train": 9}, "jsonl": {}, "tar": {"train": 9}}
    assert artifact.stats["records"] == 40
    assert artifact.stats["refused"] == {
        "image: not_an_image": 4,
        "image: not_found": 1,
        "image_id: duplicate": 8,
        "record: not_json": 1,
    }
    assert artifact.stats["repaired"] == {}  # the scores over 1 were of records that are duplicates
    assert {row["licence"] for row in rows if row["dataset"] == "folder"} == {"cc0"}
    assert [row["image_id"] for row in rows if row["dataset"] == "tar"] == [f"x/t{n}" for n in range(1, 10)]


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_a_corpus_without_one_good_record_is_refused_and_harms_nothing(tmp_path: Path, root: str) -> None:
    good = build(root, write_source(f"{tmp_path}", 50))
    uri = f"{tmp_path}/bad.parquet"
    pq.write_table(pa.table({"image_id": ["a"], "image": [b"zzz"]}), uri)
    with pytest.raises(CorpusError, match=r"none of the 1 records is acceptable.*not_an_image"):
        build(root, uri)
    assert Artifact.open(good.uri).stats == good.stats


def test_wrong_sources_are_explained_before_any_work(tmp_path: Path, root: str) -> None:
    uri = write_source(f"{tmp_path}", 50)
    with pytest.raises(CorpusError, match=r"column 'name', mapped to 'title', is absent.*the file has image_id"):
        build(root, uri, columns={"title": "name"})
