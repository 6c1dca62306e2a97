"""Terms of many texts at a time: the words of a batch are numbered, and a term is one integer of their numbers.

The rules are those of ``terms``, which takes one text at a time. Work on strings is done once a distinct word; what is
done once a word or a candidate is numpy.
"""

import threading
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from lookalike.data.text.terms import MAX_LENGTH, MAX_WORDS, STOP_WORDS, has_letter, singular, tokens_of, word_of
from lookalike.data.text.vocabulary import BITS, LIMIT, Integers, Vocabulary

MOST_KEPT = 300_000  # tokens whose words are kept from batch to batch
_SKIP, _BREAK = -1, -2


class Lexicon(dict[str, int]):
    """Token -> the number of its word; words met for the first time are numbered, and described once.

    It is a cache: texts of one language use the same words again, and numbers mean nothing outside it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._numbers: dict[str, int] = {}
        self.words: list[str] = []
        self._new: list[tuple[int, int, bool, bool]] = []
        self.array = pa.array([], pa.string())
        self.single, self.size = np.zeros(0, np.int64), np.zeros(0, np.int64)
        self.inner, self.edge = np.zeros(0, bool), np.zeros(0, bool)
        self._translated: tuple[Vocabulary | None, Integers] = (None, np.zeros(0, np.int64))

    def __missing__(self, token: str) -> int:
        word = word_of(token)
        self[token] = code = _BREAK if word is None else self._number(word) if word else _SKIP
        return code

    def _number(self, word: str) -> int:
        if (known := self._numbers.get(word)) is not None:
            return known
        number = self._numbers[word] = len(self.words)
        assert number < LIMIT, "a batch of texts is bounded so that it cannot have so many words"
        self.words.append(word)
        inner, at = has_letter(word), len(self._new)
        self._new.append((number, len(word), inner, inner and word not in STOP_WORDS))
        if (single := singular(word)) != word:
            self._new[at] = (self._number(single), *self._new[at][1:])
        return number

    def settle(self) -> None:
        """Bring the arrays up to the words."""
        if not self._new:
            return
        single, size, inner, edge = zip(*self._new, strict=True)
        self.single, self.size = np.append(self.single, single), np.append(self.size, size)
        self.inner, self.edge = np.append(self.inner, inner), np.append(self.edge, edge)
        self.array = pa.concat_arrays([self.array, pa.array(self.words[len(self.array) :], pa.string())])
        self._new = []

    def translate(self, vocabulary: Vocabulary) -> Integers:
        """Number + 1 of each word in the vocabulary; 0 for one that is not in it."""
        of, numbers = self._translated
        if of is not vocabulary:
            numbers = np.zeros(0, np.int64)
        new = [vocabulary.words.get(word, -1) + 1 for word in self.words[len(numbers) :]]
        numbers = np.append(numbers, np.array(new, np.int64))
        self._translated = (vocabulary, numbers)
        return numbers


_thread = threading.local()


def _lexicon() -> Lexicon:
    """This thread's lexicon, a fresh one when it has grown large."""
    kept: Lexicon | None = getattr(_thread, "lexicon", None)
    if kept is None or max(len(kept), len(kept.words)) > MOST_KEPT:
        kept = _thread.lexicon = Lexicon()
    return kept


