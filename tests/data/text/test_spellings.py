"""Terms are shown as most images write them, with their accents, however the corpus is cut."""

from collections import Counter
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lookalike.data.parts import add_up
from lookalike.data.text.settings import AnnotationConfig
from lookalike.data.text.spellings import SPELLINGS, common_spellings, count_spellings, spelled_terms
from lookalike.data.text.terms import canonical, ngrams
from lookalike.data.text.vocabulary import Vocabulary

COLUMNS = pa.schema([("title", pa.string()), ("keywords", pa.list_(pa.string())), ("split", pa.string())])
CONFIG = AnnotationConfig(language=None)
VOCABULARY = Vocabulary(["cafe", "cafe table", "fiancee", "bureau", "resume", "sofa", "creme brulee"])
ACUTE, GRAVE = "caf\u00e9", "caf\u00e8"
WORDS = [ACUTE, "cafe", GRAVE + "s", "Caf\u00e9s", "fianc\u00e9e", "r\u00e9sum\u00e9", "resume", "bureaux", "table"]
TEXTS = st.lists(st.sampled_from([*WORDS, ",", "of"]), max_size=6).map(" ".join)


def table(rows: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist([{"split": "train", **row} for row in rows], schema=COLUMNS)


@pytest.mark.parametrize(
    ("text", "spelled"),
    [
        ("Caf\u00e9s", {"cafe": ACUTE}),
        ("cafe\u0301", {"cafe": ACUTE}),  # a combining accent
        ("Cr\u00e8me chair", {"creme": "cr\u00e8me", "chair": "chair", "creme chair": "cr\u00e8me chair"}),
        ("ch\u00e2teaux", {"chateau": "ch\u00e2teau"}),
        ("red sofas", {"red": "red", "sofa": "sofa", "red sofa": "red sofa"}),
    ],
)
def test_a_term_and_how_a_text_spells_it(text: str, spelled: dict[str, str]) -> None:
    assert dict(spelled_terms(text)) == spelled


@given(TEXTS | st.text(max_size=30))
def test_spelled_terms_are_the_terms_and_their_spelling_is_the_same_term(text: str) -> None:
    found = list(spelled_terms(text))
    assert {term for term, _ in found} == ngrams(text)
    assert all(canonical(spelling) == term for term, spelling in found)


@given(st.lists(TEXTS, max_size=12), st.integers(1, 5))
def test_counts_are_those_of_the_whole_however_it_is_cut(texts: list[str], size: int) -> None:
    rows = [{"title": text} for text in texts]
    pieces = [table(rows[start : start + size]) for start in range(0, len(rows), size)]
    parts = [count_spellings(piece, VOCABULARY, CONFIG) for piece in pieces]
    expected: Counter[tuple[str, str]] = Counter()
    for text in texts:
        accented: dict[str, str] = {}
        for term, spelling in spelled_terms(text):
            if term in VOCABULARY.terms.to_list() and spelling != term:
                accented[term] = max(spelling, accented.get(term, ""))
        expected.update(accented.items())
    for order in (parts, parts[::-1]):
        summed = add_up(order, ["term", "spelling"], SPELLINGS).to_pylist()
        assert {(row["term"], row["spelling"]): row["images"] for row in summed} == dict(expected)


def test_training_rows_of_every_field_count() -> None:
    rows = [{"title": ACUTE}, {"title": ACUTE, "split": "test"}, {"keywords": [GRAVE, "sofa"]}]
    counted = count_spellings(table(rows), VOCABULARY, CONFIG).to_pylist()
    assert [tuple(row.values()) for row in counted] == [("cafe", GRAVE, 1), ("cafe", ACUTE, 1)]


@pytest.mark.parametrize(
    ("counts", "images", "shown"),
    [
        ({ACUTE: 3}, 5, ACUTE),
        ({ACUTE: 2}, 5, None),
        ({ACUTE: 2}, 4, None),  # as often as the plain one, which comes first
        ({ACUTE: 2, GRAVE: 2}, 4, GRAVE),
        ({ACUTE: 3, GRAVE: 2}, 4, ACUTE),
    ],
)
def test_the_most_frequent_spelling_is_shown(counts: dict[str, int], images: int, shown: str | None) -> None:
    rows = [{"term": "cafe", "spelling": spelling, "images": num} for spelling, num in counts.items()]
    for order in (rows, rows[::-1]):
        assert common_spellings(order, {"cafe": images}) == ({} if shown is None else {"cafe": shown})
