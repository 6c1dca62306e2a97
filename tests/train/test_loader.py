"""The loader: shares of a batch, who reads what, and that a resumed run reads what it would have read."""

from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lookalike.errors import UsageError
from lookalike.train.loader import BatchDataset, Stream, build_loader, build_streams, list_units, split_batch
from lookalike.vision.transforms import AugmentConfig, TransformConfig, build_train_transform
from tests.train.conftest import shard_rows, write_shard

MIX = {"catalogue": 3.0, "clipart": 1.0}


@given(st.dictionaries(st.sampled_from("abcdef"), st.floats(0.05, 10), min_size=1), st.integers(1, 512))
def test_shares_add_up_and_follow_the_weights(mix: dict[str, float], batch_size: int) -> None:
    try:
        counts = split_batch(batch_size, mix)
    except UsageError:
        assert min(mix.values()) / sum(mix.values()) * batch_size < 1
        return
    assert sum(counts.values()) == batch_size
    for name, count in counts.items():
        assert abs(count - batch_size * mix[name] / sum(mix.values())) < 1


def test_a_share_of_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match=r"batch_size 4 leaves no row for \['b'\]; raise it or the dataset's weight"):
        split_batch(4, {"a": 100.0, "b": 1.0})


def files(folder: Path, repeat: float = 1.0) -> dict[str, list[str]]:
    """Two data sets, in two files of two and three row groups."""
    made = {}
    for i, name in enumerate(MIX):
        rows = shard_rows(name, 25, seed=i, repeat=repeat)
        made[name] = [write_shard(str(folder / name / f"part-{n}.parquet"), part, 5)
                      for n, part in enumerate((rows[:10], rows[10:]))]  # fmt: skip
    return made


def read_ids(stream: Stream, num: int, start: int = 0) -> list[str]:
    return [table["image_id"][row].as_py() for table, row in islice(stream.rows(start), num)]


@pytest.mark.parametrize("world", [1, 2, 5])
def test_all_workers_together_read_every_row_once_an_epoch(tmp_path: Path, world: int) -> None:
    found: Counter[str] = Counter()
    for rank in range(world):
        stream = build_streams(files(tmp_path), seed=1, rank=rank, world=world, resample=True)["catalogue"]
        found.update(read_ids(stream, 5 * len(range(rank, 5, world))))
    assert len(found) == 25
    assert set(found.values()) == {1}


def test_rows_are_repeated_as_their_factor_says(tmp_path: Path) -> None:
    made = files(tmp_path, repeat=2.4)
    stream = build_streams(made, seed=1, rank=0, world=1, resample=True)["catalogue"]
    epochs = 30
    sizes = [sum(len(stream._order(epoch, unit)) for unit in stream.units) for epoch in range(epochs)]
    assert abs(sum(sizes) / epochs / 25 - 2.4) < 0.1
    found = Counter(read_ids(stream, sum(sizes)))
    assert len(found) == 25
    assert all(2 * epochs <= count <= 3 * epochs for count in found.values())
    first = Counter(read_ids(stream, sizes[0]))
    assert set(first.values()) <= {2, 3}
    plain = build_streams(made, seed=1, rank=0, world=1, resample=False)["catalogue"]
    assert set(Counter(read_ids(plain, 25)).values()) == {1}


def test_epochs_and_seeds_have_orders_of_their_own(tmp_path: Path) -> None:
    made = files(tmp_path)
    one, two = (build_streams(made, seed=seed, rank=0, world=1, resample=True)["catalogue"] for seed in (1, 2))
    epochs = read_ids(one, 50)
    assert set(epochs[:25]) == set(epochs[25:])
    assert epochs[:25] != epochs[25:]
    assert read_ids(two, 25) != epochs[:25]


@pytest.mark.parametrize("start", [0, 1, 7, 25, 31, 110])
def test_a_stream_starts_anywhere(tmp_path: Path, start: int) -> None:
    stream = build_streams(files(tmp_path, repeat=1.3), seed=1, rank=1, world=2, resample=True)["clipart"]
    assert read_ids(stream, 20, start) == read_ids(stream, start + 20)[start:]


def test_fewer_row_groups_than_workers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"dataset 'catalogue' has 5 row groups for 6 workers; write shards with"):
        build_streams(files(tmp_path), seed=1, rank=0, world=6, resample=True)
    assert [unit.num_rows for unit in list_units(files(tmp_path)["catalogue"])] == [5] * 5


def make_batches(made: dict[str, list[str]], start: int = 0, rank: int = 0) -> BatchDataset:
    streams = build_streams(made, seed=3, rank=rank, world=2, resample=True)
    transform = build_train_transform(TransformConfig(size=32), AugmentConfig())
    return BatchDataset(streams, split_batch(8, MIX), transform, seed=3, start=start, stop=9)


def assert_same(one: list[dict[str, torch.Tensor]], other: list[dict[str, torch.Tensor]]) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_resumed_loader_gives_the_rest_bitwise(tmp_path: Path) -> None:
    made = files(tmp_path, repeat=1.5)
    whole = list(make_batches(made))
    assert len(whole) == 9
    for start in (1, 4, 8):
        torch.manual_seed(start)  # the state the process happens to have does not matter
        assert_same(list(make_batches(made, start)), whole[start:])
    assert not torch.equal(whole[0]["images"], next(iter(make_batches(made, rank=1)))["images"])


def test_what_a_batch_holds(tmp_path: Path) -> None:
    batch = next(iter(make_batches(files(tmp_path))))
    assert batch["images"].shape == (8, 3, 32, 32)
    assert batch["images"].is_contiguous(memory_format=torch.channels_last)
    assert {name: batch[name].dtype for name in ("labels", "category", "group")} == dict.fromkeys(
        ("labels", "category", "group"), torch.int64)  # fmt: skip
    assert batch["labels"].shape[0] == 8
    assert batch["labels"].min() == -1


@pytest.mark.slow
@pytest.mark.parametrize("start", [0, 1])
def test_the_number_of_loader_processes_changes_nothing(tmp_path: Path, start: int) -> None:
    made = files(tmp_path)
    assert_same(list(build_loader(make_batches(made, start), 2)), list(make_batches(made, start)))
