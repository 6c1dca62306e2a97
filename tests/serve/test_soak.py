"""The service under load while replicas and a node are lost and generations change, and in the mode of clusters."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

pytestmark = [pytest.mark.soak, pytest.mark.timeout(900)]


def read_result(stdout: str) -> dict[str, Any]:
    """The JSON object among what Ray's own processes print."""
    found: dict[str, Any] = json.loads([line for line in stdout.splitlines() if line.startswith('{"')][-1])
    return found


def test_faults_change_no_answer_and_lose_no_write() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.serve.soak", "--seconds", "20"],
        capture_output=True,
        text=True,
        timeout=840,
        check=False,
        env={**os.environ, "RAY_ADDRESS": ""},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    seen = read_result(done.stdout)
    assert not seen["wrong"], seen
    assert seen["generations_seen"] >= 5
    assert seen["ingresses"] == [1, 3, 1]
    assert min(seen["switches"], seen["searches"], seen["writes"], seen["rows after restart"]) > 4
    assert seen["killed"]


def test_the_mode_of_clusters_does_the_same() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.serve.production"],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env={**os.environ, "RAY_ADDRESS": ""},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert read_result(done.stdout) == {
        "codes": ["INVALID_ARGUMENT", "NOT_FOUND", "INVALID_ARGUMENT", "FAILED_PRECONDITION", "FAILED_PRECONDITION"],
        "switched": True,
        "rolled_back": True,
        "rows": 257,
        "pending": 0,
        "found": ["new"],
        "streamed": [["new"], "NOT_FOUND"],
    }
