"""95% intervals that hold at the ends too: where all of n succeeded, an interval still has a width."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Z = 1.959964
"""97.5% point of the normal distribution."""
Interval = tuple[float, float]


def wilson(hits: int, trials: int, z: float = Z) -> Interval:
    """Wilson's score interval of a share, ``z`` standard errors wide each way; [0, 1] of no trials."""
    if not trials:
        return 0.0, 1.0
    share, spread = hits / trials, z * z / trials
    middle = share + spread / 2
    half = z * np.sqrt(share * (1 - share) / trials + spread / (4 * trials))
    return max(0.0, float((middle - half) / (1 + spread))), min(1.0, float((middle + half) / (1 + spread)))


def mean_interval(values: Sequence[float] | npt.NDArray[np.float64]) -> Interval:
    """Interval of the mean of independent values in [0, 1], such as the recall of one query each; [0, 1] of none.

    Agresti and Coull's idea for more than two values: z^2/2 made-up values of 0 and as many of 1 join the sample, then
    mean and variance give a normal interval. Of zeros and ones it is their interval of a share; values that
    differ less make it narrower. A bootstrap has no width when all values are 1.
    """
    sample = np.asarray(values, np.float64)
    if not len(sample):
        return 0.0, 1.0
    size = len(sample) + Z * Z
    mean = (sample.sum() + Z * Z / 2) / size
    variance = ((sample - mean) ** 2).sum() + Z * Z / 2 * (mean**2 + (1 - mean) ** 2)
    half = Z * np.sqrt(variance / size / size)
    # what was measured always lies inside: of 1s alone the upper end is 1
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
