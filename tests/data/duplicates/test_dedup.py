"""The whole rule against a loop over all pairs, and what it means for views, tests and chains."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lookalike.data.duplicates.copies import DUPLICATES
from lookalike.data.duplicates.dedup import borrow, find_duplicates, keep_training, lent_rows, split_parts
from lookalike.data.duplicates.signatures import row_numbers, signature_schema
from lookalike.data.duplicates.twins import COLOURS, DedupConfig
from lookalike.data.features import unit_rows

Row = tuple[str, str | None, str, int]


def colours_of(content: str) -> bytes:
    """Colours that no other content has."""
    return np.random.default_rng(list(content.encode())).integers(0, 256, COLOURS).astype(np.uint8).tobytes()


def signatures(rows: list[Row], vectors: Any = None, parts: tuple[int, ...] = ()) -> pa.Table:
    """(content, group, split, PDQ bits set) of each row; ``parts``: sizes of the corpus parts."""
    same = np.tile(np.eye(1, 8, dtype=np.float32), (len(rows), 1)) if vectors is None else unit_rows(vectors)
    numbers = np.concatenate([row_numbers(part, size) for part, size in enumerate(parts or (len(rows),))])
    flat = pa.array(same.astype(np.float16).reshape(-1))
    columns = [
        [f"i{n}" for n in range(len(rows))],
        numbers,
        [content.ljust(16).encode() for content, _, _, _ in rows],
        [np.packbits(np.arange(256) < bits).tobytes() for _, _, _, bits in rows],
        [None] * len(rows),
        [100] * len(rows),
        [group for _, group, _, _ in rows],
        [split for _, _, split, _ in rows],
        ["d"] * len(rows),
        [bytes(32)] * len(rows),
        [None] * len(rows),
        [0] * len(rows),
        [colours_of(row[0]) for row in rows],
    ]
    schema = signature_schema(same.shape[1])
    arrays = [pa.array(c, f.type) for c, f in zip(columns, schema, strict=False)]
    return pa.table([*arrays, pa.FixedSizeListArray.from_arrays(flat, same.shape[1])], schema=schema)


def find(rows: list[Row], vectors: Any = None, config: DedupConfig | None = None) -> list[dict[str, Any]]:
    return list(find_duplicates(signatures(rows, vectors), config or DedupConfig()).to_pylist())


def dropped(rows: list[Row], vectors: Any = None, config: DedupConfig | None = None) -> dict[str, Any]:
    return {row["image_id"]: (row["reason"], row["keeper_id"]) for row in find(rows, vectors, config)}


def by_loops(rows: list[Row], vectors: Any, config: DedupConfig) -> dict[str, tuple[str, int | None]]:
    """Row -> (reason, keeper), read off the rules one pair at a time."""
    unit = unit_rows(unit_rows(vectors).astype(np.float16))
    held = {group for _, group, split, _ in rows if split != "train" and group}

    def close(i: int, j: int) -> tuple[int, float] | None:
        bits, cosine = abs(rows[i][3] - rows[j][3]), float(unit[i] @ unit[j])
        near = (bits <= config.max_bits and cosine >= config.min_cosine) or (
            bits <= config.sure_max_bits and cosine >= config.sure_cosine
        )
        return (bits, -cosine) if near or rows[i][0] == rows[j][0] else None

    found: dict[int, tuple[str, int | None]] = {}
    for i, (content, group, split, _) in enumerate(rows):
        if split != "train":
            continue
        if group in held and group is not None:
            found[i] = ("group_in_test", None)
            continue
        equal = [j for j, row in enumerate(rows) if row[2] != "train" and row[0] == content]
        near = [(*c, j) for j, row in enumerate(rows) if row[2] != "train" and (c := close(i, j))]
        if equal or near:
            found[i] = ("overlaps_test", equal[0] if equal else min(near)[2])
    for i, (content, group, split, _) in enumerate(rows):
        for j in range(i if split == "train" and i not in found else 0):
            same = rows[j][0] == content
            allowed = same or not (group and rows[j][1])
            if rows[j][2] == "train" and j not in found and allowed and close(i, j):
                found[i] = ("duplicate" if same else "near_duplicate", j)
                break
    return {f"i{i}": entry for i, entry in found.items()}


@st.composite
def corpora(draw: st.DrawFn) -> tuple[list[Row], Any]:
    """Families of pictures whose copies, views and splits are mixed; equal bytes have equal hash and vector."""
    pictures = draw(st.lists(st.tuples(st.integers(0, 120), st.floats(0, 3.1)), min_size=1, max_size=9))
    rows, vectors = [], []
    for _ in range(draw(st.integers(1, 24))):
        number = draw(st.integers(0, len(pictures) - 1))
        split = draw(st.sampled_from(["train", "train", "train", "test", "catalog"]))
        rows.append((str(number), draw(st.sampled_from([None, "p", "q", "r"])), split, pictures[number][0]))
        vectors.append([np.cos(pictures[number][1]), np.sin(pictures[number][1])])
    return rows, np.array(vectors, np.float32)


@settings(max_examples=150)
@given(corpus=corpora(), hold_out=st.booleans())
def test_the_rows_that_go_are_those_a_loop_over_all_pairs_finds(corpus: tuple[list[Row], Any], hold_out: bool) -> None:
    rows, vectors = corpus
    config = DedupConfig(hold_out_groups=hold_out, min_cosine=0.7, sure_cosine=0.9, neighbours=1024)
    expected = by_loops(rows, vectors, config)
    if not hold_out:
        expected = by_loops(*without_group_rule(rows, vectors), config)
    found = {row["image_id"]: row for row in find(rows, vectors, config)}
    assert {key: row["reason"] for key, row in found.items()} == {key: reason for key, (reason, _) in expected.items()}
    for key, row in found.items():
        keeper = expected[key][1]
        assert row["keeper_id"] == (None if keeper is None else f"i{keeper}")
        assert row["split"] == (rows[keeper][2] if row["reason"] == "overlaps_test" else None)
        assert row["keeper_id"] not in found


def without_group_rule(rows: list[Row], vectors: Any) -> tuple[list[Row], Any]:
    """Held-out rows without groups hold out none; their groups say nothing else."""
    return [(c, None if split != "train" else g, split, b) for c, g, split, b in rows], vectors


@settings(max_examples=40)
@given(corpus=corpora(), cut=st.integers(0, 24))
def test_the_result_does_not_depend_on_how_the_corpus_is_cut(corpus: tuple[list[Row], Any], cut: int) -> None:
    rows, vectors = corpus
    cut = min(cut, len(rows))
    one = find_duplicates(signatures(rows, vectors), DedupConfig())
    two = find_duplicates(signatures(rows, vectors, (cut, len(rows) - cut)), DedupConfig())
    assert one.select(DUPLICATES.names) == two.select(DUPLICATES.names)
    parts = [part.num_rows for _, part in split_parts(two, 2)]
    assert sum(parts) == two.num_rows
    assert parts[0] == sum(int(image_id[1:]) < cut for image_id in two["image_id"].to_pylist())


def test_views_of_a_product_survive_unless_their_bytes_are_equal() -> None:
    rows = [("a", "p", "train", 0), ("b", "p", "train", 5), ("a", "p", "train", 0), ("c", "q", "train", 3)]
    assert dropped(rows) == {"i2": ("duplicate", "i0")}


def test_pictures_without_a_group_are_dropped_when_near() -> None:
    assert dropped([("a", None, "train", 0), ("b", None, "train", 20)]) == {"i1": ("near_duplicate", "i0")}


def test_a_hash_pair_needs_the_embedding_to_agree() -> None:
    apart = np.eye(2, 8, dtype=np.float32)
    assert dropped([("a", None, "train", 0), ("b", None, "train", 20)], apart) == {}


def test_leak_firewall_drops_training_rows_near_a_held_out_row_groups_or_not() -> None:
    rows = [("a", "p", "train", 0), ("b", "q", "test", 10), ("c", "r", "train", 200), ("c", "s", "val", 200)]
    found = find(rows)
    assert [(r["image_id"], r["keeper_id"], r["split"]) for r in found] == [("i0", "i1", "test"), ("i2", "i3", "val")]
    assert {r["reason"] for r in found} == {"overlaps_test"}


def test_any_split_but_train_is_held_out() -> None:
    vectors = np.eye(2, 8, dtype=np.float32)
    rows = [("a", "p", "train", 0), ("b", "p", "catalog", 200)]
    assert dropped(rows, vectors) == {"i0": ("group_in_test", None)}
    assert dropped(rows, vectors, DedupConfig(hold_out_groups=False)) == {}


def test_a_chain_of_small_differences_is_not_swallowed() -> None:
    """Each neighbour is within 20 bits, the ends are 80 apart: a row goes only for a twin that stayed."""
    rows: list[Row] = [(str(n), None, "train", 20 * n) for n in range(5)]
    vectors = unit_rows(np.stack([[1.0, 0.5 * n] for n in range(5)]))  # apart enough that cosine alone decides nothing
    found = find(rows, vectors, DedupConfig(min_cosine=0.0))
    assert [(r["image_id"], r["keeper_id"]) for r in found] == [("i1", "i0"), ("i3", "i2")]
    assert {r["component"] for r in found} == {"i0"}


def test_a_copy_of_a_row_that_goes_goes_to_the_row_that_stays() -> None:
    rows: list[Row] = [
        ("x", None, "train", 0),
        ("y", None, "train", 20),
        ("y", None, "train", 20),
        ("x", None, "train", 0),
    ]
    found = {r["image_id"]: (r["reason"], r["keeper_id"], r["component"], r["bits"]) for r in find(rows)}
    assert found == {
        "i1": ("near_duplicate", "i0", "i0", 20),
        "i2": ("near_duplicate", "i0", "i0", 20),
        "i3": ("duplicate", "i0", "i0", 0),
    }


def test_an_empty_corpus_has_no_duplicates() -> None:
    assert find_duplicates(signatures([]), DedupConfig()).num_rows == 0


def test_dropped_rows_leave_training_and_lend_their_words() -> None:
    signed = signatures(
        [("a", None, "train", 0), ("a", None, "train", 0), ("b", None, "train", 200), ("b", None, "test", 200)]
    )
    duplicates = find_duplicates(signed, DedupConfig())
    rows = pa.table({"image_id": ["i0", "i1", "i2", "i3"], "split": ["train", "train", "train", "test"]})
    assert keep_training(rows, duplicates)["image_id"].to_pylist() == ["i0"]
    words = pa.table({"image_id": ["i1", "i2", "i3"], "term": ["x", "y", "z"]})
    assert borrow(words, lent_rows(duplicates)).to_pylist() == [{"image_id": "i0", "term": "x", "keeper": 0}]


@pytest.mark.parametrize("family", [40])
def test_a_large_family_keeps_one_picture_with_few_neighbours_remembered(family: int) -> None:
    rows: list[Row] = [(str(n), None, "train", n % 20) for n in range(family)]
    assert len(find(rows, config=DedupConfig(neighbours=1))) == family - 1
