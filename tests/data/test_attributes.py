"""Attributes as classes against brute force, whatever the blocks."""

from collections import Counter, defaultdict
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lookalike.artifacts import Artifact, Draft
from lookalike.data.attributes import (
    COUNTS,
    choose_classes,
    classes_of_rows,
    count_known,
    count_values,
    frequent_values,
)
from lookalike.data.parts import part_name, write_table
from lookalike.data.shard_files import write_shard
from lookalike.data.shards import STAGE, Classes, ShardsConfig, take_census
from lookalike.schemas import CORPUS, SHARD
from lookalike.stages import execute
from tests.data.conftest import make_rows, publish_corpus

Stated = list[list[tuple[str, str]]]


def table(stated: Stated) -> pa.Table:
    rows = [
        {"image_id": f"i{n}", "attributes": [{"name": k, "value": v} for k, v in sorted(pairs)]}
        for n, pairs in enumerate(stated)
    ]
    return pa.Table.from_pylist(rows, schema=pa.schema([CORPUS.field("image_id"), CORPUS.field("attributes")]))


def oracle(stated: Stated, least: int) -> tuple[dict[str, list[str]], list[list[int]]]:
    counts = Counter(pair for pairs in stated for pair in set(pairs))
    values = defaultdict(list)
    for (name, value), images in counts.items():
        if images >= least:
            values[name].append(value)
    classes = {name: sorted(values[name]) for name in sorted(values) if len(values[name]) >= 2}
    columns = []
    for pairs in stated:
        row = []
        for name, known in classes.items():
            own = [value for value in known if (name, value) in pairs]
            row.append(known.index(min(own)) if own else -1)
        columns.append(row)
    return classes, columns


some = st.lists(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("stuvw")), max_size=5), max_size=25)


@settings(max_examples=150)
@given(some, st.integers(1, 4), st.integers(1, 24))
def test_classes_and_columns_are_those_of_brute_force_wherever_the_parts_are_cut(
    stated: Stated, least: int, cut: int
) -> None:
    rows = table(stated)
    parts = pa.concat_tables([count_values(rows.slice(0, cut)), count_values(rows.slice(cut))])
    summed = parts.group_by(["name", "value"]).aggregate([("images", "sum")]).rename_columns(COUNTS.names)
    frequent = frequent_values(summed, least)
    classes, columns = oracle(stated, least)
    made = choose_classes(frequent)
    assert list(made.items()) == list(classes.items())
    assert classes_of_rows(rows, made) == columns
    known = count_known(pa.chunked_array([pa.array(columns, pa.list_(pa.int32()))]))
    assert known.tolist() == [sum(row[i] >= 0 for row in columns) for i in range(len(classes) if stated else 0)]


def test_rows_of_an_older_corpus_state_nothing() -> None:
    for rows in (
        pa.table({"image_id": ["a", "b"]}),
        table([[], []]),
        pa.table({"image_id": ["a", "b"], "attributes": pa.nulls(2, CORPUS.field("attributes").type)}),
    ):
        assert count_values(rows).num_rows == 0
        assert count_values(rows).schema == COUNTS
        assert classes_of_rows(rows, {"a": ["x", "y"]}) == [[-1], [-1]]
        assert classes_of_rows(rows, {}) == [[], []]


def corpus(num: int) -> pa.Table:
    random = np.random.default_rng(3)
    rows: list[dict[str, Any]] = []
    for i in range(num):
        stated = {("colour", "rgb"[int(c)]) for c in random.integers(0, 3, int(random.integers(0, 3)))}
        stated |= {("serial", str(i)), ("material", "oak")} | ({("size", "SML"[i % 3])} if i % 4 else set())
        rows.append(
            {
                "image_id": f"id-{i:04d}",
                "image": b"x" * 20,
                "dataset": "ab"[i % 2],
                "labels": [i % 3],
                "category": f"c{i % 4}",
                "group": f"g{i // 3}",
                "attributes": [{"name": k, "value": v} for k, v in sorted(stated)],
            }
        )
    return pa.Table.from_pylist(
        rows,
        schema=pa.schema(
            [
                *(CORPUS.field(name) for name in ("image_id", "image", "dataset", "category", "group", "attributes")),
                pa.field("labels", pa.list_(pa.int32())),
            ]
        ),
    )


