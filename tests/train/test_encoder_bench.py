"""The encoder benchmark runs, and its summary holds each ratio of its rows."""

import pytest

from tests.benchmarks.encoders import parse, run, summarise


@pytest.mark.slow
def test_a_small_run_gives_every_case_and_a_summary_of_their_ratios() -> None:
    options = parse(["--quick", "--images", "2", "--batches", "2", "--train-batch", "2"])
    options.backbones, options.rounds = ["test_efficientnet"], 1
    training, embedding, train, single, latency, batch, best = rows = list(run(options))
    assert [row["case"] for row in rows[2:]] == ["train", "inference", "latency", "inference", "best inference"]
    assert best == {**max(single, batch, key=lambda row: row["ours_images_s"]), "case": "best inference"}
    for row in (training, embedding, train, single, batch):
        assert row["ratio"] == pytest.approx(row["ours_images_s"] / row["bare_images_s"], abs=2e-3, rel=0.01)
    assert summarise(rows) == {
        "decode_for_training_vs_bare": training["ratio"],
        "decode_for_embedding_vs_bare": embedding["ratio"],
        "test_efficientnet": {
            "train_vs_bare": train["ratio"],
            "latency_vs_bare": latency["ratio"],
            "best_inference_vs_bare": best["ratio"],
        },
    }
