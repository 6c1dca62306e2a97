"""``lookalike.evaluate`` of arrays: against torchmetrics and loops."""

from typing import Any

import numpy as np
import pytest
import torch
from torchmetrics.retrieval import RetrievalHitRate, RetrievalMAP, RetrievalPrecision

from lookalike import evaluate
from lookalike.errors import ArgumentError, UsageError
from tests.synthetic import make_vectors

VECTORS, LABELS = make_vectors(300, 32, num_classes=20)
NAMES = ["p_at_1", "p_at_5", "hit_at_5", "map_at_10_by_hits"]


def test_figures_are_torchmetrics() -> None:
    figures = {row["dim"]: row for row in evaluate(VECTORS, LABELS, dims=[8, 32], metrics=NAMES)}
    for dim, row in figures.items():
        unit = VECTORS[:, :dim] / np.linalg.norm(VECTORS[:, :dim], axis=1, keepdims=True)
        pairs = [(i, j) for i in range(300) for j in range(300) if i != j]
        first, second = (torch.tensor(column) for column in zip(*pairs, strict=True))
        scores = torch.from_numpy((unit @ unit.T)[first, second])
        same = torch.from_numpy(LABELS)[first] == torch.from_numpy(LABELS)[second]
        for name, oracle in (
            ("p_at_1", RetrievalPrecision(top_k=1)),
            ("p_at_5", RetrievalPrecision(top_k=5)),
            ("hit_at_5", RetrievalHitRate(top_k=5)),
            ("map_at_10_by_hits", RetrievalMAP(top_k=10)),
        ):
            assert row[name] == pytest.approx(float(oracle(scores, same, indexes=first)), abs=1e-6), (dim, name)
            assert row[f"{name}_low"] < row[name] <= row[f"{name}_high"]
        assert (row["queries"], row["database"]) == (300, 300)


def test_masks_texts_and_groups() -> None:
    asks = np.arange(300) % 3 == 0
    texts = [f"class {label}" if label else None for label in LABELS]
    (row,) = evaluate(VECTORS, texts, queries=asks, database=~asks, metrics="p_at_1", groups=LABELS)
    known = asks & (LABELS > 0)
    unit = VECTORS / np.linalg.norm(VECTORS, axis=1, keepdims=True)
    best = np.flatnonzero(~asks)[(unit[known] @ unit[~asks].T).argmax(axis=1)]
    assert row["p_at_1"] == np.mean(LABELS[best] == LABELS[known])
    assert (row["queries"], row["database"]) == (known.sum(), 200)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"labels": LABELS[:9]}, r"labels are int64\[9\]; give an integer or a text for each of 300 rows"),
        ({"labels": np.ones(300)}, r"labels are float64\[300\]"),
        ({"labels": np.full(300, -1)}, "0 rows with a label ask and 300 may answer"),
        ({"dims": [8, 64]}, r"dims \[8, 64\] must be between 1 and the vectors' 32"),
        ({"dims": [0]}, "must be between 1"),
        ({"metrics": ["recall"]}, "unknown metric 'recall'"),
        ({"queries": np.arange(9)}, r"queries are int64\[9\]; give bool \[300\]"),
        ({"database": np.zeros(300, bool)}, "300 rows with a label ask and 0 may answer"),
        ({"vectors": VECTORS[0]}, r"vectors have shape \[32\]"),
        ({"vectors": np.full((300, 2), np.inf)}, r"vectors\[0\] holds NaN or infinity, as 300 of 300"),
    ],
)
def test_what_does_not_fit_is_named(given: dict[str, Any], words: str) -> None:
    with pytest.raises((UsageError, ArgumentError), match=words):
        evaluate(**{"vectors": VECTORS, "labels": LABELS, **given})
