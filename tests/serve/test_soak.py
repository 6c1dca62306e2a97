"""The service under load while replicas and a node are lost, generations change and everything is killed at the end."""

import json
import os
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.soak, pytest.mark.timeout(900)]


def test_faults_change_no_answer_and_lose_no_write() -> None:
    done = subprocess.run([sys.executable, "-m", "tests.serve.soak", "--seconds", "20"], capture_output=True, text=True,
                          timeout=840, check=False, env={**os.environ, "RAY_ADDRESS": ""})  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    assert not seen["wrong"], seen
    assert seen["generations_seen"] >= 5
    assert min(seen["switches"], seen["searches"], seen["writes"], seen["rows after restart"]) > 4
    assert seen["killed"]
