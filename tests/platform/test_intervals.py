"""Intervals: against scipy where it has them, and by how often they hold the truth."""

import numpy as np
import pytest
from scipy.stats import binomtest

from lookalike.intervals import difference, mean_interval, wilson, wilson_intervals


@pytest.mark.parametrize(("hits", "trials"), [(0, 1), (0, 50), (3, 7), (50, 50), (999, 1000)])
def test_wilson_is_scipys(hits: int, trials: int) -> None:
    wanted = binomtest(hits, trials).proportion_ci(method="wilson")
    assert wilson(hits, trials) == pytest.approx((wanted.low, wanted.high), abs=1e-6)


def test_arrays_have_the_intervals_of_their_elements() -> None:
    hits, trials = np.array([0, 3, 9, 50, 0]), np.array([4, 8, 9, 60, 0])
    ends = zip(*wilson_intervals(hits, trials), strict=True)
    assert list(ends) == [wilson(*pair) for pair in zip(hits.tolist(), trials.tolist(), strict=True)]


def test_nothing_known_is_everything_possible() -> None:
    assert wilson(0, 0) == mean_interval([]) == (0.0, 1.0)


def test_newcombes_published_example() -> None:
    """Newcombe 1998, table II, example (a): 56/70 against 48/80."""
    assert difference(56, 70, 48, 80) == pytest.approx((0.0524, 0.3339), abs=1e-4)


def test_all_ones_leave_room_for_what_was_not_seen() -> None:
    low, high = mean_interval(np.ones(100))
    assert high == 1.0
    assert 0.94 < low < 0.97
    assert mean_interval(np.ones(10_000))[0] > 0.999


@pytest.mark.parametrize(("hits", "trials"), [(3, 7), (40, 100), (650, 1000)])
def test_of_zeros_and_ones_it_is_agresti_and_coulls(hits: int, trials: int) -> None:
    size = trials + 1.959964**2
    share = (hits + 1.959964**2 / 2) / size
    half = 1.959964 * (share * (1 - share) / size) ** 0.5
    assert mean_interval(np.repeat([1.0, 0.0], [hits, trials - hits])) == pytest.approx((share - half, share + half))


def test_values_that_differ_less_give_a_narrower_interval() -> None:
    low, high = mean_interval(np.tile([0.8, 0.9], 500))
    binary_low, binary_high = wilson(850, 1000)
    assert high - low < (binary_high - binary_low) / 2


RECALLS = {
    "mostly one": (np.array([1.0] * 95 + [0.9] * 4 + [0.0]) / 1.0),
    "tenths around .8": np.repeat(np.linspace(0.5, 1.0, 6), [1, 2, 4, 8, 4, 2]),
    "all or nothing": np.array([0.0, 1.0, 1.0, 1.0]),
    "almost always one": np.array([1.0] * 199 + [0.0]),
}


@pytest.mark.parametrize("name", RECALLS)
@pytest.mark.parametrize("size", [30, 200])
def test_the_interval_holds_the_mean_as_often_as_it_says(name: str, size: int) -> None:
    rng, values = np.random.default_rng(5), RECALLS[name]
    held = [
        low <= values.mean() <= high for low, high in (mean_interval(rng.choice(values, size)) for _ in range(2000))
    ]
    assert np.mean(held) > 0.935
