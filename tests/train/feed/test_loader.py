"""The loader: who reads what in which order, what a batch holds, and that neither restarts nor builders change it."""

from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from lookalike.errors import ArtifactError, UsageError
from lookalike.sampling import round_repeats, stable_keys
from lookalike.seeds import derive_seed
from lookalike.train.feed.draws import BalanceConfig
from lookalike.train.feed.loader import BatchDataset, build_loader, move_images
from lookalike.train.feed.mixture import Mixture
from lookalike.train.feed.row_groups import list_row_groups, read_row_group
from lookalike.train.feed.streams import Stream, build_streams
from lookalike.vision.images import decode
from lookalike.vision.transforms import AugmentConfig, TransformConfig, build_augmentation
from tests.train.conftest import NUM_CLASSES, shard_rows, write_shard
from tests.vision.train_transform import build_train_transform

MIX = {"catalogue": 3.0, "clipart": 1.0}
SIZE = TransformConfig(size=32, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))


def files(folder: Path, repeat: float = 1.0) -> dict[str, list[str]]:
    """Two data sets, in two files of two and three row groups."""
    made = {}
    for i, name in enumerate(MIX):
        rows = shard_rows(name, 25, seed=i, repeat=repeat)
        made[name] = [
            write_shard(str(folder / name / f"part-{n}.parquet"), part, 5)
            for n, part in enumerate((rows[:10], rows[10:]))
        ]
    return made


def ids_of(pieces: list[Any], stream: Stream) -> list[str]:
    """The ids of slices, read without the loader."""
    found = []
    for piece in pieces:
        table = read_row_group(piece.row_group)
        light = stream.draw.read(table) if stream.draw.columns else None
        rows = stream.draw.order(piece.row_group, piece.epoch, light)[piece.start : piece.stop]
        found += table["image_id"].take(pa.array(rows)).to_pylist()
    return found


def read_ids(stream: Stream, num: int, start: int = 0) -> list[str]:
    return ids_of(stream.slices(start, num), stream)


def make_streams(made: dict[str, list[str]], **options: Any) -> dict[str, Stream]:
    return build_streams(made, **{"seed": 1, "rank": 0, "world": 1, "resample": True, **options})


