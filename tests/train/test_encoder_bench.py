"""The encoder benchmark's arithmetic, and that it runs."""

from typing import Any

import pytest

from tests.benchmarks.encoders import parse, rates, run, summarise


def test_rates_and_summary() -> None:
    assert rates({"ours": 0.5, "bare": 0.4}, 8) == {"ours_images_s": 16.0, "bare_images_s": 20.0, "ratio": 0.8}
    rows: list[dict[str, Any]] = [
        {"backbone": None, "case": "decode for training, one core", "ratio": 0.9},
        {"backbone": "b", "case": "train", "ratio": 0.97},
        {"backbone": "b", "case": "inference", "ratio": 0.1},
        {"backbone": "b", "case": "latency", "ratio": 1.1},
        {"backbone": "b", "case": "best inference", "ratio": 0.95},
    ]
    assert summarise(rows) == {
        "decode_for_training_vs_bare": 0.9,
        "b": {"train_vs_bare": 0.97, "latency_vs_bare": 1.1, "best_inference_vs_bare": 0.95},
    }


@pytest.mark.slow
def test_a_small_run_gives_every_case_of_the_table() -> None:
    options = parse(["--quick", "--images", "2", "--batches", "2", "--train-batch", "2"])
    options.backbones, options.rounds = ["test_efficientnet"], 1
    rows = list(run(options))
    assert [row["case"] for row in rows] == [
        "decode for training, one core",
        "decode for embedding, one core",
        "train",
        "inference",
        "latency",
        "inference",
        "best inference",
    ]
    assert all(row["ratio"] > 0 for row in rows)
    best = max((row for row in rows if row["case"] == "inference"), key=lambda row: row["ours_images_s"])
    assert rows[-1] == {**best, "case": "best inference"}
