"""95% intervals whose width is never zero, even if all trials succeeded, or none."""

from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import betaincinv, ndtr, stdtrit

LEVEL = 0.95
"""Probability that an interval holds the truth."""
Z = NormalDist().inv_cdf(0.5 + LEVEL / 2)
"""97.5% point of the normal distribution."""
Interval = tuple[float, float]
Floats = npt.NDArray[np.float64]


def wilson(hits: int, trials: int, z: float = Z) -> Interval:
    """Wilson's score interval of a share, ``z`` standard errors wide each way; [0, 1] of no trials."""
    low, high = wilson_intervals(np.array(hits), np.array(trials), z)
    return float(low), float(high)


def wilson_intervals(
    hits: npt.NDArray[Any], trials: npt.NDArray[Any], z: float = Z
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Lower and upper ends of ``wilson`` for arrays of one shape."""
    n = np.maximum(np.asarray(trials, float), 1e-9)
    p = np.asarray(hits, float) / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    empty = np.asarray(trials) == 0
    low, high = np.clip(centre - half, 0, p), np.clip(centre + half, p, 1)  # rounding may put 1 of 1 outside
    return np.where(empty, 0.0, low), np.where(empty, 1.0, high)


def mean_interval(values: Sequence[float] | npt.NDArray[np.float64]) -> Interval:
    """Interval of the mean of independent values in [0, 1], for example the recall of each query; [0, 1] of no values.

    Each end is the farther of two. One is the end of the empirical likelihood interval (Owen 2001), which follows the
    skew of the values and may give weight to a 0 or a 1 that was not seen. The other is Clopper and Pearson's for the
    share of low (high) values, wherever they are cut off: a sample that missed all of few large losses, or has a single
    one, says little about their share. So the interval has a width even if all values are 1. For values without rare
    losses, it is wider than need be below some hundreds of them.
    """
    sample = np.asarray(values, np.float64)
    if not len(sample):
        return 0.0, 1.0
    return _lower_end(sample), 1.0 - _lower_end(1.0 - sample)


def _lower_end(sample: npt.NDArray[np.float64]) -> float:
    values, counts = np.unique(sample, return_counts=True)
    return max(0.0, min(_likelihood_end(values, counts), _loss_end(values, counts)))


def _likelihood_end(values: npt.NDArray[np.float64], counts: npt.NDArray[np.int64]) -> float:
    """Smallest mean of a distribution on [0, 1] that explains the ascending ``values`` nearly as well as their own.

    The weights are proportional to 1 / (shift + value): the smaller the shift, the smaller the mean. At a shift of 0,
    what is left of the allowed likelihood ratio pays for weight on an unseen 0.
    """
    num, allowed = counts.sum(), Z * Z / 2

    def tilt(shift: float) -> tuple[float, float]:
        """(mean, log likelihood ratio) at ``shift``."""
        harmonic = num / (counts / (shift + values)).sum()
        return harmonic - shift, (counts * np.log((shift + values) / harmonic)).sum()

    if values[0] > 0 and (at_zero := tilt(0.0))[1] < allowed:
        return float(at_zero[0] * np.exp((at_zero[1] - allowed) / num))
    low, high = -40.0, 40.0
    for _ in range(45):
        middle = (low + high) / 2
        low, high = (middle, high) if tilt(float(np.exp(middle)))[1] > allowed else (low, middle)
    return float(tilt(float(np.exp(high)))[0])


def _loss_end(values: npt.NDArray[np.float64], counts: npt.NDArray[np.int64]) -> float:
    """Smallest mean if only the share of the ascending ``values`` below some cut is unknown, over all cuts."""
    num, sums = counts.sum(), np.cumsum(values * counts)
    lost = np.cumsum(counts) - counts
    lost_sum = sums - values * counts
    share = betaincinv(lost + 1, num - lost, 0.5 + LEVEL / 2)
    kept, low = (sums[-1] - lost_sum) / (num - lost), lost_sum / np.maximum(lost, 1)
    return float((kept - share * (kept - low)).min())


def difference(hits: int, trials: int, other_hits: int, other_trials: int) -> Interval:
    """Newcombe's interval of ``hits / trials - other_hits / other_trials`` (1998, method 10); both trials above 0."""
    share, other = hits / trials, other_hits / other_trials
    (low, high), (other_low, other_high) = wilson(hits, trials), wilson(other_hits, other_trials)
    apart = share - other
    return (
        apart - float(np.hypot(share - low, other_high - other)),
        apart + float(np.hypot(high - share, other - other_low)),
    )


RESAMPLES = 1000
DRAWS_AT_ONCE = 1 << 24
"""Counts in memory while groups are drawn: 128 MB."""


def bootstrap(
    num_groups: int, statistic: Callable[[Floats], Floats], *, seed: int, resamples: int = RESAMPLES
) -> tuple[Floats, Floats]:
    """Ends [m] of the expanded percentile intervals of m statistics, over ``resamples`` draws of groups (Efron 1979).

    ``statistic`` gets how often each group was drawn, float64 [b, num_groups], and returns [b, m], NaN where a draw
    says nothing. The percentiles are widened as Student's t is for few groups (Hesterberg 2015, section 3.3). A
    statistic that no draw changes gets ends without a width: see ``group_means``. Fewer than two groups give [0, 1].
    """
    if num_groups < 2:
        width = statistic(np.ones((1, num_groups))).shape[1]
        return np.zeros(width), np.ones(width)
    random, parts = np.random.default_rng(seed), []
    step = max(1, DRAWS_AT_ONCE // num_groups)
    for start in range(0, resamples, step):
        draws = random.integers(num_groups, size=(min(step, resamples - start), num_groups))
        lines = np.arange(len(draws))[:, None] * num_groups
        counts = np.bincount((draws + lines).ravel(), minlength=draws.size).reshape(draws.shape)
        parts.append(statistic(counts.astype(np.float64)))
    tail = ndtr(np.sqrt(num_groups / (num_groups - 1)) * stdtrit(num_groups - 1, 0.5 - LEVEL / 2))
    values = np.concatenate(parts)
    found = np.isfinite(values).any(axis=0)
    low, high = np.zeros(values.shape[1]), np.ones(values.shape[1])
    if found.any():
        low[found], high[found] = np.nanquantile(values[:, found], [tail, 1 - tail], axis=0)
    return low, high


def group_means(
    values: Floats, groups: npt.NDArray[np.int64], *, seed: int, resamples: int = RESAMPLES
) -> list[Interval]:
    """Intervals of the means of the columns of ``values`` [n, m], in [0, 1], rows of equal ``groups`` drawn together.

    NaN does not count. The rows of a group, such as pictures of one product, are alike, so their number alone does not
    narrow the interval. If each row is a group, or all groups have the same mean, it is the ``mean_interval`` of the
    groups' means, which knows rare losses; otherwise a ``bootstrap``.
    """
    _, inverse = np.unique(groups, return_inverse=True)
    num_groups = int(inverse.max(initial=-1)) + 1
    known = ~np.isnan(values)
    sums, counts = np.zeros((num_groups, values.shape[1])), np.zeros((num_groups, values.shape[1]))
    np.add.at(sums, inverse, np.where(known, values, 0.0))
    np.add.at(counts, inverse, known)

    def means(drawn: Floats) -> Floats:
        weight = drawn @ counts
        return np.where(weight > 0, (drawn @ sums) / np.maximum(weight, 1), np.nan)

    ends = None if num_groups == len(values) else bootstrap(num_groups, means, seed=seed, resamples=resamples)
    intervals = []
    for column in range(values.shape[1]):
        counted = counts[:, column] > 0
        of_groups = sums[counted, column] / counts[counted, column]
        if ends is None or len(of_groups) < 2 or np.ptp(of_groups) == 0:
            intervals.append(mean_interval(of_groups))
        else:
            intervals.append((float(ends[0][column]), float(ends[1][column])))
    return intervals
