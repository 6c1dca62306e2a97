import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lookalike.data.parts import add_up
from lookalike.data.text import annotations
from lookalike.data.text.annotations import (
    COUNTS,
    TEXT_COLUMNS,
    annotate,
    count_candidates,
    frequent_terms,
    make_annotator,
    most_frequent,
)
from lookalike.data.text.annotators import ANNOTATORS, Annotator
from lookalike.data.text.settings import AnnotationConfig
from lookalike.data.text.vocabulary import Vocabulary
from lookalike.data.text.wordlists import WordLists
from lookalike.errors import UsageError
from tests.benchmarks import text_plain
from tests.benchmarks.text_records import Generator

CONFIG = AnnotationConfig(min_images=1)
KINDS = {
    "keywords": pa.list_(pa.string()),
    "annotations": pa.list_(pa.struct([("term", pa.string()), ("score", pa.float32())])),
    "interactions": pa.list_(pa.struct([("term", pa.string()), ("weight", pa.float32())])),
}


def table(*rows: dict[str, Any], columns: list[str] = TEXT_COLUMNS) -> pa.Table:
    base = dict.fromkeys(columns) | {"split": "train", "locale": "en"}
    full = [{**base, "image_id": str(number), **row} for number, row in enumerate(rows)]
    return pa.Table.from_pylist(full, schema=pa.schema([(name, KINDS.get(name, pa.string())) for name in columns]))


def scores(config: AnnotationConfig, vocabulary: set[str], **row: Any) -> dict[str, float]:
    terms = Vocabulary(vocabulary, config.lists().aliases)
    rows = annotate(table(row), make_annotator(config), terms).to_pylist()
    return {entry["term"]: entry["score"] for entry in rows}


def counted(records: pa.Table, annotator: Annotator, lists: WordLists) -> pa.Table:
    return add_up(count_candidates(records, annotator, lists), ["term"], COUNTS)


def counts(config: AnnotationConfig, *rows: dict[str, Any]) -> dict[str, int]:
    lists = config.lists()
    frequent = frequent_terms(counted(table(*rows), make_annotator(config), lists), config, lists)
    return dict(zip(*frequent.to_pydict().values(), strict=True))


def test_fields_combine_as_noisy_or() -> None:
    scored = scores(CONFIG, {"sofa"}, title="Red sofa", keywords=["Sofas"], category="furniture/sofas")
    assert scored["sofa"] == pytest.approx(1 - 0.4 * 0.3 * 0.4)


def test_a_weak_field_alone_stays_under_the_threshold() -> None:
    assert scores(CONFIG, {"sofa"}, description="A sofa") == {}
    assert scores(AnnotationConfig(min_score=0.3), {"sofa"}, description="A sofa") == {"sofa": pytest.approx(0.35)}


def test_interactions_add_to_what_other_fields_say_by_their_weight() -> None:
    signals = [
        {"term": "Sofas", "weight": 0.5},
        {"term": "sofa", "weight": 0.2},
        {"term": "rug", "weight": 40.0},
        {"term": None, "weight": 1.0},
        {"term": "lamp", "weight": None},
    ]
    scored = scores(CONFIG, {"sofa", "rug", "lamp"}, title="A sofa", interactions=signals)
    assert scored == {"sofa": pytest.approx(1 - 0.4 * (1 - 0.3 * 0.5))}
    alone = AnnotationConfig(field_weights={"interactions": 0.8})
    assert scores(alone, {"sofa", "rug"}, interactions=signals) == {"rug": pytest.approx(0.8)}


def test_a_category_means_itself_not_its_head() -> None:
    assert set(scores(CONFIG, {"living room", "room"}, category="Living room")) == {"living room"}


def test_names_of_the_creator_and_the_data_set_are_no_terms() -> None:
    row = {"title": "Clown by Nicu Buculei", "creator": "Nicu Buculei", "dataset": "circus"}
    other = {"title": "Nicu Buculei in the circus"}
    assert not {"nicu", "buculei", "nicu buculei"} & set(counts(CONFIG, row))
    assert counts(CONFIG, row, other)["nicu buculei"] == 1
    assert set(scores(CONFIG, {"clown", "nicu", "circus"}, **row)) == {"clown"}


def test_only_training_rows_are_counted() -> None:
    assert counts(CONFIG, {"title": "Red sofa", "split": "test"}) == {}
    assert counts(CONFIG, {"title": "Red sofa"}) == {"red": 1, "sofa": 1, "red sofa": 1}


def test_a_row_counts_once_for_a_term_and_sensitive_terms_do_not_count() -> None:
    row = {"title": "Sofa, sofas, a nude sofa", "keywords": ["sofa", "swastikas"], "category": "Sofas"}
    assert counts(CONFIG, row, row) == {"sofa": 2}


def test_aliases_merge_terms() -> None:
    config = AnnotationConfig(aliases={"couch": "sofa"}, min_images=1)
    assert counts(config, {"keywords": ["couch"]}, {"keywords": ["sofa", "Couches"]}) == {"sofa": 2}
    assert scores(config, {"sofa"}, keywords=["Couches"]) == {"sofa": pytest.approx(0.7)}
    assert scores(config, {"sofa"}, title="A leather couch") == {"sofa": pytest.approx(0.6)}


