"""Balanced datasets: runs of a class, whatever a row group holds of it."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lookalike.config import parse_config
from lookalike.errors import UsageError
from lookalike.train.feed.draws import BalanceConfig, arrange_runs
from lookalike.train.feed.loader import BatchDataset
from lookalike.train.feed.mixture import Mixture
from lookalike.train.feed.streams import AHEAD, build_streams
from lookalike.train.run.sections import ComputeConfig
from lookalike.train.run.settings import TrainConfig
from lookalike.vision.transforms import AugmentConfig, TransformConfig, build_augmentation
from tests.train.conftest import shard_rows, write_shard

TASKS = {"identity": {"kind": "normalized_softmax", "field": "group"}}


@given(st.lists(st.tuples(st.integers(-1, 4), st.integers(1, 3)), max_size=30), st.integers(2, 5), st.integers(0, 9))
def test_runs_hold_one_class_and_every_copy(rows: list[tuple[int, int]], samples: int, seed: int) -> None:
    classes = np.array([label for label, _ in rows], np.int64)
    drawn = np.repeat(np.arange(len(rows)), [copies for _, copies in rows] or 0)
    generator = np.random.default_rng(seed)
    drawn = generator.permutation(drawn)
    found = arrange_runs(drawn, classes[drawn], samples, generator).reshape(-1, samples)
    per_class = Counter(classes[drawn].tolist())
    runs_of = Counter(classes[run[0]] for run in found)
    firsts = {int(classes[run[0]]): run.tolist() for run in found[::-1]}
    assert all(len(set(classes[run].tolist())) == 1 for run in found)
    for label, run in firsts.items():  # of different pictures, while there are some
        assert len(set(run)) == min(samples, (classes == label).sum())
    for label in set(classes.tolist()) - {-1}:
        assert runs_of[label] == -(-per_class[label] // samples)
    read = Counter(found.reshape(-1).tolist())
    for row, (label, copies) in enumerate(rows):
        assert read[row] >= (copies if label >= 0 else 0)
        assert (read[row] == 0) == (label < 0)


def test_a_class_of_enough_rows_repeats_none_within_a_run() -> None:
    classes = np.repeat(np.arange(3), [8, 9, 4])
    rows = np.random.default_rng(0).permutation(21)
    runs = arrange_runs(rows, classes[rows], 4, np.random.default_rng(1)).reshape(-1, 4)
    assert len(runs) == 2 + 3 + 1
    assert all(len(set(run.tolist())) == 4 for run in runs)


def test_runs_of_a_large_class_are_spread() -> None:
    classes = np.repeat([0, 1, 2, 3, 4], [40, 10, 10, 10, 10])
    found = arrange_runs(np.arange(80), classes, 2, np.random.default_rng(0)).reshape(-1, 2)
    order = classes[found[:, 0]].tolist()
    for start in range(0, 40, 8):  # half of the runs are of class 0: so are about half of any eight neighbours
        assert 2 <= order[start : start + 8].count(0) <= 6


def make_batches(tmp_path: Path, rank: int, world: int, samples: int = 3) -> BatchDataset:
    made = {}
    for i, name in enumerate(("catalogue", "clipart")):
        rows = shard_rows(name, 96, seed=i, repeat=1.2)
        made[name] = [write_shard(str(tmp_path / name / "part-0.parquet"), rows, 24)]
    streams = build_streams(
        made,
        seed=3,
        rank=rank,
        world=world,
        resample=True,
        balance={"catalogue": BalanceConfig(field="group", samples=samples)},
    )
    augment = build_augmentation(TransformConfig(size=32), AugmentConfig())
    mixture = Mixture(12, {"catalogue": 3, "clipart": 1}, ["catalogue"])
    return BatchDataset(streams, mixture, augment, seed=3, start=0, stop=12)


def test_batches_hold_samples_of_each_class(tmp_path: Path) -> None:
    whole = list(make_batches(tmp_path, 0, 2))
    for batch in whole:
        groups, plain = batch["group"][:9].reshape(3, 3), batch["group"][9:]
        assert (groups >= 0).all()
        assert (groups == groups[:, :1]).all()
        assert len(plain) == 3
    assert sum((batch["group"][9:] < 0).sum() for batch in whole) > 0  # the other dataset keeps rows without a group
    again = make_batches(tmp_path, 0, 2)
    again.start = 5
    assert [batch["ids"] for batch in again] == [batch["ids"] for batch in whole[5:]]


def test_rows_left_out_and_repeated_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stream = make_batches(tmp_path, 0, 1).streams["catalogue"]
    stream.slices(0, 3)  # row groups are read ahead, 16 at a time: four epochs of four
    tally, epochs = stream.sizes.tally, AHEAD / 4
    assert tally["no_class"] == 24 * epochs
    assert tally["rows"] > 72 * epochs
    assert tally["repeated"] == tally["rows"] - 72 * epochs
    assert "together" not in caplog.text
    sparse = make_batches(tmp_path, 0, 1, samples=18).streams["catalogue"]  # of six rows a class and row group
    sparse.slices(0, 18)
    assert "write shards with together: group" in caplog.text


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            {"loader": {"balance": {"furnitur": {}}}},
            r"loader.balance names 'furnitur', which mix does not have; it has furniture",
        ),
        (
            {"loader": {"balance": {"furniture": {"samples": 5}}}},
            r"holds 8 pictures of dataset 'furniture', not a multiple of loader.balance.",
        ),
        ({"loader": {"balance": {"furniture": {"samples": 1}}}}, r"'loader.balance.furniture.samples' is 1"),
        (
            {"loader": {"views": 2}, "batch_size": 18},
            r"a worker's part of a batch, 9 images, is not a multiple of loader.views 2",
        ),
        ({"loader": {"processes": 1, "actors": 1}}, "loader: processes 1 and actors 1 exclude each other"),
    ],
)
def test_settings_that_cannot_be_are_explained(values: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        parse_config(TrainConfig, {"tasks": TASKS, "mix": {"furniture": 1}, "batch_size": 16, **values}, "finetune")


def test_batch_size_counts_images_of_all_views() -> None:
    config = parse_config(
        TrainConfig, {"tasks": TASKS, "mix": {"a": 3, "b": 1}, "batch_size": 32, "loader": {"views": 2}}, "x"
    )
    assert config.mixture.first(1) == {"a": 6, "b": 2}
    assert config.model_copy(update={"compute": ComputeConfig(accumulation=2)}).mixture.first(1) == {"a": 3, "b": 1}
