"""Terms of many texts at a time: the words of a batch are numbered, and a term is one integer of their numbers.

The rules are those of ``terms``, which takes one text at a time. Work on strings is done once a distinct word; what is
done once a word or a candidate is numpy. A key holds up to three numbers of 21 bits, the last word's lowest.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from lookalike.data.terms import (
    MAX_LENGTH,
    MAX_WORDS,
    STOP_WORDS,
    endings,
    has_letter,
    singular,
    tokens_of,
    word_of,
)
from lookalike.errors import UsageError

BITS = 21
LIMIT = (1 << BITS) - 1  # words that can be numbered; 0 stands for no word
Integers = NDArray[np.int64]
_SKIP, _BREAK = -1, -2


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
            raise UsageError(f"the vocabulary has more than {LIMIT} different words; raise annotations.min_images or "
                             "set annotations.max_terms")  # fmt: skip
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


class _Fact(NamedTuple):
    """A word and what is asked of it: its singular, and whether it may stand in a term and at its ends."""

    word: str
    single: str
    inner: bool
    edge: bool


@lru_cache(maxsize=100_000)
def _fact(token: str) -> _Fact | None:
    """None for a token that ends a phrase; an empty word for one to skip."""
    word = word_of(token)
    if word is None:
        return None
    inner = has_letter(word)
    return _Fact(word, singular(word), inner, inner and word not in STOP_WORDS)


class Phrases:
    """Texts cut into numbered words. ``texts`` should be distinct; results name them by their index."""

    def __init__(self, texts: Sequence[str]) -> None:
        tokens = [tokens_of(text) for text in texts]
        flat = list(chain.from_iterable(tokens))
        code = self._describe(list(dict.fromkeys(flat)))
        word = np.fromiter(map(code.__getitem__, flat), np.int64, len(flat))
        text = np.repeat(np.arange(len(texts)), np.fromiter(map(len, tokens), np.int64, len(tokens)))
        phrase = np.cumsum((word == _BREAK) | (np.diff(text, prepend=-1) > 0))
        keep = word >= 0
        self.word, self.text, phrase = word[keep], text[keep], phrase[keep]
        self.count = len(texts)
        self.left = self._left(phrase)

    def _describe(self, tokens: list[str]) -> dict[str, int]:
        """Number the words of these tokens and note what terms need of them; the number of each token's word."""
        facts = [_fact(token) for token in tokens]
        numbers: dict[str, int] = {}
        code = [_BREAK if f is None else numbers.setdefault(f.word, len(numbers)) if f.word else _SKIP for f in facts]
        of = {f.word: f for f in facts if f is not None}
        written = [of[word] for word in numbers]
        self.single = np.array([numbers.setdefault(f.single, len(numbers)) for f in written], np.int64)
        assert len(numbers) < LIMIT, "a batch of texts is bounded so that it cannot have so many words"
        self.words = list(numbers)
        self.size = np.fromiter(map(len, self.words), np.int64, len(self.words))
        self.inner = np.array([f.inner for f in written], bool)
        self.edge = np.array([f.edge for f in written], bool)
        return dict(zip(tokens, code, strict=True))

    @staticmethod
    def _left(phrase: Integers) -> Integers:
        """Words from each word to the end of its phrase, itself included."""
        last = np.searchsorted(phrase, phrase, side="right")
        return np.asarray(last - np.arange(len(phrase)), dtype=np.int64)

    def _spans(self, at: Integers, length: int) -> NDArray[np.bool_]:
        """Whether the ``length`` words from each of ``at`` make a term."""
        first, last = self.word[at], self.word[at + length - 1]
        fine = self.edge[first] & self.edge[last]
        size = self.size[self.single[last]] + length - 1
        for offset in range(length - 1):
            inner = self.word[at + offset]
            size += self.size[inner]
            fine &= self.inner[inner]
        return np.asarray(fine & (size > 1) & (size <= MAX_LENGTH))

    def _keys(self, at: Integers, length: int, numbers: Integers, singles: Integers) -> Integers:
        key = singles[self.word[at + length - 1]]
        for offset in range(length - 1):
            key = key | numbers[self.word[at + offset]] << BITS * (length - 1 - offset)
        return key

    def _own_keys(self, at: Integers, length: int) -> Integers:
        return self._keys(at, length, np.arange(1, len(self.words) + 1), self.single + 1)

    def ngrams(self) -> tuple[Integers, Integers]:
        """(text, key) of every candidate term within a phrase, in the order of the texts; some may recur."""
        found = []
        for length in range(1, MAX_WORDS + 1):
            at = np.nonzero(self.left >= length)[0]
            at = at[self._spans(at, length)]
            found.append((self.text[at], self._own_keys(at, length)))
        text, key = (np.concatenate(columns) for columns in zip(*found, strict=True))
        order = np.argsort(text, kind="stable")
        return text[order], key[order]

    def whole(self) -> Integers:
        """Key of each text [count] taken as one term, 0 where it makes none."""
        keys = np.zeros(self.count, np.int64)
        for length, texts, at in self._short():
            keys[texts] = self._own_keys(at, length)
        return keys

    def _short(self) -> Iterator[tuple[int, Integers, Integers]]:
        words = np.bincount(self.text, minlength=self.count)
        start = np.cumsum(words) - words
        for length in range(1, MAX_WORDS + 1):
            texts = np.nonzero(words == length)[0]
            fine = self._spans(start[texts], length)
            yield length, texts[fine], start[texts[fine]]

    def strings(self, keys: Integers) -> Any:
        """The terms that ``keys``, sorted, stand for, as an Arrow array of strings."""
        words = pa.array(self.words, pa.string())
        ends = np.searchsorted(keys, [1 << BITS, 1 << 2 * BITS])
        chunks = []
        for length, chunk in enumerate(np.split(keys, ends), start=1):
            columns = [words.take(pa.array((chunk >> BITS * place & LIMIT) - 1)) for place in reversed(range(length))]
            chunks.append(pc.binary_join_element_wise(*columns, " "))
        return pa.concat_arrays(chunks)

    def _translate(self, vocabulary: Vocabulary) -> tuple[Integers, Integers]:
        numbers = np.array([vocabulary.words.get(word, -1) + 1 for word in self.words], np.int64)
        return numbers, numbers[self.single]

    def _entries(self, at: Integers, length: int, vocabulary: Vocabulary, numbers: Integers,
                 singles: Integers) -> tuple[Integers, Integers]:  # fmt: skip
        """The places of ``at`` where a term of ``length`` words is an entry of the vocabulary, and the entries."""
        known = singles[self.word[at + length - 1]] > 0
        for offset in range(length - 1):
            known &= numbers[self.word[at + offset]] > 0
        at = at[known]
        at = at[self._spans(at, length)]
        entry = vocabulary.find(self._keys(at, length, numbers, singles))
        return at[entry >= 0], entry[entry >= 0]

    def named(self, vocabulary: Vocabulary) -> tuple[Integers, Integers]:
        """(text, position) of every vocabulary term within a phrase, whatever longer term it stands in."""
        numbers, singles = self._translate(vocabulary)
        found = []
        for length in range(1, MAX_WORDS + 1):
            at = np.nonzero(self.left >= length)[0]
            at, entry = self._entries(at, length, vocabulary, numbers, singles)
            found.append((self.text[at], vocabulary.mean(entry)))
        text, position = (np.concatenate(columns) for columns in zip(*found, strict=True))
        return text, position

    def whole_matches(self, vocabulary: Vocabulary) -> Integers:
        """Position of the vocabulary term that each text [count] is as a whole, -1 where it is none."""
        numbers, singles = self._translate(vocabulary)
        positions = np.full(self.count, -1, np.int64)
        for length, _, at in self._short():
            place, entry = self._entries(at, length, vocabulary, numbers, singles)
            positions[self.text[place]] = vocabulary.mean(entry)
        return positions

    def matches(self, vocabulary: Vocabulary) -> tuple[Integers, Integers]:
        """(text, position) of the terms that texts name: the longest at each place, and the terms it ends in."""
        numbers, singles = self._translate(vocabulary)
        length_at, entry_at = np.ones(len(self.word), np.int64), np.full(len(self.word), -1, np.int64)
        for length in range(1, MAX_WORDS + 1):
            at = np.nonzero(self.left >= length)[0]
            at, entry = self._entries(at, length, vocabulary, numbers, singles)
            length_at[at], entry_at[at] = length, entry
        at = _reached(length_at)
        at = at[entry_at[at] >= 0]
        positions, index = vocabulary.end(entry_at[at])
        return self.text[at[index]], positions


def _reached(step: Integers) -> Integers:
    """The places visited from 0 when each place says how far the next one is."""
    far, end, place = step.tolist(), len(step), 0
    visited = []
    while place < end:
        visited.append(place)
        place += far[place]
    return np.array(visited, np.int64)
