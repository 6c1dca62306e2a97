"""Intervals: against scipy where it has them, and by how often they hold the truth."""

from collections.abc import Callable

import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.stats import binomtest

from lookalike import intervals
from lookalike.intervals import bootstrap, difference, group_means, mean_interval, wilson, wilson_intervals


@pytest.mark.parametrize(("hits", "trials"), [(0, 1), (0, 50), (3, 7), (50, 50), (999, 1000)])
def test_wilson_is_scipys(hits: int, trials: int) -> None:
    wanted = binomtest(hits, trials).proportion_ci(method="wilson")
    assert wilson(hits, trials) == pytest.approx((wanted.low, wanted.high), abs=1e-6)


def test_arrays_have_the_intervals_of_their_elements() -> None:
    hits, trials = np.array([0, 3, 9, 50, 0]), np.array([4, 8, 9, 60, 0])
    ends = zip(*wilson_intervals(hits, trials), strict=True)
    assert list(ends) == [wilson(*pair) for pair in zip(hits.tolist(), trials.tolist(), strict=True)]


def test_an_interval_holds_its_share_to_the_last_bit() -> None:
    """Rounding puts the end of 38 of 38 beside 1 (statsmodels 7386 clipped it above 1; below 1 is as wrong)."""
    trials = np.repeat(np.arange(1, 120), np.arange(2, 121))
    hits = np.concatenate([np.arange(n + 1) for n in range(1, 120)])
    low, high = wilson_intervals(hits, trials)
    assert ((low >= 0) & (low <= hits / trials) & (hits / trials <= high) & (high <= 1)).all()


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


@pytest.mark.parametrize(("hits", "trials"), [(0, 5), (3, 7), (40, 100), (650, 1000), (999, 1000), (30, 30)])
def test_of_zeros_and_ones_it_is_clopper_and_pearsons(hits: int, trials: int) -> None:
    wanted = binomtest(hits, trials).proportion_ci(method="exact")
    found = mean_interval(np.repeat([1.0, 0.0], [hits, trials - hits]))
    assert found == pytest.approx((wanted.low, wanted.high), abs=1e-9)


def test_of_many_skewed_values_the_ends_are_those_of_the_empirical_likelihood() -> None:
    """The oracle maximises the likelihood of weights on the values with a given mean, by their multiplier."""
    values = np.repeat([0.0, 0.3, 0.8, 1.0], [60, 140, 300, 500])

    def log_ratio(mean: float) -> float:
        def slope(multiplier: float) -> float:
            return float(((values - mean) / (1 + multiplier * (values - mean))).sum())

        top, bottom = 1 / (mean - values.min()), -1 / (values.max() - mean)
        multiplier = brentq(slope, bottom * (1 - 1e-9), top * (1 - 1e-9))
        return float(np.log1p(multiplier * (values - mean)).sum())

    half = 1.959964**2 / 2
    wanted = [
        brentq(lambda mean: log_ratio(mean) - half, *ends) for ends in ((0.7, values.mean()), (values.mean(), 0.85))
    ]
    assert mean_interval(values) == pytest.approx(wanted, abs=1e-5)


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
    below, above = misses(RECALLS[name], size, 300)
    assert max(below, above) <= 0.045
    assert below + above <= 0.065


def misses(values: np.ndarray, size: int, runs: int) -> tuple[float, float]:
    """Shares of runs whose interval lies (above, below) the mean of ``values``, from which ``size`` are drawn."""
    rng, mean = np.random.default_rng(5), float(values.mean())
    ends = np.array([mean_interval(rng.choice(values, size)) for _ in range(runs)])
    return float((ends[:, 0] > mean + 1e-12).mean()), float((ends[:, 1] < mean - 1e-12).mean())


def test_a_recall_near_95_is_held_equally_on_both_sides() -> None:
    """Ten neighbours, each found with a probability of .95: 2.5% of the intervals lie on either side of it."""
    values = np.random.default_rng(6).binomial(10, 0.95, 100_000) / 10
    assert misses(values, 1000, 800) == pytest.approx((0.025, 0.025), abs=0.015)


