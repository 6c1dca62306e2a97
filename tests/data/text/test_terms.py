from importlib.resources import files
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lookalike.data.text.terms import canonical, is_latin, match_terms, ngrams, normalise, singular, subterms, words_of


@pytest.mark.parametrize(
    ("phrase", "term"),
    [
        ("Office Chairs", "office chair"),
        ("office-chair", "office chair"),
        ("signs_and_symbols", "signs and symbol"),
        ("\uff33\uff4f\uff46\uff41", "sofa"),
        ("Boxes", "box"),
        ("cherries", "cherry"),
        ("People", "person"),
        ("glasses", "glasses"),
        ("christmas", "christmas"),
        ("cactus", "cactus"),
        ("grass", "grass"),
        ("the", None),
        ("chair of", None),
        ("2004", None),
        ("book 01", None),
        ("a b c d e", None),
        ("!!", None),
    ],
)
def test_canonical_form(phrase: str, term: str | None) -> None:
    assert canonical(phrase) == term


@pytest.mark.parametrize(
    ("phrase", "term"),
    [
        ("\ufb01sh", "fish"),
        ("so\u00adfa", "sofa"),
        ("so\u200bfa\ufeff", "sofa"),
        ("\u202esofa\u202c", "sofa"),
        ("cafe\u0301", "cafe"),
        ("CAF\u00c9S", "cafe"),
        ("Herm\u00e8s", "hermes"),
        ("na\u00efve jalape\u00f1os", "naive jalapeno"),
        ("\u0131stanbul", "istanbul"),
        ("Encyclop\u00e6dias", "encyclopaedia"),
        ("\u0141\u00f3d\u017a", "lodz"),
        ("\u0439\u043e\u0433", "\u0439\u043e\u0433"),
        ("outs", "outs"),
        ("55's", "55's"),
        ("s\u0338o\u0336f\u0334a\u0335", "sofa"),
        ("Stra\u00dfe", "strasse"),
        ("\u0130stanbul", "istanbul"),
        ("red\x00 sofa\x07", "red sofa"),
        ("LEGO\u00ae bricks", "lego brick"),
        ("Lego\u2122", "lego"),
        ("\U0001f525 sofa \U0001f6cb\ufe0f", "sofa"),
        ("1\ufe0f\u20e3 lamp", None),
        ("women\u2019s shoes", "women's shoe"),
        ("Women's", "woman"),
        ("PhD's", "phd"),
        ("dogs'", "dog"),
        ("rock'n'roll", "rock'n'roll"),
        ("salt & pepper", "salt pepper"),
        ("r&b", "r&b"),
        ("LivingRoom", "livingroom"),
        ("living__room", "living room"),
        ("t-shirts", "t shirt"),
        ("3D printers", "3d printer"),
        ("\u05db\u05d9\u05e1\u05d0", "\u05db\u05d9\u05e1\u05d0"),
        ("\x00\x01", None),
        ("\u200b", None),
        ("", None),
    ],
)
def test_canonical_form_of_awkward_text(phrase: str, term: str | None) -> None:
    assert canonical(phrase) == term


@pytest.mark.parametrize(
    ("plural", "noun"),
    [
        ("knives", "knife"),
        ("gloves", "glove"),
        ("buses", "bus"),
        ("viruses", "virus"),
        ("houses", "house"),
        ("dresses", "dress"),
        ("series", "series"),
        ("roses", "rose"),
        ("canvases", "canvas"),
        ("quizzes", "quiz"),
        ("headaches", "headache"),
        ("watches", "watch"),
        ("brushes", "brush"),
        ("shoes", "shoe"),
        ("tomatoes", "tomato"),
        ("movies", "movie"),
        ("berries", "berry"),
        ("menus", "menu"),
        ("taxis", "taxi"),
        ("lens", "lens"),
        ("lenses", "lens"),
        ("fuses", "fuse"),
        ("waltzes", "waltz"),
        ("sizes", "size"),
        ("women", "woman"),
        ("cacti", "cactus"),
        ("virus", "virus"),
        ("tennis", "tennis"),
        ("gas", "gas"),
        ("trousers", "trousers"),
    ],
)
def test_plural_rules(plural: str, noun: str) -> None:
    assert singular(plural) == noun
    assert singular(noun) == noun


def test_terms_of_a_list_by_hand() -> None:
    lines = Path(__file__).with_name("plurals.txt").read_text().splitlines()[1:]
    pairs = [line.split(",") for line in lines]
    assert len(pairs) > 300
    assert [f"{phrase} -> {canonical(phrase)}" for phrase, term in pairs if canonical(phrase) != term] == []


@given(st.text(max_size=40) | st.text("abenmsu'xyz\u00e9\u0131\u0301\u0441 -_5&", max_size=14))
def test_canonical_is_idempotent(text: str) -> None:
    once = canonical(text)
    assert once is None or canonical(once) == once


def test_no_word_of_the_lists_has_two_singulars() -> None:
    lists = yaml.safe_load(files("lookalike.data.text").joinpath("english.yaml").read_text(encoding="ascii"))
    assert all(singular(word) == noun == singular(noun) == canonical(word) for word, noun in lists["irregular"].items())
    assert all(singular(word) == word == canonical(word) for word in lists["unchanged"])


@given(st.text(max_size=60))
def test_words_hold_nothing_that_cuts_words(text: str) -> None:
    for phrase in words_of(text):
        for word in phrase:
            assert word == normalise(word).strip("'")
            assert not set(word) & set(" \t\n\r\x00_-.,;:!?")


def test_words_in_letters_of_other_scripts_are_told_apart() -> None:
    assert is_latin("caf\u00e9 na\u00efve")
    assert not is_latin("\u0441hair")  # the first letter is Cyrillic
    assert not is_latin("\u05db\u05d9\u05e1\u05d0")
    assert not is_latin("sof\u0251")  # the phonetic alpha
    assert not is_latin("\u0663d")  # an Arabic three
    assert not is_latin("\u3007")
    assert is_latin("\u00fe\u00f3rr \u1e9e")


def test_symbols_and_punctuation_end_a_phrase() -> None:
    assert words_of("Desk lamp, red sofa - #new *oak*\ttable") == [
        ["desk", "lamp"],
        ["red", "sofa"],
        ["new"],
        ["oak"],
        ["table"],
    ]
    assert "sofa lamp" not in ngrams("sofa \U0001f525 lamp")


def test_ngrams_stop_at_punctuation() -> None:
    assert "lamp red" not in ngrams("Desk lamp, red sofa")
    assert {"desk lamp", "lamp", "red sofa", "sofa"} <= ngrams("Desk lamp, red sofa")


def test_longest_match_names_its_head_and_not_its_modifier() -> None:
    vocabulary = {"office chair", "office", "chair", "lamp"}
    assert match_terms("Office chairs with a lamp", vocabulary) == {"office chair", "chair", "lamp"}
    assert match_terms("An office", vocabulary) == {"office"}


def test_parts_of_a_term_are_written_and_singular() -> None:
    assert set(subterms("drugs store")) == {"drugs", "drug", "store", "drugs store"}


@given(st.lists(st.sampled_from(["red", "blue", "chair", "table", "of", "the", "lamp", "12"]), max_size=8))
def test_matches_are_candidates_of_the_text(words: list[str]) -> None:
    text = " ".join(words)
    vocabulary = {"chair", "table", "red chair", "blue lamp", "lamp"}
    assert match_terms(text, vocabulary) <= ngrams(text) & vocabulary
