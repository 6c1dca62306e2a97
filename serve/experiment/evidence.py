"""Evidence that a mean exceeds a limit, which may be looked at after every value.

A gambler starts with a capital of 1 and bets that values in [0, 1] are larger than ``limit`` on average. As long as the
mean of the next value, given those before it, is at most the limit, no bet pays on average, so the probability that the
capital ever reaches 1 / a is at most a (Ville's inequality; Waudby-Smith and Ramdas 2024, "Estimating means of bounded
random variables by betting"). The capital is spread over bets from timid to bold. Each value also brings a small fresh
bet, so an arm that turns bad late is found as well.
"""

from math import log
from typing import Any

import numpy as np
import numpy.typing as npt

BOLDNESS = 2.0 ** -np.arange(0, 12.5, 0.5)
"""Bets, as shares of the largest possible bet."""
SPAN = 1000
"""Number of values until four tenths of the capital are bet."""
MOST = 1e100
"""A bet that wins more is cut to this, so that products stay finite."""

Bets = npt.NDArray[np.float64]


class Evidence:
    """The capital after any number of values, and the recent stretch of values that exceeds the limit."""

    def __init__(self, limit: float) -> None:
        self.limit = limit
        """Highest mean that is allowed, in [0, 1)."""
        self.num = 0
        """Number of values."""
        self.stretch = (0.0, 0)
        """Sum and number of the values since their running excess over the limit was last zero."""
        self._bets: Bets = np.zeros(len(BOLDNESS))

    @property
    def capital(self) -> float:
        """The capital: 1 / capital bounds the probability of so much evidence against a mean within the limit."""
        return unspent(self.num) + float(self._bets.sum())

    def add(self, value: float) -> None:
        """Take the next ``value``, in [0, 1]."""
        self._bets = play(self._bets, value, self.limit, self.num)
        self.num += 1
        total, num = self.stretch[0] + value, self.stretch[1] + 1
        self.stretch = (total, num) if total > self.limit * num else (0.0, 0)


def unspent(num: int) -> float:
    """Share of the capital that is not bet before value ``num``, counted from 0."""
    return 1 / (1 + log(1 + num / SPAN))


def play(bets: Bets, value: npt.ArrayLike, limit: float, num: int) -> Bets:
    """Return the bets [..., b] after value number ``num`` of each row, ``value`` [...]."""
    placed = bets + (unspent(num) - unspent(num + 1)) / len(BOLDNESS)
    values: npt.NDArray[Any] = np.asarray(value, np.float64)[..., None]
    if limit > 0:
        return np.minimum(placed * (1 + BOLDNESS * ((values - limit) / limit)), MOST)
    return np.where(values > 0, MOST, placed * (1 - BOLDNESS))  # a value above 0 is impossible within a limit of 0
