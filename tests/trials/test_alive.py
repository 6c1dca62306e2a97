"""A service that is up answers, and one that cannot answer ends."""

import pytest

from tests.trials.alive import run

pytestmark = [pytest.mark.soak, pytest.mark.nightly, pytest.mark.timeout(300)]


def test_a_service_answers_or_ends() -> None:
    rows = list(run(quick=True))
    assert not [row for row in rows if not row.kept]
    assert len(rows) >= 10
