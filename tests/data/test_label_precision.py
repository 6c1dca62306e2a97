import numpy as np
import polars as pl
import pytest

from tests.benchmarks.label_precision import draw, precision


def parts(cuts: int) -> list[pl.DataFrame]:
    frame = pl.DataFrame(
        {
            "image_id": [f"i{n // 4}" for n in range(4000)],
            "term": [f"t{n % 4}" for n in range(4000)],
            "score": pl.Series(np.linspace(0.5, 1, 4000), dtype=pl.Float32),
        }
    )
    return [frame[start::cuts] for start in range(cuts)]


def test_the_sample_is_uniform_and_does_not_depend_on_parts() -> None:
    one, many = draw(iter(parts(1)), None, 400, 5), draw(iter(parts(7)), None, 400, 5)
    assert one.equals(many)
    # five standard deviations
    assert np.abs(one["term"].value_counts()["count"].to_numpy().astype(int) - 100).max() < 45  # 5 sigma
    some = {f"i{n}" for n in range(10)}
    assert set(draw(iter(parts(3)), some, 400, 5)["image_id"]) == some


def test_only_verdicts_on_annotations_that_exist_count() -> None:
    rows = [
        {"image_id": f"i{n}", "term": "t", "verdict": verdict}
        for n, verdict in enumerate(["right"] * 9 + ["wrong", "unsure", "wrong"])
    ]
    found = precision(rows, {(f"i{n}", "t") for n in range(11)})
    assert (found["verdicts"], found["still_apply"], found["precision"]) == (12, 11, 0.9)
    assert (found["low"], found["high"]) == (pytest.approx(0.5958, abs=1e-3), pytest.approx(0.9821, abs=1e-3))
    assert precision(rows, set())["precision"] is None
    with pytest.raises(ValueError, match="perhaps"):
        precision([{"image_id": "a", "term": "b", "verdict": "perhaps"}], set())
