"""The write path keeps its promises on a disk that fails; see ``storage.py`` and ``machine.py``."""

import subprocess

import pytest

from tests.trials.disk import find_compiler, preload
from tests.trials.plants import PLANTS

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="the disk that fails is built by a C compiler")


def run(module: str, *arguments: str) -> str:
    done = preload(f"tests.trials.{module}", list(arguments), output=subprocess.PIPE)
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


def test_random_histories_meet_the_model() -> None:
    assert "200 histories" in run("machine", "--num", "200")


@pytest.mark.soak
def test_faults_at_each_call_lose_nothing() -> None:
    assert run("storage", "--points", "800").count('"kept": true') > 10


@pytest.mark.soak
def test_planted_faults_are_found() -> None:
    assert run("machine", "--num", "3000", "--plant", "all").count(": found") == len(PLANTS)
