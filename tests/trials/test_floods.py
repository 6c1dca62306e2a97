"""The trial of floods, smaller, with a service and a Ray of its own."""

import subprocess
import sys

import pytest

pytestmark = [pytest.mark.soak, pytest.mark.nightly, pytest.mark.timeout(300)]


def test_one_callers_flood_leaves_the_others_alone() -> None:
    command = [sys.executable, "-m", "tests.trials.floods", "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert done.stdout.count('"trial": "floods"') > 20
