"""The vocabulary as arrays: a term is one integer, its words' numbers side by side.

A key holds up to three numbers of 21 bits, the last word's lowest.
"""

from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lookalike.data.text.terms import endings
from lookalike.errors import UsageError

BITS = 21
LIMIT = (1 << BITS) - 1  # words that can be numbered; 0 stands for no word
Integers = NDArray[np.int64]


class Vocabulary:
    """The terms that annotations may have, ready to be matched against texts.

    ``terms`` are canonical. An alias is matched as the term it stands for, when that is one of ``terms``.
    """

    def __init__(self, terms: Iterable[str], aliases: Mapping[str, str] | None = None) -> None:
        self.terms: list[str] = sorted(set(terms))
        self.array = pa.array(self.terms, pa.string())
        self._position = {term: position for position, term in enumerate(self.terms)}
        meant = {alias: self._position[term] for alias, term in (aliases or {}).items() if term in self._position}
        self._position |= meant
        self.words: dict[str, int] = {}
        entries = [(self._number(entry), entry) for entry in self._position]
        entries.sort()
        self._keys = np.array([key for key, _ in entries], np.int64)
        self._own = np.array([self._position[entry] for _, entry in entries], np.int64)
        ends = [[self._position[e] for e in endings(entry) if e in self._position] for _, entry in entries]
        self._ends_count = np.array([len(e) for e in ends], np.int64)
        self._ends = np.fromiter(chain.from_iterable(ends), np.int64)

    def _number(self, entry: str) -> int:
        key = 0
        for word in entry.split(" "):
            key = key << BITS | (self.words.setdefault(word, len(self.words)) + 1)
        if len(self.words) >= LIMIT:
            raise UsageError(
                f"the vocabulary has more than {LIMIT} different words; raise annotations.min_images or "
                "set annotations.max_terms"
            )
        return key

    def __len__(self) -> int:
        return len(self.terms)

    def __contains__(self, term: str) -> bool:
        position = self._position.get(term)
        return position is not None and self.terms[position] == term

    def position(self, term: str) -> int:
        """Where the term that ``term`` is or stands for is in ``terms``; -1 when it is none."""
        return self._position.get(term, -1)

    def find(self, keys: Integers) -> Integers:
        """Entry of each key, -1 where there is none."""
        if not len(self._keys):
            return np.full(len(keys), -1, np.int64)
        at = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        return np.where(self._keys[at] == keys, at, -1)

    def mean(self, entries: Integers) -> Integers:
        """Positions of the terms that entries are or stand for."""
        return self._own[entries]

    def end(self, entries: Integers) -> tuple[Integers, Integers]:
        """Positions of every term that entries end in, themselves included, and for each its index in ``entries``."""
        return expand(entries, self._ends_count, self._ends)


def expand(groups: Integers, counts: Integers, values: NDArray[Any]) -> tuple[NDArray[Any], Integers]:
    """``values`` of each of ``groups`` in turn, and the index in ``groups`` that each belongs to.

    ``values`` holds ``counts[0]`` values of group 0, then those of group 1, and so on.
    """
    size = counts[groups]
    index = np.repeat(np.arange(len(groups)), size)
    start = np.cumsum(counts) - counts
    within = np.arange(len(index)) - np.repeat(np.cumsum(size) - size, size)
    return values[start[groups][index] + within], index
