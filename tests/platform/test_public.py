"""The promise of ``import lookalike``: few names, loaded when they are used."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import lookalike

MOST = 15


def test_few_names_are_promised_and_each_is_there() -> None:
    assert len(lookalike.__all__) <= MOST
    assert lookalike.__all__ == sorted(lookalike.__all__)
    for name in lookalike.__all__:
        assert getattr(lookalike, name) is not None
    with pytest.raises(AttributeError, match=r"no attribute 'encoder'; it exports \['Artifact', 'Client'"):
        lookalike.encoder  # noqa: B018


def test_importing_loads_nothing_heavy() -> None:
    script = "import lookalike, sys; print([m for m in ('torch', 'ray', 'numpy', 'pydantic') if m in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "platform")}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == "[]"