@pytest.mark.parametrize("together", [None, "group"])
def test_shards_have_a_class_for_every_attribute(tmp_path: Any, together: Any) -> None:
    """Rows of equal values are the same whatever the order of the input, and as brute force has them."""
    rows = corpus(120)
    config = ShardsConfig(rows_per_shard=40, rows_per_group=10, together=together)
    stated = [[(e["name"], e["value"]) for e in entries] for entries in rows["attributes"].to_pylist()]
    classes, columns = oracle(stated, config.min_images_per_attribute)
    assert list(classes) == ["colour", "size"]  # a serial number has no class, material a single one
    found = []
    for number, order in enumerate((np.arange(120), np.random.default_rng(0).permutation(120))):
        census = {(r["kind"], r["name"]): r["images"] for r in take_census(rows, "grouped").to_pylist()}
        assert census[("attributes", "")] == 120
        made = choose_classes(frequent_values(count_values(rows), config.min_images_per_attribute))
        placed = Classes(census, 3, config, 4, made).place(rows.take(pa.array(order)))
        found.append({})
        for name in sorted(set(placed["place"].to_pylist())):
            part = placed.filter(pa.array([place == name for place in placed["place"].to_pylist()]))
            written = write_shard(part, str(tmp_path / str(number)), config.rows_per_group, 3)
            shard = pq.read_table(tmp_path / str(number) / name)
            assert shard.schema.equals(SHARD)
            found[-1].update(zip(shard["image_id"].to_pylist(), shard["attributes"].to_pylist(), strict=True))
            known = np.array(shard["attributes"].to_pylist()) >= 0
            assert written["attributes"].to_pylist() == [known.sum(axis=0).tolist()]
    assert found[0] == found[1] == dict(zip(rows["image_id"].to_pylist(), columns, strict=True))


def publish_labels(root: str, rows: list[dict[str, Any]], parts: int) -> Artifact:
    """A ``labels`` artifact: every training row has the one label."""
    draft = Draft(root, "labels", "shapes", f"{parts:020d}")
    size = -(-len(rows) // parts)
    for number in range(parts):
        ids = [row["image_id"] for row in rows[number * size : (number + 1) * size] if row["split"] == "train"]
        table = pa.table({"image_id": ids, "labels": pa.array([[0]] * len(ids), pa.list_(pa.int32()))})
        write_table(draft.path("image_labels.parquet", part_name(number)), table)
    draft.write_json("classes.json", [{"name": "shape"}])
    return draft.publish(config={}, parents={}, stage_version=1, duration_s=0)


@pytest.mark.ray
def test_the_stage_sums_values_over_parts(ray_session: None, root: str) -> None:
    rows = make_rows(60)
    for number, row in enumerate(rows):
        shape = row["category"].rpartition("/")[2]
        stated = {("shape", shape), ("serial", str(number))} | ({("third", "abc"[number % 3])} if number % 2 else set())
        row["attributes"] = [{"name": name, "value": value} for name, value in sorted(stated)]
    train = [row for row in rows if row["split"] == "train"]
    classes, columns = oracle([[(e["name"], e["value"]) for e in row["attributes"]] for row in train], 5)
    config = ShardsConfig(seed=1, rows_per_shard=30)
    for parts in (1, 3):
        given = {"corpus": [publish_corpus(root, rows, parts)], "labels": [publish_labels(root, rows, parts)]}
        made = execute(STAGE, config, given, root, "shards")
        assert made.read_json("classes.json")["attributes"] == classes
        tables = [pq.read_table(uri) for uri in made.files("shapes/part-")]
        found = {row["image_id"]: row["attributes"] for table in tables for row in table.to_pylist()}
        assert found == {row["image_id"]: column for row, column in zip(train, columns, strict=True)}
        assert made.stats["attributes"] == {
            name: {"classes": len(values), "images": sum(column[place] >= 0 for column in columns)}
            for place, (name, values) in enumerate(classes.items())
        }
