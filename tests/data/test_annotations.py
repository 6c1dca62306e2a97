from typing import Any

import pyarrow as pa
import pytest

from lookalike.data.annotations import (
    ANNOTATORS,
    TEXT_COLUMNS,
    AnnotationConfig,
    annotate,
    count_candidates,
    in_language,
    is_acceptable,
)  # fmt: skip
from lookalike.errors import UsageError

CONFIG = AnnotationConfig(min_images=1)


def table(**row: Any) -> pa.Table:
    base = dict.fromkeys(TEXT_COLUMNS) | {"image_id": "a", "split": "train", "keywords": [], "locale": "en"}
    kinds = [pa.list_(pa.string()) if name == "keywords" else pa.string() for name in TEXT_COLUMNS]
    return pa.table([pa.array([(base | row)[name]], kind) for name, kind in zip(TEXT_COLUMNS, kinds, strict=True)],
                    names=TEXT_COLUMNS)  # fmt: skip


def scores(config: AnnotationConfig, vocabulary: set[str], **row: Any) -> dict[str, float]:
    found = annotate(table(**row), frozenset(vocabulary), config)
    return dict(zip(found["term"].to_pylist(), found["score"].to_pylist(), strict=True))


def test_fields_combine_as_noisy_or() -> None:
    found = scores(CONFIG, {"sofa"}, title="Red sofa", keywords=["Sofas"], category="furniture/sofas")
    assert found["sofa"] == pytest.approx(1 - 0.4 * 0.3 * 0.4)


def test_a_weak_field_alone_stays_under_the_threshold() -> None:
    assert scores(CONFIG, {"sofa"}, description="A sofa") == {}
    assert scores(AnnotationConfig(min_score=0.3), {"sofa"}, description="A sofa") == {"sofa": pytest.approx(0.35)}


def test_a_category_means_itself_not_its_head() -> None:
    assert set(scores(CONFIG, {"living room", "room"}, category="Living room")) == {"living room"}


def test_names_of_the_creator_and_the_data_set_are_no_terms() -> None:
    found = count_candidates(table(title="Clown by Nicu Buculei", creator="Nicu Buculei"), CONFIG)["term"].to_pylist()
    assert "clown" in found
    assert not any("nicu" in term for term in found if term in ("nicu", "buculei", "nicu buculei"))


def test_only_training_rows_are_counted() -> None:
    assert count_candidates(table(title="Red sofa", split="test"), CONFIG).num_rows == 0
    assert count_candidates(table(title="Red sofa"), CONFIG).num_rows == 3


@pytest.mark.parametrize("term", ["swastika", "nude woman", "clipart", "flat icon collection", "house pet"])
def test_sensitive_and_boilerplate_terms_are_refused(term: str) -> None:
    assert not is_acceptable(term, stop_terms=("house pet",))
    assert is_acceptable("picture frame")


def test_aliases_merge_terms() -> None:
    config = AnnotationConfig(aliases={"couch": "sofa"})
    assert count_candidates(table(keywords=["couch"]), config)["term"].to_pylist() == ["sofa"]
    assert set(scores(config, {"sofa"}, keywords=["Couches"], title="Couch")) == {"sofa"}


def test_foreign_text_is_not_read_and_the_locale_is_a_hint() -> None:
    french = "Une petite maison avec un jardin et une voiture devant la porte"
    english = "A small house with a garden and a car in front of the door"
    assert in_language(english, "en", "en")
    assert not in_language(french, "en", "en")
    assert in_language(english, "fr", "en")  # long enough to be identified against a wrong locale
    assert not in_language("Portrait", "fr", "en")  # too short: the locale decides
    assert in_language(french, "fr", None)


def test_precomputed_takes_the_users_scores() -> None:
    config = AnnotationConfig(annotator="precomputed", min_score=0.4)
    found = scores(config, {"sofa", "lamp", "rug"}, keywords=["Sofas:0.9", "lamp:0.2", "rug", "unknown:1"])
    assert found == {"sofa": pytest.approx(0.9), "rug": 1.0}


def test_an_unknown_annotator_names_the_valid_ones() -> None:
    with pytest.raises(UsageError, match=r"lexcal.*did you mean 'lexical'"):
        ANNOTATORS.get("lexcal")
