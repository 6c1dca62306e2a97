"""The labels of a corpus are the same bytes whatever the number of workers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lookalike.artifacts import Artifact
from lookalike.recipe import Recipe

from .conftest import make_rows, publish_corpus, publish_embeddings
from .test_labels import SETTINGS

ROOT = Path(__file__).resolve().parents[2]


def write_recipe(folder: Path) -> Path:
    rows = make_rows(240)
    given = {"corpus": publish_corpus(str(folder), rows, 4), "embeddings": publish_embeddings(str(folder), rows, 3)}
    inputs = {name: artifact.uri for name, artifact in given.items()}
    steps = {"labels": {"stage": "labels", "inputs": inputs, "settings": SETTINGS},
             "shards": {"stage": "shards", "inputs": {"corpus": inputs["corpus"], "labels": "labels"},
                        "settings": {"rows_per_shard": 60}}}  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({"name": "workers", "root": str(folder), "steps": steps}))
    return path


def run_with(workers: int, recipe: Path, folder: Path) -> dict[str, Artifact]:
    root = folder / f"workers-{workers}"
    overrides = [f"root={root}", f"cluster.num_cpus={workers}", "cluster.object_store_mb=100"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "platform")}
    done = subprocess.run([sys.executable, "-m", "lookalike.cli", "run", str(recipe), *overrides], env=environment,
                          capture_output=True, text=True, check=False, cwd=ROOT)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    loaded = Recipe.load(str(recipe), overrides)
    found = {name: loaded.published(name) for name in loaded.steps}
    return {name: artifact for name, artifact in found.items() if artifact is not None}


@pytest.mark.soak
def test_one_two_and_four_workers_give_the_same_digest(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    runs = [run_with(workers, recipe, tmp_path) for workers in (1, 2, 4)]
    assert set(runs[0]) == {"labels", "shards"}
    for name in runs[0]:
        assert len({made[name].digest for made in runs}) == 1, name
        assert all(made[name].stats == runs[0][name].stats for made in runs)