def plain_rows(uris: list[str], name: str, seed: int, rank: int, world: int) -> Iterator[dict[str, Any]]:
    """The oracle: the rows of a stream one after the other, by replaying every epoch from its beginning."""
    row_groups, epoch = list_row_groups(uris), 0
    while True:
        order = np.random.default_rng(derive_seed(seed, name, epoch)).permutation(len(row_groups))
        total, before = sum(row_group.num_rows for row_group in row_groups), 0
        for number in (number for i in range(world) for number in order[i::world]):
            start, stop = total * rank // world - before, total * (rank + 1) // world - before
            size = row_groups[number].num_rows
            start, stop, before = max(start, 0), min(stop, size), before + size
            if start >= stop:
                continue
            row_group, table = row_groups[number], read_row_group(row_groups[number]).to_pylist()
            keys, repeat = stable_keys([row["image_id"] for row in table]), np.array([r["repeat"] for r in table])
            copies = round_repeats(repeat, keys, seed=seed, epoch=epoch)
            rows = [row for row, times in zip(table, copies, strict=True) for _ in range(times)]
            source = derive_seed(seed, row_group.uri.rsplit("/", 1)[-1], row_group.number, epoch)
            drawn = np.random.default_rng(source).permutation(len(rows))
            yield from (rows[i] for i in drawn[len(rows) * start // size : len(rows) * stop // size])
        epoch += 1


@pytest.mark.parametrize("world", [1, 2, 3, 4, 5])
def test_all_workers_together_read_every_row_once_an_epoch(tmp_path: Path, world: int) -> None:
    """Five row groups on two workers were three and two: as many steps on both left out rows of the first."""
    found: Counter[str] = Counter()
    shares = []
    for rank in range(world):
        stream = make_streams(files(tmp_path), rank=rank, world=world)["catalogue"]
        shares.append(25 * (rank + 1) // world - 25 * rank // world)
        found.update(read_ids(stream, shares[-1]))
        assert all(piece.epoch == 1 for piece in stream.slices(shares[-1], 5))
    assert max(shares) - min(shares) <= 1
    assert len(found) == 25
    assert set(found.values()) == {1}


def test_row_groups_that_differ_in_size_are_dealt_out_evenly(tmp_path: Path) -> None:
    rows = shard_rows("catalogue", 47, seed=1)
    uris = [write_shard(str(tmp_path / f"part-{n}.parquet"), part, 30) for n, part in enumerate((rows[:30], rows[30:]))]
    for epoch in range(3):
        streams = [make_streams({"c": uris}, rank=rank, world=2, resample=False)["c"] for rank in (0, 1)]
        ends = [stream.slices(0, 24 * (epoch + 1) - 1) for stream in streams]
        rows_of = [sum(s.stop - s.start for s in slices if s.epoch == epoch) for slices in ends]
        assert sorted(rows_of) in ([23, 23], [23, 24])
    read = Counter(read_ids(streams[0], 23) + read_ids(streams[1], 24))
    assert len(read) == 47


def test_rows_are_repeated_as_their_factor_says(tmp_path: Path) -> None:
    made = files(tmp_path, repeat=2.4)
    stream = make_streams(made)["catalogue"]
    epochs, ids, found = 30, Counter[str](), Counter[int]()
    for piece in stream.slices(0, 25 * 2 * epochs):
        found[piece.epoch] += piece.stop - piece.start
    sizes = [found[epoch] for epoch in range(epochs - 12)]  # wholly read: 50 rows an epoch are the least
    assert abs(sum(sizes) / len(sizes) / 25 - 2.4) < 0.15
    ids = Counter(read_ids(stream, sum(sizes)))
    assert len(ids) == 25
    assert all(2 * len(sizes) <= count <= 3 * len(sizes) for count in ids.values())
    assert set(Counter(read_ids(stream, sizes[0])).values()) <= {2, 3}
    plain = make_streams(made, resample=False)["catalogue"]
    assert set(Counter(read_ids(plain, 25)).values()) == {1}


def test_epochs_and_seeds_have_orders_of_their_own(tmp_path: Path) -> None:
    made = files(tmp_path)
    one, two = (make_streams(made, seed=seed)["catalogue"] for seed in (1, 2))
    epochs = read_ids(one, 50)
    assert set(epochs[:25]) == set(epochs[25:])
    assert epochs[:25] != epochs[25:]
    assert read_ids(two, 25) != epochs[:25]


@pytest.mark.parametrize("repeat", [1.0, 1.3])
@pytest.mark.parametrize(("rank", "world"), [(0, 1), (1, 2), (2, 4)])
def test_a_stream_is_addressed_anywhere_as_if_it_had_been_replayed(
    tmp_path: Path, repeat: float, rank: int, world: int
) -> None:
    made = files(tmp_path, repeat)
    rows = plain_rows(made["clipart"], "clipart", 1, rank, world)
    expected = [row["image_id"] for row in islice(rows, 150)]
    for start in (0, 1, 7, 25, 31, 110):
        fresh = make_streams(made, rank=rank, world=world)["clipart"]
        assert read_ids(fresh, 20, start) == expected[start : start + 20]
    backwards = make_streams(made, rank=rank, world=world)["clipart"]
    assert [read_ids(backwards, 3, start) for start in (90, 4)] == [expected[90:93], expected[4:7]]


def test_fewer_row_groups_than_workers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"dataset 'catalogue' has 5 row groups for 6 workers; write shards with"):
        make_streams(files(tmp_path), world=6)
    assert [row_group.num_rows for row_group in list_row_groups(files(tmp_path)["catalogue"])] == [5] * 5


def make_batches(made: dict[str, list[str]], start: int = 0, rank: int = 0, **options: Any) -> BatchDataset:
    streams = build_streams(made, seed=3, rank=rank, world=2, resample=True, balance=options.pop("balance", None))
    augment = build_augmentation(SIZE, AugmentConfig())
    mixture = options.pop("mixture", Mixture(8, MIX))
    return BatchDataset(streams, mixture, augment, seed=3, start=start, stop=9, num_classes=NUM_CLASSES, **options)


def assert_same(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys()
        assert a["ids"] == b["ids"]
        assert a["images"].stride() == b["images"].stride()
        assert a["place"] == b["place"]
        assert all(torch.equal(a[name], b[name]) for name in a if name not in ("ids", "place"))


def test_batches_are_those_of_one_picture_after_the_other(tmp_path: Path) -> None:
    """Bytes of the mixture, of augmentation and of normalisation, against float pictures made one by one."""
    made = files(tmp_path, repeat=1.5)
    transform = build_train_transform(SIZE, AugmentConfig())
    streams = {name: plain_rows(made[name], name, 3, 1, 2) for name in MIX}
    for step, raw in enumerate(make_batches(made, rank=1)):
        batch = move_images(raw, torch.device("cpu"), SIZE)
        rows = [row for name, count in Mixture(8, MIX).first(1).items() for row in islice(streams[name], count)]
        torch.manual_seed(derive_seed(3, "augment", 1, step))
        images = torch.stack([transform(decode(row["image"])) for row in rows])
        assert torch.equal(batch["images"], images)
        assert batch["images"].is_contiguous(memory_format=torch.channels_last)
        assert batch["ids"] == [row["image_id"] for row in rows]
        assert batch["group"].tolist() == [row["group"] for row in rows]
        assert batch["category"].tolist() == [row["category"] for row in rows]
        assert [[v for v in known if v >= 0] for known in batch["labels"].tolist()] == [row["labels"] for row in rows]


def test_a_resumed_loader_gives_the_rest_bitwise_and_leaves_the_process_s_randomness_alone(tmp_path: Path) -> None:
    made = files(tmp_path, repeat=1.5)
    whole = list(make_batches(made))
    assert len(whole) == 9
    for start in (1, 4, 8):
        torch.manual_seed(start)  # the state the process happens to have does not matter
        assert_same(list(make_batches(made, start)), whole[start:])
        assert torch.initial_seed() == start
    assert not torch.equal(whole[0]["images"], next(iter(make_batches(made, rank=1)))["images"])


def test_what_a_batch_holds(tmp_path: Path) -> None:
    batch = next(iter(make_batches(files(tmp_path), rank=1)))
    assert (batch["images"].shape, batch["images"].dtype) == ((8, 3, 32, 32), torch.uint8)
    names = ("labels", "category", "group", "row")
    assert {name: batch[name].dtype for name in names} == dict.fromkeys(names, torch.int64)
    assert batch["labels"].shape[0] == 8
    assert batch["labels"].min() == -1
    assert len(set(batch["row"].tolist())) == len(set(batch["ids"]))


def test_a_picture_has_one_number_wherever_it_stands(tmp_path: Path) -> None:
    """Resampling and small row groups put a picture into a batch twice: it must not be its own negative."""
    made = files(tmp_path, repeat=3.0)
    seen: dict[str, set[int]] = {}
    repeated = 0
    for rank in (0, 1):
        for batch in make_batches(made, rank=rank):
            repeated += len(batch["ids"]) - len(set(batch["ids"]))
            for image_id, number in zip(batch["ids"], batch["row"].tolist(), strict=True):
                seen.setdefault(image_id, set()).add(number)
    assert repeated > 0
    assert all(len(numbers) == 1 for numbers in seen.values())
    assert len(set().union(*seen.values())) == len(seen)


def test_two_views_are_the_one_and_another_with_the_same_labels(tmp_path: Path) -> None:
    made = files(tmp_path)
    one, two = next(iter(make_batches(made))), next(iter(make_batches(made, views=2)))
    assert two["images"].shape == (16, 3, 32, 32)
    assert not torch.equal(two["images"][:8], two["images"][8:])
    assert torch.equal(two["images"][0], one["images"][0])  # the first picture's first view has used no randomness yet
    assert two["ids"] == one["ids"] * 2
    for name in ("labels", "category", "group", "row"):
        assert torch.equal(two[name], torch.cat([one[name]] * 2))


@pytest.mark.slow
@pytest.mark.parametrize("start", [0, 1])
def test_the_number_of_loader_processes_changes_nothing(tmp_path: Path, start: int) -> None:
    made = files(tmp_path)
    assert_same(list(build_loader(make_batches(made, start), 2)), list(make_batches(made, start)))


def damage(uri: str, position: float, num: int = 200) -> None:
    content = bytearray(Path(uri).read_bytes())
    begin = int(len(content) * position)
    content[begin : begin + num] = bytes(num)
    Path(uri).write_bytes(content)


def replaced(folder: Path, **values: Any) -> dict[str, list[str]]:
    """One data set of which the seventh row has other values; repeats none of them."""
    rows = shard_rows("catalogue", 20, seed=0)
    rows[6].update(values)
    return {"catalogue": [write_shard(str(folder / "catalogue" / "part-0.parquet"), rows, 5)]}


def read_all(made: dict[str, list[str]]) -> None:
    for _ in make_batches(made, mixture=Mixture(5, {"catalogue": 1})):
        pass


def test_a_file_that_is_missing_cut_or_damaged_is_named(tmp_path: Path) -> None:
    made = replaced(tmp_path)
    (uri,) = made["catalogue"]
    whole = Path(uri).read_bytes()
    Path(uri).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ArtifactError, match=r"part-0\.parquet cannot be read: .*; if the file is damaged, remove"):
        make_streams(made)
    Path(uri).write_bytes(whole)
    streams = make_streams(made, resample=False)
    damage(uri, 0.3, num=len(whole) // 6)  # pages of the row groups in the middle
    with pytest.raises(ArtifactError, match=r"part-0\.parquet, row group [12].*(cannot be read|image 'catalogue-)"):
        for _ in BatchDataset(
            streams, Mixture(5, {"catalogue": 1}), build_augmentation(SIZE, AugmentConfig()), seed=3, start=0, stop=4
        ):
            pass
    Path(uri).unlink()
    with pytest.raises(
        ArtifactError, match=r"part-0\.parquet does not exist; remove the folder of its artifact and run"
    ):
        make_streams(made)
    with pytest.raises(ArtifactError, match=r"part-0\.parquet, row group 2 does not exist"):
        read_row_group(streams["catalogue"].row_groups[2])


def test_an_undecodable_picture_is_named(tmp_path: Path) -> None:
    made = replaced(tmp_path, image=b"\x89PNG\r\n no picture")
    words = r"part-0\.parquet, row group 1, image 'catalogue-006': not_an_image, though the corpus accepted it"
    with pytest.raises(ArtifactError, match=words):
        read_all(made)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"category": 3}, r"column 'category' holds 3, but classes.json has 3 classes \(0 to 2\)"),
        ({"group": -2}, r"column 'group' holds -2, but classes.json has 4 classes \(0 to 3\)"),
        ({"labels": [0, 9]}, r"column 'labels' holds 9, but classes.json has 5 classes \(0 to 4\)"),
        ({"labels": [-1]}, r"column 'labels' holds -1, but classes.json has 5 classes"),
    ],
)
def test_labels_beyond_the_classes_are_refused(tmp_path: Path, values: dict[str, Any], words: str) -> None:
    with pytest.raises(ArtifactError, match=rf"part-0\.parquet, row group 1: {words}"):
        read_all(replaced(tmp_path, **values))