def test_text_in_another_language_gives_no_terms() -> None:
    german = "Ein kleines rotes Haus mit Garten und Auto vor der Hotel Tuer"
    assert counts(CONFIG, {"title": german}) == {}
    assert counts(CONFIG, {"keywords": ["Hotel"], "locale": "de_DE"}) == {}  # short: by its locale
    assert counts(CONFIG, {"category": "Hotel", "locale": "de_DE"}) == {"hotel": 1}  # the source's own taxonomy
    assert "hotel" in counts(AnnotationConfig(min_images=1, language=None), {"title": german})
    assert counts(CONFIG, {"keywords": ["\u0441hair", "chair"]}) == {"chair": 1}


@pytest.mark.parametrize(
    "title",
    [
        "sofa " * 200_000,
        "sofa\u0301 " * 200_000,
        "a" * 1_000_000,
        "\ufdfa" * 300_000,
        "- " * 500_000,
        "\u05e1\u05e4\u05d4 sofa " * 100_000,
        "\U0001f6cb\ufe0f sofa " * 100_000,
        "\x00" * 1_000_000,
        "'" * 1_000_000,
    ],
    ids=range(9),
)
def test_a_title_of_a_megabyte_takes_bounded_time(title: str) -> None:
    counts(CONFIG, {"title": "warm up the model of languages"})
    start = time.process_time()
    rows = [{"title": title}, {"title": "sofa", "keywords": [title] * 3}]
    assert counts(CONFIG, *rows)["sofa"] >= 1
    assert "sofa" in scores(CONFIG, {"sofa"}, **rows[1])
    assert time.process_time() - start < 2.0


def test_fields_that_are_null_empty_or_absent_say_nothing() -> None:
    empty: dict[str, Any] = {
        "title": "",
        "description": None,
        "keywords": [],
        "category": "//",
        "locale": None,
        "annotations": [],
        "interactions": None,
    }
    assert counts(CONFIG, empty, {"keywords": [None, "", " "]}) == {}
    assert scores(CONFIG, {"sofa"}, **empty) == {}
    few = table({"title": "Red sofa"}, columns=["image_id", "title", "split"])
    lists, annotator = CONFIG.lists(), make_annotator(CONFIG)
    assert set(counted(few, annotator, lists)["term"].to_pylist()) == {"red", "sofa", "red sofa"}
    assert annotate(few, annotator, Vocabulary(["sofa"]))["term"].to_pylist() == ["sofa"]
    assert annotate(few.slice(0, 0), annotator, Vocabulary(["sofa"])).num_rows == 0


WORDS = st.sampled_from(["red", "sofas", "Lamp", "of", "oak", ",", "nicu", "42", "couch", "Fl\u00fcgel"])
PHRASES = st.lists(WORDS, max_size=6).map(" ".join)
WEIGHED = st.fixed_dictionaries({"term": st.none() | PHRASES, "weight": st.floats(-1, 2, width=32)})
ROWS = st.lists(
    st.fixed_dictionaries(
        {
            "title": st.none() | PHRASES,
            "keywords": st.none() | st.lists(st.none() | PHRASES, max_size=3),
            "category": st.none() | st.lists(PHRASES, max_size=2).map("/".join),
            "description": st.none() | PHRASES,
            "interactions": st.none() | st.lists(WEIGHED, max_size=2),
            "locale": st.sampled_from([None, "en_GB", "de"]),
            "creator": st.sampled_from([None, "Nicu", "oak lamp"]),
            "split": st.sampled_from(["train", "test"]),
        }
    ),
    max_size=6,
)
TERMS = st.sets(st.sampled_from(["red", "sofa", "red sofa", "lamp", "oak", "oak lamp", "nicu", "couch"]), min_size=1)


def assert_as_one_by_one(records: pa.Table, config: AnnotationConfig, vocabulary: set[str] | None = None) -> int:
    """Number of annotations, which are to the bit those of the rules for one record and one text at a time."""
    annotator, lists, rows = make_annotator(config), config.lists(), records.to_pylist()
    images = counted(records, annotator, lists)
    assert dict(zip(*images.to_pydict().values(), strict=True)) == text_plain.count(rows, config)
    mined = frequent_terms(images, config, lists)["term"].to_pylist() if vocabulary is None else vocabulary
    terms = text_plain.spellings(dict.fromkeys(mined, config.min_images), config)
    expected = [
        (row["image_id"], term, np.float32(score))
        for row in rows
        for term, score in sorted(text_plain.scores(row, config, terms).items(), key=lambda s: (-s[1], s[0]))
    ]
    scored = annotate(records, annotator, Vocabulary(mined, lists.aliases)).select(["image_id", "term", "score"])
    assert list(zip(*scored.to_pydict().values(), strict=True)) == expected
    return len(expected)


