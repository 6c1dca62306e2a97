"""Good pictures among as many odd entries: the good ones are kept bit for bit, the others told one by one."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from lookalike.artifacts import Artifact
from lookalike.cli import main
from lookalike.data.corpus import STAGE, CorpusConfig
from lookalike.stages import fingerprint
from tests.data.odd_sources import SOURCES, OddSource, odd_folder
from tests.data.test_corpus import run_here


@pytest.mark.parametrize("build", SOURCES)
def test_200_odd_entries_among_200_good_pictures(tmp_path: Path, build: Callable[[Path, int], OddSource]) -> None:
    if build.__name__ == "odd_lance":
        pytest.importorskip("lance")
    source = build(tmp_path, 200)
    config = CorpusConfig.model_validate({"sources": [{**source.settings, "dataset": "d"}], "rows_per_part": 64})
    assert fingerprint(STAGE, config, {}) == fingerprint(STAGE, config, {})
    rows, stats, quarantine = run_here(config, f"{tmp_path}/out")
    assert {row["image_id"]: row["image"] for row in rows} == source.good
    refused = [row for row in quarantine if not row["reason"].startswith("repaired")]
    assert len(rows) + len(refused) == stats["records"]
    assert sum(stats["refused"].values()) == len(refused)
    assert stats["records"] + sum(stats["passed_over"].values()) == source.entries
    assert len({(row["source"], row["row"]) for row in refused}) == len(refused)
    for row in refused:
        assert row["detail"], row
        keyless = row["field"] == "image_id" or row["reason"] in {"not_json", "not_an_object", "damaged_archive"}
        assert row["image_id"] or row["uri"] or keyless, row


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_a_table_that_cannot_be_read_is_exit_2_with_file_and_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.csv").write_text('"image_id" ,"image_uri"\na,b\n')
    step = {
        "stage": "corpus",
        "settings": {"sources": [{"uri": f"{tmp_path}/rows.csv", "format": "csv", "dataset": "d"}]},
    }
    (tmp_path / "recipe.yaml").write_text(
        yaml.safe_dump({"name": "r", "root": f"{tmp_path}/root", "steps": {"c": step}})
    )
    for more in (["--dry-run"], []):
        assert main(["corpus", f"{tmp_path}/recipe.yaml", *more]) == 2
        assert "rows.csv, line 1: the header is no CSV" in capsys.readouterr().err


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_the_command_line_runs_over_an_odd_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = odd_folder(tmp_path, 26)
    step = {"stage": "corpus", "settings": {"sources": [{**source.settings, "dataset": "d"}]}}
    recipe = {"name": "r", "root": f"{tmp_path}/root", "steps": {"c": step}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["corpus", f"{tmp_path}/recipe.yaml", "--dry-run"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["step"] == "c"
    assert main(["corpus", f"{tmp_path}/recipe.yaml"]) == 0
    artifact = Artifact.open(capsys.readouterr().out.strip())
    assert artifact.stats["images"] == len(source.good)
    assert artifact.stats["records"] + sum(artifact.stats["passed_over"].values()) == source.entries
    details = pq.read_table(artifact.path("quarantine.parquet"))["detail"].to_pylist()
    assert all(details)
    os.unlink(next((tmp_path / "folder" / "x").glob("odd*.jpg")))  # a link to nowhere is part of the fingerprint
    assert main(["corpus", f"{tmp_path}/recipe.yaml", "--dry-run"]) == 0
    assert json.loads(capsys.readouterr().out)[0] != "published"
