"""A running service has no door open that should be shut."""

import pytest

from tests.trials import print_rows
from tests.trials.doors import run

pytestmark = [pytest.mark.soak, pytest.mark.ray]


def test_no_door_is_open_by_accident() -> None:
    assert print_rows("doors", run())
