"""A run that was killed ends with the weights of one that was not, bit by bit (CPU, the same number of workers)."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lookalike.artifacts import Artifact
from lookalike.errors import ArtifactError
from tests.train.conftest import publish_encoder, publish_shards

REPOSITORY = Path(__file__).parents[3]
STALL_AT, CHECKPOINT, STEPS = 8, 5, 16


def make_root(root: str) -> None:
    """Shards and a tiny encoder."""
    publish_shards(root)
    publish_encoder(root)


def start(*args: str) -> "subprocess.Popen[str]":
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY / "platform"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(REPOSITORY / "tests/train/run/driver.py"), *args]
    return subprocess.Popen(
        command, env=environment, text=True, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def read_log(log: Path) -> list[tuple[int, int]]:
    text = log.read_text() if log.exists() else ""
    return [(int(rank), int(step)) for rank, step in (line.split() for line in text.splitlines())]


@pytest.mark.ray
@pytest.mark.soak
def test_a_killed_run_goes_on_from_its_checkpoint_to_the_same_weights(tmp_path: Path) -> None:
    disturbed, calm, log = tmp_path / "disturbed", tmp_path / "calm", tmp_path / "steps.log"
    make_root(str(disturbed))
    shutil.copytree(disturbed, calm)

    driver = start(str(disturbed), str(log), str(STALL_AT))
    deadline = time.monotonic() + 300
    while {(0, STALL_AT), (1, STALL_AT)} - set(read_log(log)):
        assert driver.poll() is None, driver.communicate()
        assert time.monotonic() < deadline, read_log(log)
        time.sleep(0.2)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.communicate(timeout=60)
    (draft,) = (disturbed / "encoder" / "tiny").iterdir()
    with pytest.raises(ArtifactError, match="unfinished draft"):
        Artifact.open(str(draft))

    log.unlink()
    again = start(str(disturbed), str(log), "0", str(calm))
    out, err = again.communicate(timeout=400)
    assert again.returncode == 0, err
    resumed, undisturbed = (Artifact.open(uri, "encoder") for uri in out.split())
    assert resumed.uri == str(draft)
    steps = [step for rank, step in read_log(log) if rank == 0]
    assert steps == [*range(CHECKPOINT + 1, STEPS + 1), *range(1, STEPS + 1)]  # resumed, then undisturbed
    assert resumed.digest == undisturbed.digest  # weights, and the loss curve
    weights = [{f.path: f.sha256 for f in a.manifest.files}["model.safetensors"] for a in (resumed, undisturbed)]
    assert weights[0] == weights[1]
    assert [point["step"] for point in resumed.read_json("history.json")] == [float(s) for s in range(1, STEPS + 1)]
    assert resumed.stats["workers"] == [[0, 2]]
    assert not (draft / "_work").exists()
    source = {f.path: f.sha256 for f in Artifact.open(f"{calm}/encoder/encoder/{'5' * 20}").manifest.files}
    assert weights[0] != source["model.safetensors"]
