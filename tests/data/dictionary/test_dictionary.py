from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from lookalike.data.dictionary.scores import (
    DICTIONARY,
    SCORES,
    DictionaryConfig,
    ProbeConfig,
    decide,
    digest,
    merge_scores,
)
from lookalike.data.dictionary.sketch import Sample


def test_terms_with_too_few_samples_are_reported_not_scored() -> None:
    """One is in no sketch, one has too few positives, one is at chance, one is seen, one is seen on few samples."""
    rows = [("few", 3, 0, 0, None), ("flat", 40, 80, 42, "x"), ("seen", 40, 80, 70, "y"), ("thin", 6, 12, 8, "z")]
    scores = pa.Table.from_pylist([dict(zip(SCORES.names, (*row, False), strict=True)) for row in rows], schema=SCORES)
    scored = merge_scores({"seen": 50, "absent": 9, "thin": 6, "flat": 40, "few": 3}, scores.take([3, 1, 0, 2]))
    table = decide(scored, 0.65)
    assert table.schema.equals(DICTIONARY)
    found = {row.pop("term"): row for row in table.to_pylist()}
    assert list(found) == ["absent", "few", "flat", "seen", "thin"]
    assert {term: row["status"] for term, row in found.items()} == {
        "absent": "too_few",
        "few": "too_few",
        "flat": "abstract",
        "seen": "kept",
        "thin": "abstract",
    }
    assert found["few"] == {
        "images": 3,
        "positives": 3,
        "trials": 0,
        "hits": 0,
        "concreteness": None,
        "low": None,
        "high": None,
        "status": "too_few",
        "digest": None,
    }
    assert found["seen"]["concreteness"] == pytest.approx(70 / 80)
    assert found["thin"]["concreteness"] > 0.65  # above the boundary, but its interval holds chance
    assert found["thin"]["low"] < 0.5
    assert {row["status"] for row in decide(scored, 0.9).to_pylist()} == {"too_few", "abstract"}


def test_a_boundary_keeps_terms_that_score_it_exactly() -> None:
    scores = pa.Table.from_pylist([dict(zip(SCORES.names, ("a", 100, 200, 130, "x", False), strict=True))], SCORES)
    assert decide(merge_scores({"a": 100}, scores), 0.65)["status"].to_pylist() == ["kept"]


def test_a_digest_changes_with_whatever_a_score_follows_from() -> None:
    rng = np.random.default_rng(0)
    one, other = (rng.normal(size=(6, 4)).astype(np.float16) for _ in range(2))
    folds = np.arange(12) % 3

    def of(left: Any, right: Any, held: Any = folds, seed: int = 1, **settings: Any) -> str:
        return digest(Sample(left, right, held), ProbeConfig(**settings), seed)

    base = of(one, other)
    assert base == of(one.copy(), other.copy(), folds.copy())
    changed = [
        of(other, one),
        of(one[::-1], other),
        of(one, other, steps=17),
        of(one, other, seed=2),
        of(one[:5], other[:5], folds[:10]),
        of(one.reshape(8, 3), other.reshape(8, 3)),
        of(one, other, folds[::-1]),
    ]
    assert len({base, *changed}) == 8


def test_what_cannot_change_a_score_is_no_part_of_the_fingerprint() -> None:
    fewer = DictionaryConfig(terms_per_task=3, num_gpus=1)
    assert fewer.identity() == DictionaryConfig().identity()