class Phrases:
    """Texts cut into numbered words. ``texts`` should be distinct; results name them by their index."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.lexicon = _lexicon()
        tokens = [tokens_of(text) for text in texts]
        size = np.fromiter(map(len, tokens), np.int64, len(tokens))
        word = np.fromiter(map(self.lexicon.__getitem__, chain.from_iterable(tokens)), np.int64, int(size.sum()))
        self.lexicon.settle()
        text = np.repeat(np.arange(len(texts)), size)
        phrase = np.cumsum((word == _BREAK) | (np.diff(text, prepend=-1) > 0))
        keep = word >= 0
        self.word, self.text, phrase = word[keep], text[keep], phrase[keep]
        self.count = len(texts)
        self.left = self._left(phrase)

    @staticmethod
    def _left(phrase: Integers) -> Integers:
        """Words from each word to the end of its phrase, itself included."""
        size = np.bincount(phrase)
        return np.asarray(np.cumsum(size)[phrase] - np.arange(len(phrase)), dtype=np.int64)

    def _spans(self, at: Integers, length: int) -> NDArray[np.bool_]:
        """Whether the ``length`` words from each of ``at`` make a term."""
        first, last = self.word[at], self.word[at + length - 1]
        fine = self.lexicon.edge[first] & self.lexicon.edge[last]
        size = self.lexicon.size[self.lexicon.single[last]] + length - 1
        for offset in range(length - 1):
            inner = self.word[at + offset]
            size += self.lexicon.size[inner]
            fine &= self.lexicon.inner[inner]
        return np.asarray(fine & (size > 1) & (size <= MAX_LENGTH))

    def _keys(self, at: Integers, length: int, numbers: Integers, singles: Integers) -> Integers:
        key = singles[self.word[at + length - 1]]
        for offset in range(length - 1):
            key = key | numbers[self.word[at + offset]] << BITS * (length - 1 - offset)
        return key

    def _own_keys(self, at: Integers, length: int) -> Integers:
        return self._keys(at, length, np.arange(1, len(self.lexicon.words) + 1), self.lexicon.single + 1)

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
        words = self.lexicon.array
        ends = np.searchsorted(keys, [1 << BITS, 1 << 2 * BITS])
        chunks = []
        for length, chunk in enumerate(np.split(keys, ends), start=1):
            columns = [words.take(pa.array((chunk >> BITS * place & LIMIT) - 1)) for place in reversed(range(length))]
            chunks.append(pc.binary_join_element_wise(*columns, " "))
        return pa.concat_arrays(chunks)

    def _entries(
        self, at: Integers, length: int, vocabulary: Vocabulary, numbers: Integers
    ) -> tuple[Integers, Integers]:
        """The places of ``at`` where a term of ``length`` words is an entry of the vocabulary, and the entries."""
        singles = numbers[self.lexicon.single]
        known = singles[self.word[at + length - 1]] > 0
        for offset in range(length - 1):
            known &= numbers[self.word[at + offset]] > 0
        at = at[known]
        at = at[self._spans(at, length)]
        entry = vocabulary.find(self._keys(at, length, numbers, singles))
        return at[entry >= 0], entry[entry >= 0]

    def named(self, vocabulary: Vocabulary) -> tuple[Integers, Integers]:
        """(text, position) of every vocabulary term within a phrase, whatever longer term it stands in."""
        numbers = self.lexicon.translate(vocabulary)
        found = []
        for length in range(1, MAX_WORDS + 1):
            at = np.nonzero(self.left >= length)[0]
            at, entry = self._entries(at, length, vocabulary, numbers)
            found.append((self.text[at], vocabulary.mean(entry)))
        text, position = (np.concatenate(columns) for columns in zip(*found, strict=True))
        return text, position

    def whole_matches(self, vocabulary: Vocabulary) -> Integers:
        """Position of the vocabulary term that each text [count] is as a whole, -1 where it is none."""
        numbers = self.lexicon.translate(vocabulary)
        positions = np.full(self.count, -1, np.int64)
        for length, _, at in self._short():
            place, entry = self._entries(at, length, vocabulary, numbers)
            positions[self.text[place]] = vocabulary.mean(entry)
        return positions

    def matches(self, vocabulary: Vocabulary) -> tuple[Integers, Integers]:
        """(text, position) of the terms that texts name: the longest at each place, and the terms it ends in."""
        numbers = self.lexicon.translate(vocabulary)
        length_at, entry_at = np.ones(len(self.word), np.int64), np.full(len(self.word), -1, np.int64)
        for length in range(1, MAX_WORDS + 1):
            at = np.nonzero(self.left >= length)[0]
            at, entry = self._entries(at, length, vocabulary, numbers)
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
