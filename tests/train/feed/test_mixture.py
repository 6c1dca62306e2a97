"""Shares of a mix: exact over time, whatever the parts; against plain counting of passes one after the other."""

from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lookalike.config import parse_config
from lookalike.errors import UsageError
from lookalike.train.feed.mixture import Mixture
from lookalike.train.run.resolve import check_mixture
from lookalike.train.run.settings import TrainConfig

WEIGHTS = st.dictionaries(st.sampled_from("abcdef"), st.floats(0.001, 10), min_size=1)
TASKS = {"identity": {"kind": "normalized_softmax", "field": "group"}}


@given(WEIGHTS, st.integers(1, 64), st.integers(0, 10_000))
def test_every_pass_is_full_and_every_dataset_has_its_share_so_far(
    mix: dict[str, float], rows: int, number: int
) -> None:
    mixture = Mixture(rows, mix)
    counts = mixture.between(number, number + 1)
    assert sum(counts.values()) == rows
    assert min(counts.values()) >= 0
    for name, count in mixture.first(number).items():
        assert abs(count - rows * number * Fraction(mix[name]) / sum(map(Fraction, mix.values()))) <= 2


def test_a_share_below_one_row_of_a_part_is_kept() -> None:
    """One row of 8 in every part was 12.5% for a weight of one in twelve."""
    mixture, counted = Mixture(8, {"rare": 1, "common": 11}), Counter[str]()
    for number in range(300):
        counted.update(mixture.between(number, number + 1))
    assert counted == {"rare": 200, "common": 2200}


@given(WEIGHTS, st.integers(1, 3), st.integers(1, 4), st.integers(1, 9), st.integers(0, 50))
def test_streams_and_parts_together_keep_the_shares_in_every_step(
    mix: dict[str, float], streams: int, parts: int, rows: int, step: int
) -> None:
    """Stream s begins s * parts passes later, so that the passes of a step follow each other."""
    mixture, counted = Mixture(rows, mix), Counter[str]()
    for stream in range(streams):
        for part in range(parts):
            number = stream * parts + step * parts + part
            counted.update(mixture.between(number, number + 1))
    total = rows * streams * parts
    assert counted.total() == total
    for name, weight in mix.items():
        assert abs(counted[name] - total * weight / sum(mix.values())) <= 4


def test_a_balanced_dataset_has_the_same_number_in_every_pass() -> None:
    mixture = Mixture(8, {"a": 0.35, "b": 0.6, "c": 0.05}, fixed=["b"])
    assert mixture.fixed == {"b": 5}
    assert all(mixture.between(n, n + 1)["b"] == 5 for n in range(50))
    assert mixture.first(80) == {"a": 210, "b": 400, "c": 30}  # three rows a pass, seven to one
    assert float(mixture.share("a")) == pytest.approx(210 / 640)
    with pytest.raises(UsageError, match=r"4 pictures has no place for the balanced dataset 'b'; raise batch_size"):
        Mixture(4, {"a": 100, "b": 1}, fixed=["b"])


def settings(**values: object) -> TrainConfig:
    base = {"tasks": TASKS, "batch_size": 16, "workers": {"num": 1}, "mix": {"furniture": 1}}
    return parse_config(TrainConfig, {**base, **values}, "finetune")


def test_a_dataset_that_no_step_reads_is_refused() -> None:
    train = settings(mix={"furniture": 1000, "clipart": 1})
    with pytest.raises(UsageError, match=r"mix leaves dataset 'clipart' no picture: 0.001 of the 160 of 10 steps; rai"):
        check_mixture(train, 10)
    check_mixture(train, 100)


def test_a_balanced_share_that_had_to_be_rounded_is_said(caplog: pytest.LogCaptureFixture) -> None:
    check_mixture(settings(mix={"furniture": 1, "clipart": 1}, loader={"balance": {"furniture": {"samples": 4}}}), 9)
    assert not caplog.records
    train = settings(mix={"furniture": 2.2, "clipart": 2}, loader={"balance": {"furniture": {"samples": 4}}})
    check_mixture(train, 9)
    assert "dataset=furniture share=0.500 wanted=0.524" in caplog.text
