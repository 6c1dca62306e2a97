"""Seeds: the same on every machine and in every release."""

from hypothesis import given
from hypothesis import strategies as st

from lookalike.seeds import derive_seed, hash_unit


def test_literal_values_never_change() -> None:
    assert derive_seed(17) == 1161021099008769498
    assert derive_seed(17, "model") == 5190371503576851791
    assert derive_seed(17, "augment", 1, 250) == 7567993491298592478
    assert hash_unit(17, "image-1") == 0.7513701996039828


@given(st.integers(0, 2**32), st.text(max_size=20))
def test_ranges(seed: int, name: str) -> None:
    assert 0 <= derive_seed(seed, name) < 2**63
    assert 0.0 <= hash_unit(seed, name) < 1.0


def test_names_and_order_matter() -> None:
    choices: list[tuple[str | int, ...]] = [("a", 2), (2, "a"), ("a",), ()]
    assert len({derive_seed(seed, *names) for seed in (1, 2) for names in choices}) == 8


def test_unit_numbers_are_spread_evenly() -> None:
    values = [hash_unit(3, f"row-{i}") for i in range(2000)]
    assert all(150 < sum(low <= v * 10 < low + 1 for v in values) < 250 for low in range(10))