@pytest.mark.parametrize("values", [{"category": None}, {"group": None}, {"labels": None}])
def test_a_label_that_is_null_is_unknown(tmp_path: Path, values: dict[str, Any]) -> None:
    read_all(replaced(tmp_path, **values))


@pytest.mark.slow
def test_an_error_in_a_loader_process_arrives_as_it_is(tmp_path: Path) -> None:
    made = replaced(tmp_path, category=3)
    with pytest.raises(ArtifactError) as caught:
        list(build_loader(make_batches(made, mixture=Mixture(5, {"catalogue": 1})), 1))
    assert "\n" not in str(caught.value)


def test_a_dataset_without_rows_is_refused(tmp_path: Path) -> None:
    uri = write_shard(str(tmp_path / "part-0.parquet"), [], 5)
    with pytest.raises(UsageError, match="dataset 'empty' has no rows; leave it out of the mix"):
        make_streams({"empty": [uri]})
    nothing = write_shard(str(tmp_path / "part-1.parquet"), shard_rows("none", 6, 0, repeat=0.0), 3)
    with pytest.raises(UsageError, match="dataset 'none' has no row with a repeat factor above 0"):
        make_streams({"none": [nothing]})["none"].slices(0, 1)
    rows = [{**row, "group": -1} for row in shard_rows("none", 6, 0)]
    nothing = write_shard(str(tmp_path / "part-2.parquet"), rows, 3)
    with pytest.raises(UsageError, match="dataset 'none' has no row with a group; leave it out of the mix or out of b"):
        make_streams({"none": [nothing]}, balance={"none": BalanceConfig(samples=2)})["none"].slices(0, 2)
