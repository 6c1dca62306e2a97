"""Adaptive classification: the first nested dim that is sure enough answers (Kusupati et al. 2022, section 4.2.1).

Inputs are, for each nested dim m_1 < ... < m_j, probabilities [n, C]: of a held-out part of the training rows to learn
thresholds from, of test rows to apply them.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lookalike.train.evaluate.classifiers import Classes, Floats

GRID: Floats = np.linspace(0.1, 1.0, 100)
"""Thresholds that are tried: the paper's."""


class Cascade(NamedTuple):
    """What a cascade answered."""

    answers: Classes
    """int64 [n]: class of each row."""
    stops: Classes
    """int64 [n]: number of the dim that answered."""


def learn_thresholds(probabilities: Sequence[Floats], y: Classes) -> list[float]:
    """A threshold for each dim but the last, pair by pair: rows above it take the dim's answer, others the next dim's.

    Of the grid's thresholds with the best accuracy the smallest is taken, which leaves most to the smaller dim.
    """
    right = [p.argmax(axis=1) == y for p in probabilities]
    thresholds = []
    for p, own, following in zip(probabilities, right, right[1:], strict=False):
        sure = p.max(axis=1)[None, :] > GRID[:, None]
        accuracy = np.where(sure, own, following).mean(axis=1)
        thresholds.append(float(GRID[int(accuracy.argmax())]))
    return thresholds


def apply_thresholds(probabilities: Sequence[Floats], thresholds: Sequence[float]) -> Cascade:
    """Each row goes from dim to dim until its largest probability is above the dim's threshold, or to the last dim."""
    num_rows, last = len(probabilities[0]), len(probabilities) - 1
    answers, stops = np.full(num_rows, -1, np.int64), np.full(num_rows, last, np.int64)
    waiting = np.arange(num_rows)
    for number, p in enumerate(probabilities):
        here = p[waiting]
        done = np.ones(len(waiting), bool) if number == last else here.max(axis=1) > thresholds[number]
        answers[waiting[done]], stops[waiting[done]] = here[done].argmax(axis=1), number
        waiting = waiting[~done]
    return Cascade(answers, stops)


def expected_dims(stops: npt.NDArray[np.int64], dims: Sequence[int]) -> tuple[float, float]:
    """Mean of the dim that answered, and mean of the sum of all dims that were tried.

    The paper states the first, 37 for its ResNet-50; the second is the work of a cascade whose dims are separate heads,
    62 there (appendix D.1).
    """
    sizes = np.asarray(dims, np.float64)
    return float(sizes[stops].mean()), float(np.cumsum(sizes)[stops].mean())


def oracle(probabilities: Sequence[Floats], y: Classes) -> npt.NDArray[np.int64]:
    """Number of the first dim that is right, -1 if none is, int64 [n]: the best that any routing could do."""
    right = np.stack([p.argmax(axis=1) == y for p in probabilities])
    return np.asarray(np.where(right.any(axis=0), right.argmax(axis=0), -1))


def majority(probabilities: Sequence[Floats]) -> Classes:
    """The class that most dims answer, of equally frequent ones that of the largest dim, int64 [n]."""
    answers = np.stack([p.argmax(axis=1) for p in probabilities])
    counts = (answers[:, None] == answers[None]).sum(axis=0)
    best = len(answers) - 1 - counts[::-1].argmax(axis=0)
    return np.asarray(answers[best, np.arange(answers.shape[1])])
