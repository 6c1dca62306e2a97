"""Soak: what data may name and cost, tried by an attacker."""

from pathlib import Path

import pytest

from tests.trials import print_rows
from tests.trials.data import run


@pytest.mark.soak
def test_data_names_and_costs_what_it_may(tmp_path: Path) -> None:
    assert print_rows("data", run(tmp_path, quick=True))
