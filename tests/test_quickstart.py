"""The whole way, from raw images to an answered gRPC query, on the smoke recipe: as a newcomer runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
RECIPE = "deploy/recipes/smoke.yaml"
pytestmark = [pytest.mark.ray, pytest.mark.soak]


def lookalike(*args: str, timeout_s: float = 600.0) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "platform")}
    environment.pop("RAY_ADDRESS", None)
    return subprocess.run(
        [sys.executable, "-m", "lookalike.cli", *args],
        cwd=ROOT,
        env=environment,
        text=True,
        capture_output=True,
        timeout=timeout_s,
        check=False,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    root = tmp_path_factory.mktemp("smoke")
    run = lookalike("quickstart", RECIPE, f"root={root}")
    assert run.returncode == 0, run.stderr[-4000:]
    return root, run.stdout


def test_quickstart_ends_with_neighbours_table_plan_and_times(finished: tuple[Path, str]) -> None:
    root, text = finished
    for part in (
        "Neighbours over gRPC",
        "the same queries by vector gave the same hits",
        "P@1 by dimension",
        "Plan: ",
        "Time of each stage",
        "report.html",
    ):
        assert part in text
    assert (root / "report.html").read_text().count("data:image/webp") >= 4


def test_report_holds_the_figures_and_the_seed(finished: tuple[Path, str]) -> None:
    report: dict[str, Any] = json.loads((finished[0] / "report.json").read_text())
    assert report["seed"] == report["evaluation"]["seed"] == 17
    assert report["plan"]["chosen"]["recall"] >= report["plan"]["target"]
    full = {name: row["p_at_1"] for name, row in report["evaluation"]["full_dim"].items()}
    assert full["base-vectors"] > 0.1  # 820 candidates: chance is 0.0012, so the packaged weights are truly loaded
    for answer in report["neighbours"]:
        scores = [hit["score"] for hit in answer["hits"]]
        assert scores == sorted(scores, reverse=True)
        assert answer["query"]["image_id"] not in {hit["id"] for hit in answer["hits"]}


def test_every_step_is_skipped_when_run_again(finished: tuple[Path, str]) -> None:
    run = lookalike("quickstart", RECIPE, f"root={finished[0]}", "--dry-run")
    assert run.returncode == 0, run.stderr
    assert {step["state"] for step in json.loads(run.stdout)} == {"published already"}
    changed = lookalike("evaluate", RECIPE, f"root={finished[0]}", "evaluate.dims=[8]", "--dry-run")
    assert json.loads(changed.stdout)[0]["state"] == "would run"


def test_lineage_of_the_served_index_reaches_the_corpus(finished: tuple[Path, str]) -> None:
    report = json.loads((finished[0] / "report.json").read_text())
    shown = lookalike("show", report["artifacts"]["index"])
    assert shown.returncode == 0, shown.stderr
    order = [
        shown.stdout.find(f"{kind} '{name}'")
        for kind, name in (
            ("index", "index"),
            ("embeddings", "vectors"),
            ("encoder", "finetune"),
            ("shards", "shards"),
            ("labels", "labels"),
            ("corpus", "corpus"),
        )
    ]
    assert min(order) >= 0
    assert shown.stdout.find("corpus 'corpus'") > shown.stdout.find("embeddings 'vectors'") > order[0] >= 0


def test_a_damaged_artifact_is_refused_and_named(finished: tuple[Path, str]) -> None:
    report = json.loads((finished[0] / "report.json").read_text())
    part = next(Path(report["artifacts"]["vectors"]).glob("part-*.parquet"))
    sound = part.read_bytes()
    part.write_bytes(sound[:-100])
    try:
        run = lookalike("index", RECIPE, f"root={finished[0]}", "--dry-run")
        assert json.loads(run.stdout)[0]["state"].startswith("waits: ")
        assert part.name in run.stdout
        assert lookalike("show", report["artifacts"]["vectors"]).returncode == 3
    finally:
        part.write_bytes(sound)
