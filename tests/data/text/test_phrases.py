"""The batch functions against those of ``terms``, which take one text."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lookalike.data.text import phrases
from lookalike.data.text.phrases import Phrases
from lookalike.data.text.terms import canonical, match_terms, ngrams
from lookalike.data.text.vocabulary import Vocabulary, expand

WORDS = [
    "red",
    "Blue",
    "chairs",
    "table",
    "tables",
    "of",
    "the",
    "lamp",
    "12",
    "3d",
    "office",
    ",",
    "-",
    "&",
    "'",
    "\n",
    "women's",
    "Fl\u00fcgel",
    "\u0441hair",
    "x" * 40,
    "\U0001f525",
]
TEXTS = st.lists(
    st.one_of(st.lists(st.sampled_from(WORDS), max_size=9).map(" ".join), st.text(max_size=30)), max_size=6
)
TERMS = st.sets(
    st.sampled_from(
        [
            "red",
            "chair",
            "table",
            "lamp",
            "office chair",
            "office",
            "red table",
            "blue lamp",
            "office of lamp",
            "red office chair",
            "woman",
            "3d lamp",
        ]
    ),
    min_size=1,
)


@settings(deadline=None)
@given(TEXTS)
def test_ngrams_are_those_of_each_text(texts: list[str]) -> None:
    batch = Phrases(texts)
    text, key = batch.ngrams()
    keys = np.unique(key)
    strings = dict(zip(keys.tolist(), batch.strings(keys).to_pylist(), strict=True))
    found: list[set[str]] = [set() for _ in texts]
    for at, number in zip(text.tolist(), key.tolist(), strict=True):
        found[at].add(strings[number])
    assert found == [ngrams(t) for t in texts]
    assert len(set(strings.values())) == len(strings)


@settings(deadline=None)
@given(TEXTS)
def test_whole_texts_have_their_canonical_form(texts: list[str]) -> None:
    batch = Phrases(texts)
    keys = batch.whole()
    distinct = np.unique(keys[keys > 0])
    strings = dict(zip(distinct.tolist(), batch.strings(distinct).to_pylist(), strict=True))
    assert [strings.get(key) for key in keys.tolist()] == [canonical(t) for t in texts]


@settings(deadline=None)
@given(TEXTS, TERMS)
def test_matches_are_those_of_each_text(texts: list[str], terms: set[str]) -> None:
    vocabulary = Vocabulary(terms)
    batch = Phrases(texts)
    found: list[set[str]] = [set() for _ in texts]
    for at, position in zip(*(a.tolist() for a in batch.matches(vocabulary)), strict=True):
        found[at].add(vocabulary.terms[position])
    assert found == [match_terms(t, terms) for t in texts]
    whole = [None if p < 0 else vocabulary.terms[p] for p in batch.whole_matches(vocabulary).tolist()]
    assert whole == [term if (term := canonical(t)) in terms else None for t in texts]


@settings(deadline=None)
@given(TEXTS, TERMS)
def test_named_terms_are_the_ngrams_in_the_vocabulary(texts: list[str], terms: set[str]) -> None:
    vocabulary, found = Vocabulary(terms), [set[str]() for _ in texts]
    for at, position in zip(*(a.tolist() for a in Phrases(texts).named(vocabulary)), strict=True):
        found[at].add(vocabulary.terms[position])
    assert found == [ngrams(t) & terms for t in texts]


def test_an_alias_is_matched_as_its_term() -> None:
    vocabulary = Vocabulary(["sofa", "red"], {"couch": "sofa", "sofa bed": "sofa", "stool": "chair"})
    assert vocabulary.terms == ["red", "sofa"]
    _, position = Phrases(["A leather couch", "sofa beds", "stools"]).matches(vocabulary)
    assert position.tolist() == [1, 1]
    assert "sofa" in vocabulary
    assert "couch" not in vocabulary
    assert [vocabulary.position(t) for t in ("couch", "sofa", "stool")] == [1, 1, -1]


def test_an_empty_vocabulary_matches_nothing() -> None:
    assert not len(Phrases(["red sofa"]).matches(Vocabulary([]))[0])
    assert not len(Phrases([]).ngrams()[0])


def test_expand_repeats_the_values_of_groups() -> None:
    values, index = expand(np.array([2, 0, 1, 2]), np.array([1, 0, 2]), np.array([5, 7, 8]))
    assert (values.tolist(), index.tolist()) == ([7, 8, 5, 7, 8], [0, 0, 1, 3, 3])


def test_the_words_kept_between_batches_change_nothing_and_do_not_grow_without_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(phrases, "MOST_KEPT", 50)
    vocabulary = Vocabulary([f"red lamp{number}" for number in range(0, 200, 2)])
    sizes = []
    for number in range(200):
        batch = Phrases([f"Red lamps{number}", f"red lamp{number} {'s' * number}"])
        text, position = batch.matches(vocabulary)
        expected = [] if number % 2 else [(1, f"red lamp{number}")]
        assert [(t, vocabulary.terms[p]) for t, p in zip(text.tolist(), position.tolist(), strict=True)] == expected
        sizes.append(len(batch.lexicon))
    assert max(sizes) < 60
