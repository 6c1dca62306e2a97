"""Killed workers and nodes: the same loss curve and weights as those of a calm run; and a run that shrinks."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch.testing import assert_close

from lookalike.artifacts import Artifact
from tests.train.conftest import publish_encoder, publish_shards

REPOSITORY = Path(__file__).parents[3]


@pytest.mark.soak
@pytest.mark.ray
def test_what_is_killed_at_a_random_step_ends_as_if_nothing_had_happened(tmp_path: Path) -> None:
    root, seed = str(tmp_path / "root"), random.randrange(1 << 30)
    publish_shards(root)
    publish_encoder(root)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY / "platform"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(REPOSITORY / "tests/train/run/accidents.py"), root, str(tmp_path / "log"), str(seed)]
    done = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=2400, check=False)
    assert done.returncode == 0, f"seed {seed}: {done.stderr[-4000:]}"
    (said,) = [line for line in done.stdout.splitlines() if line.startswith("{")]  # Ray's raylet talks there too
    made = {kind: Artifact.open(uri) for kind, uri in json.loads(said).items()}
    calm = made["calm"]
    for kind in ("worker", "node"):
        assert made[kind].digest == calm.digest, f"seed {seed}: {kind}"  # weights and loss curve
        assert made[kind].stats["workers"] == [[0, 2]]
    shrunk = made["shrink"]
    begun, (step, workers) = shrunk.stats["workers"]
    assert (begun, workers) == ([0, 2], 1)
    assert step % 3 == 0  # a checkpoint
    curves = [artifact.read_json("history.json") for artifact in (calm, shrunk)]
    assert [point["step"] for point in curves[1]] == [point["step"] for point in curves[0]]
    for one, other in zip(*curves, strict=True):  # the same batches; sums in another order
        assert other == pytest.approx(one, rel=1e-4)
    states = [load_file(artifact.path("model.safetensors")) for artifact in (calm, shrunk)]
    for name, value in states[0].items():
        assert_close(states[1][name], value, rtol=1e-3, atol=1e-4)
