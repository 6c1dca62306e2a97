"""Classifiers on frozen prefixes: class means, ridge regression in closed form, softmax regression.

Each takes prefixes x float32 [n, m] and class numbers y int64 [n] in 0 .. C - 1 and returns a ``Linear``, whose scores
order the classes. Protocols of Kusupati et al. 2022, section 4.2 and appendix E.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

Floats = npt.NDArray[np.float64]
Vectors = npt.NDArray[np.float32]
Classes = npt.NDArray[np.int64]
MOST_STEPS = 200
"""Steps of L-BFGS; it stops before where nothing is left to gain."""


class Linear(NamedTuple):
    """Scores x W + b of C classes."""

    weight: Floats
    """float64 [m, C]."""
    bias: Floats
    """float64 [C]."""

    def scores(self, x: Vectors) -> Floats:
        """float64 [n, C] of prefixes [n, m]."""
        return np.asarray(x.astype(np.float64) @ self.weight + self.bias)


def nearest_class_mean(x: Vectors, y: Classes, num_classes: int) -> Linear:
    """The class whose mean is nearest (Mensink et al. 2013): |x - c|^2 without |x|^2, which orders nothing.

    A class without a row is never the nearest.
    """
    sums = np.zeros((num_classes, x.shape[1]))
    np.add.at(sums, y, x.astype(np.float64))
    counts = np.bincount(y, minlength=num_classes)
    means = sums / np.maximum(counts, 1)[:, None]
    return Linear(2 * means.T, np.where(counts > 0, -np.square(means).sum(axis=1), -np.inf))


def ridge(x: Vectors, y: Classes, num_classes: int, penalties: Sequence[float]) -> list[Linear]:
    """Least squares on one-hot classes with a free intercept and ``penalty`` * n * |W|^2, for each of ``penalties``.

    One eigendecomposition of the covariance [m, m] serves all of them.
    """
    wide = x.astype(np.float64)
    mean = wide.mean(axis=0)
    shares = np.bincount(y, minlength=num_classes) / len(y)
    covariance = (wide.T @ wide) / len(x) - np.outer(mean, mean)
    sums = np.zeros((num_classes, x.shape[1]))
    np.add.at(sums, y, wide)
    target = sums.T / len(x) - np.outer(mean, shares)
    values, directions = np.linalg.eigh(covariance)
    turned = directions.T @ target
    fits = []
    for penalty in penalties:
        weight = directions @ (turned / (np.maximum(values, 0) + penalty)[:, None])
        fits.append(Linear(weight, shares - mean @ weight))
    return fits


def softmax_regression(x: Vectors, y: Classes, num_classes: int, penalty: float) -> Linear:
    """Mean cross-entropy plus ``penalty`` / 2 * |W|^2, the intercept free, to the optimum by L-BFGS from zero."""
    rows, classes = torch.from_numpy(x.astype(np.float64)), torch.from_numpy(y)
    weight = torch.zeros(x.shape[1], num_classes, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(num_classes, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=MOST_STEPS, tolerance_grad=1e-7, tolerance_change=1e-10, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = functional.cross_entropy(rows @ weight + bias, classes) + penalty / 2 * weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return Linear(weight.detach().numpy(), bias.detach().numpy())


def softmax(scores: Floats) -> Floats:
    """Probabilities [n, C] of scores [n, C]."""
    exponents = np.exp(scores - scores.max(axis=1, keepdims=True))
    return np.asarray(exponents / exponents.sum(axis=1, keepdims=True))


def is_among_best(scores: Floats, y: Classes, k: int) -> npt.NDArray[np.bool_]:
    """Whether class y is among the ``k`` best scores of each row; of equal scores, the smaller class first."""
    own = scores[np.arange(len(y)), y][:, None]
    smaller = np.arange(scores.shape[1]) < y[:, None]
    return np.asarray(((scores > own) | ((scores == own) & smaller)).sum(axis=1) < k)


def calibration_error(confidence: Floats, correct: npt.NDArray[np.bool_], num_bins: int = 15) -> float:
    """Expected calibration error: the mean over rows of |accuracy - confidence| of their bin of equal width.

    (Guo et al. 2017, equation 5; bins are open below and closed above, as theirs.)
    """
    bins = np.clip(np.ceil(confidence * num_bins).astype(int) - 1, 0, num_bins - 1)
    gaps = np.abs(np.bincount(bins, correct.astype(float), num_bins) - np.bincount(bins, confidence, num_bins))
    return float(gaps.sum() / len(confidence))
