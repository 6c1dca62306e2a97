import pytest
from hypothesis import given
from hypothesis import strategies as st

from lookalike.data.terms import canonical, match_terms, ngrams, singular


@pytest.mark.parametrize(
    ("phrase", "term"),
    [("Office Chairs", "office chair"), ("office-chair", "office chair"), ("signs_and_symbols", "signs and symbol"),
     ("\uff33\uff4f\uff46\uff41", "sofa"), ("Boxes", "box"), ("cherries", "cherry"), ("People", "person"),
     ("glasses", "glasses"), ("christmas", "christmas"), ("cactus", "cactus"), ("grass", "grass"),
     ("the", None), ("chair of", None), ("2004", None), ("book 01", None), ("a b c d e", None), ("!!", None)],
)  # fmt: skip
def test_canonical_form(phrase: str, term: str | None) -> None:
    assert canonical(phrase) == term


@given(st.text(max_size=40))
def test_canonical_is_idempotent_up_to_plural_chains(text: str) -> None:
    once = canonical(text)
    if once is not None:
        again = canonical(once)
        assert again is None or again == once or len(again) < len(once)


def test_singular_keeps_what_is_no_plural() -> None:
    unchanged = ["bus", "glass", "iris", "gas"]
    assert [singular(word) for word in (*unchanged, "dogs")] == [*unchanged, "dog"]


def test_ngrams_stop_at_punctuation() -> None:
    assert "lamp red" not in ngrams("Desk lamp, red sofa")
    assert {"desk lamp", "lamp", "red sofa", "sofa"} <= ngrams("Desk lamp, red sofa")


def test_longest_match_names_its_head_and_not_its_modifier() -> None:
    vocabulary = {"office chair", "office", "chair", "lamp"}
    assert match_terms("Office chairs with a lamp", vocabulary) == {"office chair", "chair", "lamp"}
    assert match_terms("An office", vocabulary) == {"office"}


@given(st.lists(st.sampled_from(["red", "blue", "chair", "table", "of", "the", "lamp", "12"]), max_size=8))
def test_matches_are_candidates_of_the_text(words: list[str]) -> None:
    text = " ".join(words)
    vocabulary = {"chair", "table", "red chair", "blue lamp", "lamp"}
    assert match_terms(text, vocabulary) <= ngrams(text) & vocabulary