@pytest.mark.parametrize(("lost", "size"), [(0.003, 400), (0.005, 400), (0.01, 200), (0.01, 400), (0.004, 1000)])
def test_the_lower_end_knows_queries_that_are_lost_now_and_then(lost: float, size: int) -> None:
    """A graph that finds nothing for a few queries; bootstrap intervals begin above the truth in 14 to 80% of runs."""
    rng = np.random.default_rng(7)
    values = np.where(rng.random(100_000) < lost, 0.0, np.where(rng.random(100_000) < 0.05, 0.9, 1.0))
    below, _ = misses(values, size, 300)
    assert below <= 0.045


def covers(truth: float, draw: Callable[[np.random.Generator], tuple[np.ndarray, np.ndarray]], rounds: int) -> float:
    """Share of ``rounds`` samples (values, groups) whose interval holds ``truth``."""
    random, hits = np.random.default_rng(8), 0
    for seed in range(rounds):
        values, groups = draw(random)
        ((low, high),) = group_means(values[:, None], groups, seed=seed, resamples=300)
        hits += low <= truth <= high
    return hits / rounds


@pytest.mark.parametrize("num_groups", [12, 60])
def test_pictures_of_one_product_do_not_narrow_the_interval_of_its_mean(num_groups: int) -> None:
    """All ten pictures of a product succeed together or not: what counts is the number of products."""
    groups = np.repeat(np.arange(num_groups), 10)

    def draw(random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        return np.repeat((random.random(num_groups) < 0.6).astype(float), 10), groups

    assert covers(0.6, draw, 300) > 0.91
    assert covers(0.6, lambda random: (draw(random)[0], np.arange(len(groups))), 100) < 0.7  # the trap


def test_many_groups_have_the_interval_of_the_normal_approximation() -> None:
    values = np.repeat(np.random.default_rng(2).random((4000, 2)), 2, axis=0)
    values[:2000, 1] = np.nan  # these do not count
    found = group_means(values, np.repeat(np.arange(4000), 2), seed=1, resamples=2000)
    for column, (low, high) in enumerate(found):
        known = values[::2][~np.isnan(values[::2, column]), column]
        half = 1.96 * known.std() / np.sqrt(len(known))
        assert (low, high) == pytest.approx((known.mean() - half, known.mean() + half), abs=half / 8)


def test_queries_that_are_each_a_group_have_the_interval_of_independent_values() -> None:
    values = np.random.default_rng(2).random((50, 2))
    values[:20, 1] = np.nan
    wanted = [mean_interval(values[:, 0]), mean_interval(values[20:, 1])]
    assert group_means(values, np.arange(50), seed=0) == wanted


def test_groups_that_are_all_alike_leave_room_for_what_was_not_seen() -> None:
    groups = np.repeat(np.arange(50), 3)
    assert group_means(np.ones((150, 1)), groups, seed=0)[0] == mean_interval(np.ones(50))
    assert group_means(np.ones((3, 1)), np.zeros(3, int), seed=0)[0] == mean_interval([1.0])
    assert group_means(np.full((3, 1), np.nan), np.arange(3), seed=0)[0] == (0.0, 1.0)


def test_few_groups_widen_the_ends_and_one_says_nothing() -> None:
    """Of three values the percentile interval spans nearly the range; Student's t says even more."""
    low, high = bootstrap(3, lambda drawn: drawn @ np.array([[0.0], [0.5], [1.0]]) / 3, seed=4)
    assert (low[0], high[0]) == (0.0, 1.0)
    assert bootstrap(1, lambda drawn: drawn, seed=4) == (0.0, 1.0)


def test_the_same_seed_gives_the_same_ends_however_many_draws_fit_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    values, groups = np.random.default_rng(2).random((90, 1)), np.repeat(np.arange(45), 2)
    wanted = group_means(values, groups, seed=5)
    monkeypatch.setattr(intervals, "DRAWS_AT_ONCE", 400)
    assert group_means(values, groups, seed=5) == wanted
    assert group_means(values, groups, seed=6) != wanted
