from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lookalike.data import dedup
from lookalike.data.dedup import (
    SIGNATURES,
    DedupConfig,
    borrow,
    content_pairs,
    embedding_pairs,
    find_duplicates,
    hash_pairs,
    keep_training,
    sign_images,
)  # fmt: skip
from lookalike.data.features import unit_rows

from .conftest import make_rows


def noisy_hashes(count: int, seed: int) -> np.ndarray[Any, Any]:
    """Hashes of which every third is the one before with some bits flipped."""
    rng = np.random.default_rng(seed)
    hashes = rng.integers(0, 256, (count, 32)).astype(np.uint8)
    for row in range(2, count, 3):
        flips = rng.choice(256, int(rng.integers(0, 45)), replace=False)
        bits = np.unpackbits(hashes[row - 1])
        bits[flips] ^= 1
        hashes[row] = np.packbits(bits)
    return hashes


def brute_force(hashes: np.ndarray[Any, Any], bound: int) -> set[tuple[int, int]]:
    bits = np.unpackbits(hashes, axis=1).astype(int)
    distance = (bits[:, None] != bits[None]).sum(axis=2)
    return {(i, j) for i in range(len(hashes)) for j in range(i + 1, len(hashes)) if distance[i, j] <= bound}


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), bound=st.integers(0, 31))
@pytest.mark.parametrize("exact_rows", [1000, 0])
def test_hash_pairs_are_exactly_those_within_the_bound(exact_rows: int, seed: int, bound: int) -> None:
    hashes = noisy_hashes(90, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dedup, "EXACT_SCAN_ROWS", exact_rows)  # 0: the hash tables of large corpora
        assert {tuple(pair) for pair in hash_pairs(hashes, bound).tolist()} == brute_force(hashes, bound)


def test_embedding_pairs_match_a_full_product() -> None:
    rng = np.random.default_rng(1)
    vectors = unit_rows(np.repeat(rng.normal(size=(40, 16)), 2, axis=0) + rng.normal(0, 0.05, (80, 16)))
    cosine = vectors @ vectors.T
    expected = {(i, j) for i in range(80) for j in range(i + 1, 80) if cosine[i, j] >= 0.98}
    assert len(expected) > 20
    assert {tuple(pair) for pair in embedding_pairs(vectors, 0.98, 79).tolist()} == expected


def test_content_pairs_lead_to_the_first() -> None:
    assert content_pairs(np.array([b"x", b"y", b"x", b"x"], dtype="S1")).tolist() == [[0, 2], [0, 3]]


def signatures(rows: list[tuple[str, str | None, str, int]]) -> pa.Table:
    """(content, group, split, PDQ bits set) of each row."""
    table = [{"image_id": f"i{n}", "content": content.ljust(16).encode(), "quality": 100, "group": group,
              "split": split, "pdq": np.packbits(np.arange(256) < bits).tobytes()}
             for n, (content, group, split, bits) in enumerate(rows)]  # fmt: skip
    return pa.Table.from_pylist(table, schema=SIGNATURES)


def dropped(
    rows: list[tuple[str, str | None, str, int]], vectors: Any = None, config: DedupConfig | None = None,
) -> dict[str, tuple[str, str | None]]:
    same = np.tile(np.eye(1, 8, dtype=np.float32), (len(rows), 1)) if vectors is None else vectors
    found = find_duplicates(signatures(rows), same, config or DedupConfig()).to_pylist()
    return {row["image_id"]: (row["reason"], row["keeper_id"]) for row in found}


def test_views_of_a_product_survive_unless_their_bytes_are_equal() -> None:
    rows = [("a", "p", "train", 0), ("b", "p", "train", 5), ("a", "p", "train", 0), ("c", "q", "train", 3)]
    assert dropped(rows) == {"i2": ("duplicate", "i0")}


def test_pictures_without_a_group_are_dropped_when_near() -> None:
    assert dropped([("a", None, "train", 0), ("b", None, "train", 20)]) == {"i1": ("near_duplicate", "i0")}


def test_a_hash_pair_needs_the_embedding_to_agree() -> None:
    apart = np.eye(2, 8, dtype=np.float32)
    assert dropped([("a", None, "train", 0), ("b", None, "train", 20)], apart) == {}


def test_leak_firewall_drops_training_rows_near_a_test_row_groups_or_not() -> None:
    rows = [("a", "p", "train", 0), ("b", "q", "test", 10), ("c", "r", "train", 200), ("c", "s", "test", 200)]
    assert dropped(rows) == {"i0": ("overlaps_test", "i1"), "i2": ("overlaps_test", "i3")}


def test_a_group_that_is_in_test_never_trains() -> None:
    vectors = np.eye(2, 8, dtype=np.float32)
    assert dropped([("a", "p", "train", 0), ("b", "p", "test", 200)], vectors) == {"i0": ("group_in_test", None)}


def test_any_split_but_train_is_held_out() -> None:
    vectors = np.eye(2, dtype=np.float32)
    rows = [("a", "p", "train", 0), ("b", "p", "catalog", 200)]
    assert dropped(rows, vectors) == {"i0": ("group_in_test", None)}
    assert dropped(rows, vectors, DedupConfig(hold_out_groups=False)) == {}


def test_a_chain_of_small_differences_is_not_swallowed() -> None:
    """Each neighbour is within 20 bits, the ends are 80 apart: a row goes only for a twin that stayed."""
    rows = [(str(n), None, "train", 20 * n) for n in range(5)]
    vectors = unit_rows(np.stack([[1.0, 0.5 * n] for n in range(5)]))  # apart enough that cosine alone decides nothing
    loose = DedupConfig(min_cosine=0.0)
    found = find_duplicates(signatures(rows), vectors, loose).to_pylist()
    assert [(r["image_id"], r["keeper_id"]) for r in found] == [("i1", "i0"), ("i3", "i2")]
    assert {r["component"] for r in found} == {0}


def test_signatures_find_a_recompressed_copy() -> None:
    rows = make_rows(60)
    signed = sign_images(pa.table({key: [row[key] for row in rows] for key in ("image_id", "image", "group", "split")},
                                  schema=pa.schema([("image_id", pa.string()), ("image", pa.binary()),
                                                    ("group", pa.string()), ("split", pa.string())])))  # fmt: skip
    equal = content_pairs(np.array([c.hex() for c in signed["content"].to_pylist()], dtype="S32"))
    assert equal.tolist() == [[29, 49]]
    assert faiss.IndexBinaryFlat(256).d == 8 * len(signed["pdq"][0].as_py())


def test_dropped_rows_leave_training_and_lend_their_words() -> None:
    signed = signatures([("a", None, "train", 0), ("a", None, "train", 0), ("b", None, "train", 200),
                         ("b", None, "test", 200)])  # fmt: skip
    duplicates = find_duplicates(signed, np.repeat(np.eye(2, 8, dtype=np.float32), 2, axis=0), DedupConfig())
    rows = pa.table({"image_id": ["i0", "i1", "i2", "i3"], "split": ["train", "train", "train", "test"]})
    assert keep_training(rows, duplicates)["image_id"].to_pylist() == ["i0"]
    words = pa.table({"image_id": ["i1", "i2", "i3"], "term": ["x", "y", "z"]})
    assert borrow(words, duplicates).to_pylist() == [{"image_id": "i0", "term": "x"}]
