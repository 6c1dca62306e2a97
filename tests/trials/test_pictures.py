"""The short form of the trial of pictures."""

import pytest

from tests.trials import print_rows
from tests.trials.pictures import run

pytestmark = [pytest.mark.soak, pytest.mark.nightly, pytest.mark.ray]


@pytest.mark.parametrize("placement", ["fused", "sharded"])
def test_pictures_of_one_tenant_stop_nobody(placement: str) -> None:
    assert print_rows("pictures", run(num=24, placement=placement))
