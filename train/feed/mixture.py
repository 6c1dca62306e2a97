"""Which datasets fill a forward pass: over time each has its share exactly, however few rows a pass has."""

from collections.abc import Iterable, Mapping
from fractions import Fraction

from lookalike.errors import UsageError


class Mixture:
    """Rows of each dataset in forward passes of ``rows`` rows, by the weights ``mix``.

    The passes are filled one after the other. At any point a dataset has had its share of the rows so far, to within a
    row or two (half a row with two datasets), so a share below one row brings a row every so many passes. The datasets
    ``fixed`` have the same number of rows in every pass, their share rounded, because balanced rows come in runs.

    Raises ``UsageError`` if a fixed dataset's share is rounded to nothing.
    """

    def __init__(self, rows: int, mix: Mapping[str, float], fixed: Iterable[str] = ()) -> None:
        self.rows = rows
        self.weights = {name: Fraction(weight) for name, weight in mix.items()}
        self.fixed = self._round(frozenset(fixed))
        self.free = rows - sum(self.fixed.values())
        """Rows of a pass that the other datasets share."""

    def _round(self, fixed: frozenset[str]) -> dict[str, int]:
        """Rows of the fixed datasets: the largest remainders of all datasets are rounded up."""
        exact = {name: self.rows * self.wanted(name) for name in self.weights}
        counts = {name: int(share) for name, share in exact.items()}
        by_remainder = sorted(exact, key=lambda name: (counts[name] - exact[name], name))
        for name in by_remainder[: self.rows - sum(counts.values())]:
            counts[name] += 1
        if empty := [name for name in counts if name in fixed and not counts[name]]:
            raise UsageError(
                f"a forward pass of {self.rows} pictures has no place for the balanced dataset {empty[0]!r}; raise "
                "batch_size or its weight in mix"
            )
        return {name: counts[name] for name in counts if name in fixed}

    def wanted(self, name: str) -> Fraction:
        """A dataset's share of all rows, by its weight."""
        return self.weights[name] / sum(self.weights.values())

    def share(self, name: str) -> Fraction:
        """A dataset's share of all rows, as it is given."""
        if name in self.fixed:
            return Fraction(self.fixed[name], self.rows)
        free = sum(weight for other, weight in self.weights.items() if other not in self.fixed)
        return Fraction(self.free, self.rows) * self.weights[name] / free

    def first(self, passes: int) -> dict[str, int]:
        """Rows of each dataset in the first ``passes`` passes.

        One dataset after the other takes its share of what those before it left, rounded: each count grows with the
        passes, and all add up.
        """
        left, weight = passes * self.free, sum(w for name, w in self.weights.items() if name not in self.fixed)
        counts = {}
        for name, own in self.weights.items():
            if name in self.fixed:
                counts[name] = passes * self.fixed[name]
                continue
            counts[name] = int(left * own / weight + Fraction(1, 2))
            left, weight = left - counts[name], weight - own
        return counts

    def between(self, start: int, stop: int) -> dict[str, int]:
        """Rows of each dataset in the passes ``start`` .. ``stop``."""
        before, after = self.first(start), self.first(stop)
        return {name: after[name] - before[name] for name in after}
