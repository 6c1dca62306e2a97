"""Shards that keep classes together: nothing of the shuffle is lost, and no class is cut without need."""

from collections import defaultdict
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lookalike.data.shard_files import copies_of_labels, pack_groups, write_shard
from lookalike.data.shards import Classes, ShardsConfig, take_census
from lookalike.schemas import SHARD


@given(st.lists(st.integers(1, 12), max_size=12), st.integers(1, 6))
def test_row_groups_cover_all_rows_and_cut_only_what_is_too_large(sizes: list[int], limit: int) -> None:
    bundles = np.repeat(np.arange(len(sizes)), sizes or 0).astype(np.uint64)
    groups = pack_groups(bundles, limit)
    assert [row for start, stop in groups for row in range(start, stop)] == list(range(len(bundles)))
    assert all(0 < stop - start <= limit for start, stop in groups)
    for bundle, size in enumerate(sizes):
        touched = sum(bool((bundles[start:stop] == bundle).any()) for start, stop in groups)
        assert touched == 1 if size <= limit else touched <= -(-size // limit) + 1
    if set(sizes) <= {1}:  # rows of their own: every group but the last is full
        assert [stop - start for start, stop in groups[:-1]] == [limit] * (len(groups) - 1)


def test_a_label_s_frequency_is_its_share_of_the_labelled_images_and_repeats_have_an_upper_bound() -> None:
    """Pinterest section 4.6, with a bound of our own."""
    counts = {("labelled", ""): 400, ("label", "0"): 400, ("label", "1"): 16, ("label", "2"): 1}
    classes = Classes(counts, 4, ShardsConfig(threshold=0.16, max_repeat=5.0), 0)
    assert classes.label_frequency.tolist() == [1.0, 0.04, 0.0025, 0.0]
    assert classes.repeats.tolist() == [1.0, 2.0, 5.0, 1.0]  # sqrt(64) = 8 without the bound


def test_copies_of_a_label_are_the_repeats_of_its_images() -> None:
    labels = pa.chunked_array([pa.array([[0, 1], [1], []], pa.list_(pa.int32()))])
    assert copies_of_labels(labels, np.array([2.0, 1.5, 7.0]), 3).tolist() == [2.0, 3.5, 0.0]


def corpus(num: int, groups: int) -> pa.Table:
    """Rows of which every fifth has no group; group 0 is large."""
    random = np.random.default_rng(0)
    rows: list[dict[str, Any]] = [
        {
            "image_id": f"id-{i:04d}",
            "image": b"x" * 50,
            "dataset": "ab"[i % 2],
            "labels": [i % 3],
            "category": f"c{i % 4}" if i % 7 else None,
            "group": None if i % 5 == 0 else "g0" if i % 3 == 0 else f"g{int(random.integers(1, groups))}",
        }
        for i in range(num)
    ]
    return pa.Table.from_pylist(rows)


def census(rows: pa.Table) -> dict[tuple[str, str], int]:
    return {(r["kind"], r["name"]): r["images"] for r in take_census(rows, "grouped").to_pylist()}


def written(rows: pa.Table, config: ShardsConfig, folder: str) -> dict[str, list[list[dict[str, Any]]]]:
    """File -> row groups -> rows, of ``rows`` placed and written without Ray."""
    placed = Classes(census(rows), 3, config, seed=4).place(rows)
    found = {}
    for name in sorted(set(placed["place"].to_pylist())):
        part = placed.filter(pa.array([place == name for place in placed["place"].to_pylist()]))
        write_shard(part, folder, config.rows_per_group, 3)
        with pq.ParquetFile(f"{folder}/{name}") as file:
            assert file.schema_arrow.equals(SHARD)
            found[name] = [file.read_row_group(i).to_pylist() for i in range(file.num_row_groups)]
    return found


@pytest.mark.parametrize("together", ["group", "category"])
def test_a_class_lies_in_one_row_group_unless_it_is_larger(tmp_path: Any, together: Any) -> None:
    config = ShardsConfig(rows_per_shard=80, rows_per_group=20, together=together)
    rows = corpus(400, groups=60)
    files = written(rows, config, str(tmp_path))
    homes: dict[tuple[str, int], set[tuple[str, int]]] = defaultdict(set)
    sizes: dict[tuple[str, int], int] = defaultdict(int)
    for name, groups in files.items():
        for number, group in enumerate(groups):
            assert len(group) <= 20
            for row in group:
                if row[together] >= 0:
                    homes[row["dataset"], row[together]].add((name, number))
                    sizes[row["dataset"], row[together]] += 1
    total = defaultdict(int)
    for (_, label), size in sizes.items():
        total[label] += size
    small = [key for key in homes if total[key[1]] <= 20]
    assert all(len(homes[key]) == 1 for key in small)
    large = [key for key in homes if total[key[1]] > 20]
    assert large
    for key in large:  # spread over the data set, several rows in each place
        assert len({name for name, _ in homes[key]}) > 1
        assert sizes[key] / len(homes[key]) > 2
    assert (together == "category") or len(small) > 50
    read = [row["image_id"] for groups in files.values() for group in groups for row in group]
    assert sorted(read) == rows["image_id"].to_pylist()


def test_the_order_is_that_of_any_blocks_and_of_no_input(tmp_path: Any) -> None:
    config = ShardsConfig(rows_per_shard=80, rows_per_group=20, together="group")
    rows = corpus(200, groups=30)
    order = np.random.default_rng(1).permutation(200)
    one = written(rows, config, str(tmp_path / "one"))
    other = written(rows.take(pa.array(order)), config, str(tmp_path / "other"))
    assert one == other
    first = [row["group"] for group in one["a/part-000000.parquet"] for row in group]
    assert first != sorted(first)


def test_rows_shuffled_one_by_one_are_written_as_they_were(tmp_path: Any) -> None:
    """The bytes of the plain shuffle: one table sorted by key, cut every ``rows_per_group`` rows."""
    config = ShardsConfig(rows_per_shard=200, rows_per_group=20)
    rows = corpus(150, groups=30)
    written(rows, config, str(tmp_path))
    placed = Classes(census(rows), 3, config, seed=4).place(rows)
    assert placed["bundle"].equals(placed["key"])
    part = placed.filter(pa.array([name == "a/part-000000.parquet" for name in placed["place"].to_pylist()]))
    sink = pa.BufferOutputStream()
    pq.write_table(
        part.sort_by([("key", "ascending"), ("image_id", "ascending")]).select(SHARD.names).cast(SHARD),
        sink,
        row_group_size=20,
        compression="none",
    )
    assert (tmp_path / "a/part-000000.parquet").read_bytes() == sink.getvalue().to_pybytes()
