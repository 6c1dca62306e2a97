"""The tables of ``phrases`` against ``terms``, which takes one text at a time."""

import polars as pl
from hypothesis import given
from hypothesis import strategies as st

from lookalike.data.text.phrases import longest, spans
from lookalike.data.text.terms import canonical, match_terms, ngrams
from lookalike.data.text.vocabulary import Vocabulary

WORDS = "red Blue chairs table tables of the lamp 12 3d office , - & ' women's Fl\u00fcgel \u0441hair \U0001f525"
WORD = st.sampled_from([*WORDS.split(), "\n", "x" * 40])
TEXT = st.lists(WORD, max_size=9).map(" ".join) | st.text(max_size=30)
TEXTS = st.lists(TEXT, max_size=6)
SINGLE = ["red", "chair", "table", "lamp", "office", "woman"]
LONGER = ["office chair", "red table", "blue lamp", "office of lamp", "red office chair", "3d lamp"]
TERMS = st.sets(st.sampled_from(SINGLE + LONGER), min_size=1)


def by_text(frame: pl.DataFrame, texts: list[str]) -> list[set[str]]:
    terms: list[set[str]] = [set() for _ in texts]
    for text, term in frame.select("text", "term").iter_rows():
        terms[text].add(term)
    return terms


def read(texts: list[str], vocabulary: Vocabulary) -> list[set[str]]:
    matches = longest(spans(texts).filter("within").join(vocabulary.spellings, on="term"))
    ends = matches.select("text", position="ends").explode("position")
    return by_text(ends.select("text", vocabulary.terms.gather(ends["position"]).alias("term")), texts)


@given(TEXTS)
def test_spans_within_phrases_are_the_ngrams_of_each_text(texts: list[str]) -> None:
    assert by_text(spans(texts).filter("within"), texts) == [ngrams(text) for text in texts]


@given(TEXTS)
def test_whole_texts_have_their_canonical_form(texts: list[str]) -> None:
    assert by_text(spans(texts).filter("whole"), texts) == [{canonical(text)} - {None} for text in texts]


@given(TEXTS, TERMS)
def test_reading_takes_the_longest_terms_and_what_they_end_in(texts: list[str], terms: set[str]) -> None:
    assert read(texts, Vocabulary(terms)) == [match_terms(text, terms) for text in texts]


def test_an_alias_is_matched_as_its_term() -> None:
    vocabulary = Vocabulary(["sofa", "red"], {"couch": "sofa", "sofa bed": "sofa", "stool": "chair"})
    assert vocabulary.terms.to_list() == ["red", "sofa"]
    assert read(["A leather couch", "sofa beds", "stools"], vocabulary) == [{"sofa"}, {"sofa"}, set()]
    assert "sofa" in vocabulary
    assert "couch" not in vocabulary
    assert [vocabulary.position(t) for t in ("couch", "sofa", "stool")] == [1, 1, -1]


def test_no_text_and_no_vocabulary_match_nothing() -> None:
    assert read(["red sofa"], Vocabulary([])) == [set()]
    assert spans([]).is_empty()
