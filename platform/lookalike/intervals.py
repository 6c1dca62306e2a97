"""95% intervals whose width is never zero, even if all trials succeeded, or none."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Z = 1.959964
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
    return np.where(empty, 0.0, np.maximum(centre - half, 0)), np.where(empty, 1.0, np.minimum(centre + half, 1))


def mean_interval(values: Sequence[float] | npt.NDArray[np.float64]) -> Interval:
    """Interval of the mean of independent values in [0, 1], for example the recall of each query; [0, 1] of no values.

    Agresti and Coull's idea, extended to more than two values: add z^2/2 zeros and z^2/2 ones to the sample and take
    the normal interval of its mean. For zeros and ones this is their interval of a share; values that differ less give
    a narrower interval. A bootstrap would have no width when all values are 1.
    """
    sample = np.asarray(values, np.float64)
    if not len(sample):
        return 0.0, 1.0
    size = len(sample) + Z * Z
    mean = (sample.sum() + Z * Z / 2) / size
    variance = ((sample - mean) ** 2).sum() + Z * Z / 2 * (mean**2 + (1 - mean) ** 2)
    half = Z * np.sqrt(variance / size / size)
    # the interval must contain the measured mean: when all values are 1 the upper end is 1
    low, high = min(mean - half, float(sample.mean())), max(mean + half, float(sample.mean()))
    return max(0.0, float(low)), min(1.0, float(high))


def difference(hits: int, trials: int, other_hits: int, other_trials: int) -> Interval:
    """Newcombe's interval of ``hits / trials - other_hits / other_trials`` (1998, method 10); both trials above 0."""
    share, other = hits / trials, other_hits / other_trials
    (low, high), (other_low, other_high) = wilson(hits, trials), wilson(other_hits, other_trials)
    apart = share - other
    return (
        apart - float(np.hypot(share - low, other_high - other)),
        apart + float(np.hypot(high - share, other - other_low)),
    )
