"""Tasks on attributes of the shards: found by name, read from their place in the column, silent where unknown."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from lookalike import storage
from lookalike.artifacts import Draft
from lookalike.errors import ArtifactError, UsageError
from lookalike.train.feed.loader import BatchDataset
from lookalike.train.feed.mixture import Mixture
from lookalike.train.feed.row_groups import list_row_groups, read_row_group, split_attributes
from lookalike.train.feed.streams import build_streams
from lookalike.train.run.checkpoints import last_checkpoint
from lookalike.train.run.footprint import measure
from lookalike.train.run.initialise import build_multitask_model, sample_features
from lookalike.train.run.settings import LoopConfig
from lookalike.train.run.trainer import training_card
from lookalike.vision.backbones import create_backbone
from lookalike.vision.transforms import AugmentConfig, TransformConfig, build_augmentation, build_eval_transform
from tests.train.conftest import NUM_CLASSES, TASKS, Bench, publish_encoder, shard_rows, write_shard

NAMES = {"colour": ["blue", "green", "red"], "made in": ["x", "y"], "size": ["L", "S"]}
STATED = {
    "colour": {"kind": "softmax", "field": "attribute.colour"},
    "size": {"kind": "normalized_softmax", "field": "attribute.size"},
}


def rows_of(dataset: str, num: int, seed: int = 0) -> list[dict[str, Any]]:
    rows = shard_rows(dataset, num, seed)
    for i, row in enumerate(rows):
        row["attributes"] = [-1 if i % 5 == 4 else i % 3, i % 2, i % 3 - 1]
    return rows


@pytest.fixture
def stated(tmp_path: Path) -> Bench:
    """A root whose shards have three attributes."""
    root = str(tmp_path / "root")
    draft = Draft(root, "shards", "shards", "5" * 20)
    for dataset in ("catalogue", "clipart"):
        write_shard(storage.join(draft.uri, dataset, "part-00000.parquet"), rows_of(dataset, 40), 10)
    classes = {name: [str(i) for i in range(n)] for name, n in NUM_CLASSES.items()}
    draft.write_json("classes.json", {**classes, "attributes": NAMES})
    draft.publish(config={}, parents={}, stage_version=1, duration_s=0.0)
    publish_encoder(root)
    return Bench(root)


def test_the_run_knows_the_attributes_that_its_tasks_read(stated: Bench) -> None:
    config = stated.config(tasks={**TASKS, **STATED})
    assert config.attributes == ("colour", "made in", "size")
    assert config.class_fields == {**NUM_CLASSES, "attribute.colour": 3, "attribute.size": 2}
    assert "- `colour`: softmax over 3 classes of `attribute.colour`" in training_card("tiny", config, {})
    assert LoopConfig.model_validate(config.model_dump(mode="json")) == config
    plain = stated.config()
    assert (plain.attributes, plain.class_fields) == ((), NUM_CLASSES)


@pytest.mark.parametrize(
    ("field", "words"),
    [
        (
            "attribute.color",
            r"task 'a' reads 'attribute.color', and the shards have no attribute 'color' "
            r"\(did you mean 'colour'\?\).*they have colour, made in, size",
        ),
        ("attribute.", r"not a field of a batch.*attribute.<name>"),
        ("colour", r"not a field of a batch; fields: labels, category, group, attribute.<name>, row"),
    ],
)
def test_an_attribute_that_is_not_there_is_explained(stated: Bench, field: str, words: str) -> None:
    with pytest.raises((UsageError, ValueError), match=words):
        stated.config(tasks={"a": {"kind": "softmax", "field": field}})


def test_shards_without_attributes_say_what_to_do_and_train_as_before(bench: Bench, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="they have none; map the source's columns to the corpus field attributes"):
        bench.config(tasks=STATED)
    config = bench.config(epochs=0.4)
    for uris in config.files.values():
        for uri in uris:
            table = pq.read_table(uri)
            pq.write_table(table.drop_columns(["attributes"]), uri, row_group_size=10)
    bench.train(config, tmp_path / "run")
    found = last_checkpoint(str(tmp_path / "run"))
    assert found is not None
    assert found.step == config.total_steps


def units_of(tmp_path: Path, rows: list[dict[str, Any]]) -> list[Any]:
    return list_row_groups([write_shard(str(tmp_path / "catalogue" / "part-0.parquet"), rows, 4)])


def batches(tmp_path: Path, rows: list[dict[str, Any]], views: int = 1) -> list[dict[str, Any]]:
    units = units_of(tmp_path, rows)
    streams = build_streams({"catalogue": [units[0].uri]}, seed=3, rank=0, world=1, resample=True)
    augment = build_augmentation(TransformConfig(size=32), AugmentConfig())
    return list(
        BatchDataset(
            streams,
            Mixture(6, {"catalogue": 1}),
            augment,
            seed=3,
            start=0,
            stop=4,
            views=views,
            num_classes={**NUM_CLASSES, "attribute.size": 2, "attribute.colour": 3},
            attributes=tuple(NAMES),
        )
    )


@pytest.mark.parametrize("views", [1, 2])
def test_batches_have_the_attributes_of_their_rows(tmp_path: Path, views: int) -> None:
    rows = rows_of("catalogue", 24)
    known = {row["image_id"]: row["attributes"] for row in rows}
    for batch in batches(tmp_path, rows, views):
        for place, name in ((0, "colour"), (2, "size")):
            column = batch[f"attribute.{name}"]
            assert column.dtype == torch.int64
            assert column.tolist() == [known[image_id][place] for image_id in batch["ids"]]
        assert "attribute.made in" not in batch
        assert "attributes" not in batch


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([0, 0, 2], r"column 'attributes', 'attribute.size', holds 2, but classes.json has 2 classes \(0 to 1\)"),
        ([0, 0, -2], r"column 'attributes', 'attribute.size', holds -2"),
        ([0, 0], r"column 'attributes' holds \[0, 0\] in row 1, but classes.json names 3: colour, made in, size"),
        (None, r"column 'attributes' holds None in row 1"),
    ],
)
def test_damaged_attributes_are_named(tmp_path: Path, value: Any, words: str) -> None:
    rows = rows_of("catalogue", 8)
    rows[5]["attributes"] = value
    with pytest.raises(ArtifactError, match=rf"part-0.parquet, row group 1: {words}"):
        batches(tmp_path, rows)


def test_a_column_that_is_missing_is_named(tmp_path: Path) -> None:
    (unit,) = units_of(tmp_path, rows_of("catalogue", 4))
    table = read_row_group(unit).drop_columns(["attributes"])
    assert split_attributes(unit, table, [], []) is table
    with pytest.raises(ArtifactError, match=r"has no column 'attributes', though its classes.json names colour, made"):
        split_attributes(unit, table, ["attribute.colour"], tuple(NAMES))


def test_a_sliced_table_gives_its_own_rows(tmp_path: Path) -> None:
    rows = rows_of("catalogue", 4)
    (unit,) = units_of(tmp_path, rows)
    table = split_attributes(
        unit, read_row_group(unit).slice(1, 2), ["attribute.size", "attribute.made in"], tuple(NAMES)
    )
    assert table["attribute.size"].to_pylist() == [row["attributes"][2] for row in rows[1:3]]
    assert table["attribute.made in"].to_pylist() == [row["attributes"][1] for row in rows[1:3]]


def test_proxies_start_from_the_attribute_s_rows(tmp_path: Path) -> None:
    rows = rows_of("catalogue", 12)
    backbone, transform = create_backbone("test_efficientnet"), build_eval_transform(TransformConfig(size=32))
    _, labels = sample_features(
        backbone,
        units_of(tmp_path, rows),
        transform,
        ["attribute.size", "group"],
        6,
        num_classes={"attribute.size": 2},
        attributes=tuple(NAMES),
    )
    picked = [rows[i] for i in (0, 1, 4, 5, 8, 9)]  # two of each row group
    assert labels["attribute.size"].tolist() == [row["attributes"][2] for row in picked]
    assert labels["group"].tolist() == [row["group"] for row in picked]


def test_tasks_on_attributes_train_from_data_and_are_foretold(stated: Bench, tmp_path: Path) -> None:
    tasks = {**STATED, "pairs": {"kind": "triplet", "field": "attribute.made in"}}
    config = stated.config(tasks=tasks, initialise={"images": 32}, epochs=0.6)
    before = build_multitask_model(config, initialise=True).state_dict()
    training = stated.train(config, tmp_path / "run")
    after = training.model.state_dict()
    heads = [name for name in before if name.startswith(("tasks.colour", "tasks.size"))]
    assert heads
    assert all((before[name] != after[name]).any() for name in heads)
    told = measure(config.train, config.encoder, config.num_classes)
    assert told.unknown in ((), ("pairs",))
    assert told.head_activations > 0


def test_rows_without_the_attribute_give_no_gradient(stated: Bench) -> None:
    model = build_multitask_model(stated.config(tasks=STATED), initialise=False)
    images = torch.randn(6, 3, 32, 32)
    size = torch.tensor([0, 1, -1, -1, 1, -1])
    unknown = torch.full((6,), -1)
    total, losses = model({"images": images, "attribute.colour": unknown, "attribute.size": size})
    total.backward()
    assert losses["colour"].item() == 0.0
    assert losses["size"].item() > 0.0
    for name, parameter in model.tasks.named_parameters():
        assert parameter.grad is not None
        assert (parameter.grad.abs().max() > 0) == name.startswith("size")
    vectors = torch.randn(6, 8, requires_grad=True)
    model.tasks["size"](vectors, {"attribute.size": size}).backward()
    assert vectors.grad is not None
    assert (vectors.grad.abs().sum(dim=1) > 0).tolist() == (size >= 0).tolist()
