"""95% intervals whose width is never zero, even if all trials succeeded, or none."""

from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import betaincinv

LEVEL = 0.95
"""Probability that an interval holds the truth."""
Z = NormalDist().inv_cdf(0.5 + LEVEL / 2)
"""97.5% point of the normal distribution."""
Interval = tuple[float, float]


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
