"""What turns records into scored terms, behind one registry.

``lexical`` reads every text field of a record against a vocabulary mined from the training rows, or supplied;
``precomputed`` takes the output of the user's own keyword model.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lookalike.data.text.phrases import Phrases
from lookalike.data.text.terms import canonical
from lookalike.data.text.textfields import Entries, Fields, flatten_scored
from lookalike.data.text.vocabulary import Integers, Vocabulary, expand
from lookalike.registry import Registry

if TYPE_CHECKING:
    from lookalike.data.text.settings import AnnotationConfig

FREE_TEXT = ("title", "description")
OWNERS = ("creator", "dataset")


class Annotator(ABC):
    """Turns records into terms. Made once a task; keeps no state between records.

    ``records`` has the ``TEXT_COLUMNS`` that the corpus has. Results are tables with the columns ``row`` (int64, of the
    record in ``records``), ``term`` (string, dictionary-encoded if the annotator likes) and, for ``annotate``,
    ``score`` (float64); a pair of row and term may recur.
    """

    def __init__(self, config: AnnotationConfig) -> None:
        self.config = config

    @abstractmethod
    def candidates(self, records: pa.Table) -> pa.Table:
        """(row, term): canonical terms each record proposes for the vocabulary."""

    @abstractmethod
    def annotate(self, records: pa.Table, vocabulary: Vocabulary) -> pa.Table:
        """(row, term, score): terms of the vocabulary each record names."""


ANNOTATORS: Registry[type[Annotator]] = Registry("annotator")


@ANNOTATORS.register("lexical")
class Lexical(Annotator):
    """Candidates are n-grams; a term scores 1 - prod(1 - weight) over the fields that name it.

    Free text names the longest terms in it; a keyword or a part of a category names itself, or, when it is no term,
    what it holds. Names of the record's creator or data set are no terms of it: they say who made the picture.
    """

    def candidates(self, records: pa.Table) -> pa.Table:
        """Terms of the fields that can make an annotation by themselves."""
        names = [name for name, weight in self.config.field_weights.items() if weight >= self.config.min_score]
        fields = Fields(records, [*names, *OWNERS], self.config.max_characters)
        phrases = Phrases(fields.texts)
        text, key = phrases.ngrams()
        count, whole = np.bincount(text, minlength=phrases.count), phrases.whole()
        rows, keys = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        for name in names:
            entries = self._readable(fields, name)
            if name in FREE_TEXT:
                found, index = expand(entries.text, count, key)
            else:
                index = np.nonzero(whole[entries.text])[0]
                found = whole[entries.text[index]]
            rows.append(entries.row[index])
            keys.append(found)
        row, (terms, code) = np.concatenate(rows), np.unique(np.concatenate(keys), return_inverse=True)
        keep = ~_is_own(row, code, len(terms), _own(fields, count, key, terms))
        named = pa.DictionaryArray.from_arrays(pa.array(code[keep], pa.int32()), phrases.strings(terms))
        return pa.table({"row": row[keep], "term": named})

    def annotate(self, records: pa.Table, vocabulary: Vocabulary) -> pa.Table:
        """Noisy-or over the fields, in the order of the settings."""
        fields = Fields(records, list(self.config.field_weights), self.config.max_characters)
        phrases = Phrases(fields.texts)
        text, position = phrases.matches(vocabulary)
        count, whole = np.bincount(text, minlength=phrases.count), phrases.whole_matches(vocabulary)
        size = max(len(vocabulary), 1)
        pairs, strengths = [], []
        for name in self.config.field_weights:
            entries = self._readable(fields, name)
            direct = np.where(name in FREE_TEXT, -1, whole[entries.text])
            within, index = expand(entries.text[direct < 0], count, position)
            row = np.concatenate([entries.row[direct >= 0], entries.row[direct < 0][index]])
            pairs.append(row * size + np.concatenate([direct[direct >= 0], within]))
            strength = entries.strength
            strengths.append(np.concatenate([strength[direct >= 0], strength[direct < 0][index]]))
        pair, score = _noisy_or(pairs, strengths, list(self.config.field_weights.values()))
        row, code = pair // size, pair % size
        keep = ~_is_own(row, code, size, self._own_positions(records, vocabulary))
        named = pa.DictionaryArray.from_arrays(pa.array(code[keep], pa.int32()), vocabulary.array)
        return pa.table({"row": row[keep], "term": named, "score": score[keep]})

    def _readable(self, fields: Fields, name: str) -> Entries:
        """A category is not asked for its language: it comes from the one taxonomy of its source."""
        return fields[name] if name == "category" else fields.in_language(name, self.config.language)

    def _own_positions(self, records: pa.Table, vocabulary: Vocabulary) -> tuple[Integers, Integers]:
        owners = Fields(records, OWNERS, self.config.max_characters)
        text, position = Phrases(owners.texts).named(vocabulary)
        order = np.argsort(text, kind="stable")
        return _of_owners(owners, np.bincount(text, minlength=len(owners.texts)), position[order])


def _of_owners(fields: Fields, count: Integers, values: Integers) -> tuple[Integers, Integers]:
    """(row, value) of everything the names of each record's owners hold."""
    found = [(fields[name].row, *expand(fields[name].text, count, values)) for name in OWNERS]
    return np.concatenate([row[index] for row, _, index in found]), np.concatenate([value for _, value, _ in found])


