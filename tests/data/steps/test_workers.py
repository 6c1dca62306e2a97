"""The labels of a corpus are the same bytes whatever the number of workers and whatever is killed on the way."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import yaml

from lookalike.artifacts import Artifact
from lookalike.recipe import Recipe
from tests.data.conftest import make_rows, publish_corpus, publish_embeddings
from tests.data.test_labels import SETTINGS

ROOT = Path(__file__).resolve().parents[3]


def write_recipe(folder: Path) -> Path:
    rows = make_rows(240)
    given = {"corpus": publish_corpus(str(folder), rows, 4), "embeddings": publish_embeddings(str(folder), rows, 3)}
    inputs = {name: artifact.uri for name, artifact in given.items()}
    steps = {
        "labels": {"stage": "labels", "inputs": inputs, "settings": SETTINGS},
        "shards": {
            "stage": "shards",
            "inputs": {"corpus": inputs["corpus"], "labels": "labels"},
            "settings": {"rows_per_shard": 60},
        },
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({"name": "workers", "root": str(folder), "steps": steps}))
    return path


def overrides(workers: int, root: Path) -> list[str]:
    return [f"root={root}", f"cluster.num_cpus={workers}", "cluster.object_store_mb=100"]


def start(workers: int, recipe: Path, root: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "lookalike.cli", "run", str(recipe), *overrides(workers, root)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "platform")}
    return subprocess.Popen(
        command, env=environment, cwd=ROOT, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def run_with(workers: int, recipe: Path, root: Path) -> dict[str, Artifact]:
    with start(workers, recipe, root) as done:
        try:
            _, said = done.communicate(timeout=400)
        finally:
            done.kill()  # nothing, when it has ended
    assert done.returncode == 0, said[-2000:]
    loaded = Recipe.load(str(recipe), overrides(workers, root))
    found = {name: loaded.published(name) for name in loaded.steps}
    return {name: artifact for name, artifact in found.items() if artifact is not None}


def kill_a_worker(driver: "subprocess.Popen[str]", until: str, root: Path) -> bool:
    """Kill a worker process once a file like ``until`` is there; whether one could be killed."""
    while not list(root.glob(until)):
        assert driver.poll() is None
        time.sleep(0.01)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        for child in psutil.Process(driver.pid).children(recursive=True):
            with suppress(psutil.Error):  # it may have ended meanwhile
                if child.cmdline()[:1] == ["ray::MapBatches(each)"]:
                    child.kill()
                    return True
    return False


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("workers"))


@pytest.fixture(scope="module")
def calm(recipe: Path) -> dict[str, Artifact]:
    """What two workers make of it when nothing happens."""
    return run_with(2, recipe, recipe.parent / "calm")


@pytest.mark.soak
@pytest.mark.parametrize("workers", [1, 4])
def test_the_number_of_workers_does_not_change_the_digest(
    workers: int, recipe: Path, calm: dict[str, Artifact], tmp_path: Path
) -> None:
    made = run_with(workers, recipe, tmp_path)
    assert set(made) == {"labels", "shards"}
    for name, artifact in made.items():
        assert (artifact.digest, artifact.stats) == (calm[name].digest, calm[name].stats)


@pytest.mark.soak
def test_a_killed_worker_and_a_killed_driver_change_nothing(
    recipe: Path, calm: dict[str, Artifact], tmp_path: Path
) -> None:
    root = tmp_path
    with start(2, recipe, root) as run:
        assert run.stderr is not None
        assert kill_a_worker(run, "labels/labels/*/_work/signatures/*.parquet", root)
        while not list(root.glob("labels/labels/*/annotations.parquet/*.parquet")):
            assert run.poll() is None
            time.sleep(0.02)
        run.send_signal(signal.SIGKILL)
        run.stderr.close()
    time.sleep(3)  # its Ray processes notice that the driver is gone
    (draft,) = (root / "labels/labels").iterdir()
    assert not (draft / "manifest.json").exists()
    assert list(draft.glob("_work/*.json"))  # markers of finished steps
    again = run_with(2, recipe, root)
    assert {name: (made.digest, made.stats) for name, made in again.items()} == {
        name: (made.digest, made.stats) for name, made in calm.items()
    }