@settings(max_examples=60)
@given(ROWS, TERMS, st.sampled_from([None, "en"]))
def test_messy_rows_say_what_the_rules_say_one_by_one(
    rows: list[dict[str, Any]], vocabulary: set[str], language: str | None
) -> None:
    aliases = {"couch": "sofa", "oak lamp": "lamp"}
    assert_as_one_by_one(table(*rows), AnnotationConfig(min_images=1, language=language, aliases=aliases), vocabulary)


def test_records_of_the_benchmark_say_what_the_rules_say_one_by_one() -> None:
    assert assert_as_one_by_one(Generator(3).part(0, 1500), AnnotationConfig()) > 3000


def test_results_do_not_depend_on_how_rows_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"title": f"Red sofa number {n} with a lamp", "keywords": ["sofa", f"chair {n % 3}x"]} for n in range(40)]
    annotator, lists, terms = make_annotator(CONFIG), CONFIG.lists(), Vocabulary(["sofa", "lamp", "red sofa"])
    images, scored = counted(table(*rows), annotator, lists), annotate(table(*rows), annotator, terms)
    monkeypatch.setattr(annotations, "BATCH_ROWS", 7)
    assert counted(table(*rows), annotator, lists) == images
    assert annotate(table(*rows), annotator, terms).equals(scored)
    monkeypatch.setattr(annotations, "BATCH_BYTES", 200)
    assert counted(table(*rows), annotator, lists) == images
    assert annotate(table(*rows), annotator, terms).equals(scored)


def test_the_vocabulary_is_bounded_by_the_most_frequent_and_equal_ones_by_the_alphabet() -> None:
    images = pa.table({"term": ["b", "d", "a", "c"], "images": [3, 9, 3, 3]})
    assert most_frequent(images, 3)["term"].to_pylist() == ["a", "b", "d"]
    assert most_frequent(images, None)["term"].to_pylist() == ["a", "b", "c", "d"]


def test_a_supplied_vocabulary_bounds_what_is_counted(tmp_path: Path) -> None:
    file = tmp_path / "terms.txt"
    file.write_text("Sofas\nlamp\n", encoding="utf-8")
    assert counts(AnnotationConfig(vocabulary=str(file), min_images=1), {"title": "Red sofa"}) == {"sofa": 1}


GIVEN = [
    {"term": "Sofas", "score": 0.9},
    {"term": "lamp", "score": 0.2},
    {"term": "rug", "score": 7.0},
    {"term": "zebra", "score": 1.0},
    {"term": "oak", "score": float("nan")},
    {"term": None, "score": 1.0},
]


def test_precomputed_takes_the_users_scores() -> None:
    config = AnnotationConfig(annotator="precomputed", min_score=0.4)
    scored = scores(config, {"sofa", "lamp", "rug", "oak"}, annotations=GIVEN, keywords=["lamp:0.8"])
    assert scored == {"sofa": pytest.approx(0.9), "rug": 1.0}


def test_precomputed_terms_make_the_vocabulary_without_any_text() -> None:
    config = AnnotationConfig(annotator="precomputed", min_score=0.4, min_images=1)
    assert counts(config, {"annotations": GIVEN, "title": "Not read"}) == {"sofa": 1, "rug": 1, "zebra": 1}
    assert counts(config, {"annotations": None, "keywords": ["sofa:0.9"]}) == {}


def test_precomputed_reads_keywords_when_told_to() -> None:
    config = AnnotationConfig(annotator="precomputed", min_score=0.4, min_images=1, scores_from="keywords")
    row = {"keywords": ["Sofas:0.9", "lamp:0.2", "rug", "zebra:1", "tea: green", "x:nan"], "annotations": GIVEN}
    assert scores(config, {"sofa", "lamp", "rug"}, **row) == {"sofa": pytest.approx(0.9), "rug": 1.0}
    assert counts(config, row) == {"sofa": 1, "rug": 1, "zebra": 1, "tea green": 1}


@ANNOTATORS.register("shouting")
class Shouting(Annotator):
    """An annotator of a third party."""

    def candidates(self, records: pa.Table) -> pa.Table:
        return pa.table({"row": np.arange(records.num_rows), "term": ["loud"] * records.num_rows})

    def annotate(self, records: pa.Table, vocabulary: Vocabulary) -> pa.Table:
        rows = np.arange(records.num_rows if "loud" in vocabulary else 0)
        term = pa.array(["loud"] * 2 * len(rows), pa.string()).dictionary_encode()
        return pa.table({"row": np.tile(rows, 2), "term": term, "score": np.repeat([0.6, 0.9], len(rows))})


def test_a_third_partys_annotator_needs_two_methods() -> None:
    config = AnnotationConfig(annotator="shouting", min_images=1)
    assert counts(config, {}, {}) == {"loud": 2}
    assert scores(config, {"loud"}) == {"loud": pytest.approx(0.9)}


def test_an_unknown_annotator_names_the_valid_ones() -> None:
    with pytest.raises(UsageError, match=r"lexcal.*did you mean 'lexical'"):
        ANNOTATORS.get("lexcal")