def _own(fields: Fields, count: Integers, key: Integers, terms: Integers) -> tuple[Integers, Integers]:
    row, own = _of_owners(fields, count, key)
    at = np.minimum(np.searchsorted(terms, own), max(len(terms) - 1, 0))
    same = terms[at] == own if len(terms) else np.zeros(len(own), bool)
    return row[same], at[same]


def _is_own(row: Integers, code: Integers, size: int, own: tuple[Integers, Integers]) -> NDArray[np.bool_]:
    named = np.zeros(size, bool)
    named[own[1]] = True
    doubtful = np.nonzero(named[code])[0]
    result = np.zeros(len(row), bool)
    result[doubtful] = np.isin(row[doubtful] * size + code[doubtful], own[0] * size + own[1])
    return result


def _noisy_or(
    pairs: list[Integers], strengths: list[NDArray[np.float64]], weights: list[float]
) -> tuple[Integers, NDArray[np.float64]]:
    """The distinct pairs of all fields and 1 - prod(1 - weight x the pair's greatest strength in the field)."""
    distinct, inverse = np.unique(np.concatenate([np.zeros(0, np.int64), *pairs]), return_inverse=True)
    doubt = np.ones(len(distinct))
    start = 0
    for pair, strength, weight in zip(pairs, strengths, weights, strict=True):
        best = np.zeros(len(distinct))
        np.maximum.at(best, inverse[start : start + len(pair)], strength)
        doubt *= 1.0 - weight * best
        start += len(pair)
    return distinct, 1.0 - doubt


@ANNOTATORS.register("precomputed")
class Precomputed(Annotator):
    """Terms and scores of the user's own keyword model, brought into canonical form."""

    def candidates(self, records: pa.Table) -> pa.Table:
        """The terms that can make an annotation."""
        row, terms, score = self._given(records)
        code, distinct = _canonical_codes(terms)
        keep = (code >= 0) & (score >= self.config.min_score)
        return pa.table({"row": row[keep], "term": pa.array(distinct, pa.string()).take(pa.array(code[keep]))})

    def annotate(self, records: pa.Table, vocabulary: Vocabulary) -> pa.Table:
        """The user's score of each term."""
        row, terms, score = self._given(records)
        code, distinct = _canonical_codes(terms)
        position = np.array([*(vocabulary.position(term) for term in distinct), -1], np.int64)[code]
        keep = position >= 0
        return pa.table(
            {"row": row[keep], "term": vocabulary.array.take(pa.array(position[keep])), "score": score[keep]}
        )

    def _given(self, records: pa.Table) -> tuple[Integers, Any, NDArray[np.float64]]:
        name = self.config.scores_from
        if name == "annotations":
            if name not in records.column_names or pa.types.is_null(records.schema.field(name).type):
                return np.zeros(0, np.int64), pa.array([], pa.string()), np.zeros(0)
            return flatten_scored(records[name], "score")
        fields = Fields(records, [name], self.config.max_characters)
        parsed = [parse_scored(text) for text in fields.texts]
        entries = fields[name]
        score = np.array([value for _, value in parsed], np.float64)[entries.text]
        return entries.row, pa.array([term for term, _ in parsed], pa.string()).take(pa.array(entries.text)), score


def _canonical_codes(terms: Any) -> tuple[Integers, list[str]]:
    """The canonical form of each term as an index of the distinct ones; -1 for what is no term."""
    encoded = terms.dictionary_encode()
    numbers: dict[str, int] = {}
    forms = (canonical(term) for term in encoded.dictionary.to_pylist())
    code = np.array([-1 if form is None else numbers.setdefault(form, len(numbers)) for form in forms], np.int64)
    return code[encoded.indices.to_numpy(zero_copy_only=False)], list(numbers)


def parse_scored(keyword: str) -> tuple[str, float]:
    """Term and score of ``term:0.83``; a keyword without a number has score 1."""
    text, _, tail = keyword.rpartition(":")
    try:
        score = float(tail) if text else 1.0
    except ValueError:
        return keyword, 1.0
    return text or keyword, 0.0 if math.isnan(score) else min(1.0, max(0.0, score))
