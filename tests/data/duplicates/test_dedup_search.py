"""Cells, the search inside one, and what a part and a shuffle must agree on."""

import itertools
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from lookalike.data.duplicates import pair_search
from lookalike.data.duplicates.components import (
    both_ways,
    connected,
    contract,
    downwards,
    edge_checksum,
    edge_frame,
    large_star,
    small_star,
)
from lookalike.data.duplicates.pair_search import (
    CellKeys,
    Cells,
    band_keys,
    count_cells,
    merge_pairs,
    search_cell,
    train_cells,
)
from lookalike.data.duplicates.signatures import match_vectors, running_spans, signature_schema
from lookalike.data.duplicates.twins import COLOURS, DedupConfig
from lookalike.data.features import unit_rows


def noisy(count: int, seed: int) -> pa.Table:
    """Pictures of which every third is an earlier one with some bits flipped and its vector turned a little."""
    rng = np.random.default_rng(seed)
    bits, vectors = rng.random((count, 256)) < 0.5, rng.normal(size=(count, 24))
    trimmed, colours = rng.random((count, 256)) < 0.5, rng.integers(0, 100, (count, COLOURS)).astype(np.uint8)
    for row in range(2, count, 3):
        near = int(rng.integers(0, row))
        bits[row] = bits[near] ^ (rng.random(256) < rng.random() * 0.2)
        vectors[row] = vectors[near] + rng.normal(0, 0.1 if row % 2 else 0.4, 24)
        trimmed[row] = trimmed[near] ^ (rng.random(256) < rng.random() * 0.08)
        colours[row] = colours[near] + rng.integers(0, 14)
    contents = [f"{int(rng.integers(0, 2 * count)):016d}".encode() for _ in range(count)]
    flat = pa.array(unit_rows(vectors).astype(np.float16).reshape(-1))
    columns: list[Any] = [
        [f"i{n}" for n in range(count)],
        np.arange(count),
        contents,
        [h.tobytes() for h in np.packbits(bits, axis=1)],
        [None] * count,
        rng.integers(30, 100, count),
        [None if n % 2 else "g" for n in range(count)],
        ["test" if n % 5 == 4 else "train" for n in range(count)],
        ["d"] * count,
        [h.tobytes() for h in np.packbits(trimmed, axis=1)],
        [None] * count,
        rng.integers(30, 100, count),
        [c.tobytes() for c in colours],
    ]
    schema = signature_schema(24)
    arrays = [pa.array(c, f.type) for c, f in zip(columns, schema, strict=False)]
    return pa.table([*arrays, pa.FixedSizeListArray.from_arrays(flat, 24)], schema=schema)


def pairs_by_loops(table: pa.Table, config: DedupConfig) -> tuple[set[tuple[int, int]], dict[int, int]]:
    """(all pairs of training rows, closest held-out twin of each training row)."""
    rows = table.to_pylist()
    vectors = unit_rows(np.array([row["vector"] for row in rows], np.float32))
    inside, across, kinds = set(), {}, Counter[str]()
    for i, row in enumerate(rows):
        close = []
        for j, other in enumerate(rows):
            if row["split"] != "train" or i == j:
                continue
            whole, trimmed = (
                bin(int.from_bytes(row[name]) ^ int.from_bytes(other[name])).count("1") for name in ("pdq", "trimmed")
            )
            cosine = float(np.einsum("i,i", vectors[i], vectors[j]))
            sharp, told = (min(row[name], other[name]) >= config.min_quality for name in ("quality", "trimmed_quality"))
            colour = max(abs(a - b) for a, b in zip(row["colours"], other["colours"], strict=True))
            same = row["content"] == other["content"]
            near = (
                (sharp and whole <= config.max_bits and cosine >= config.min_cosine)
                or (whole <= config.sure_max_bits and cosine >= config.sure_cosine)
                or (told and trimmed <= config.trimmed_bits and colour <= config.max_colour)
            )
            bits = min(whole, trimmed) if told else whole
            kinds["colour"] += near and cosine < config.min_cosine
            if other["split"] != "train" and near:
                close.append((bits, -cosine, j))
            elif other["split"] == "train" and j < i and near and (same or not (row["group"] and other["group"])):
                inside.add((i, j))
        if close:
            across[i] = min(close)[2]
    assert kinds["colour"] > 5
    return inside, across


@pytest.mark.parametrize("tile", [(7, 11), (256, 8192)])
def test_a_cell_finds_exactly_the_pairs_of_the_rule(tile: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair_search, "QUERY_TILE", tile[0])
    monkeypatch.setattr(pair_search, "BASE_TILE", tile[1])
    table, config = noisy(300, 2), DedupConfig()
    shuffled = table.take(pa.array(np.random.default_rng(0).permutation(300)))
    inside, across = pairs_by_loops(table, config)
    assert len(inside) > 15
    assert len(across) > 5
    found = search_cell(shuffled, config).to_pylist()
    assert {(r["row"], r["twin"]) for r in found if r["split"] is None} == inside
    assert {r["row"]: r["twin"] for r in found if r["split"] == "test"} == across
    assert all((r["row_id"], r["twin_id"]) == (f"i{r['row']}", f"i{r['twin']}") for r in found)


def test_a_family_costs_as_many_pairs_as_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair_search, "QUERY_TILE", 16)
    monkeypatch.setattr(pair_search, "BASE_TILE", 16)
    one = noisy(1, 0).set_column(7, "split", pa.array(["train"])).to_pylist()[0]
    rows = [
        one | {"image_id": f"i{n}", "row": n, "quality": 90, "group": None, "content": bytes([n] * 16)}
        for n in range(100)
    ]
    found = search_cell(pa.Table.from_pylist(rows, schema=signature_schema(24)), DedupConfig(neighbours=3))
    twins: dict[int, list[int]] = {}
    for pair in found.to_pylist():
        twins.setdefault(pair["row"], []).append(pair["twin"])
    assert twins == {row: list(range(min(row, 3))) for row in range(1, 100)}


def test_pairs_of_several_cells_are_those_of_one_when_rows_meet_everywhere() -> None:
    table, config = noisy(200, 5), DedupConfig()
    whole = search_cell(table, config)
    assert merge_pairs(pa.concat_tables([whole, whole])).equals(merge_pairs(whole))
    assert merge_pairs(whole).height == whole.num_rows


def test_cells_are_the_nearest_centroids_whatever_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    sample = unit_rows(rng.normal(size=(900, 16)))
    centroids = train_cells(sample, 12, 17)
    assert np.array_equal(centroids, train_cells(sample, 12, 17))
    assert not np.array_equal(centroids, train_cells(sample, 12, 18))
    assert np.allclose(np.linalg.norm(centroids, axis=1), 1, atol=1e-5)
    expected = np.argsort(-(sample.astype(np.float64) @ centroids.T.astype(np.float64)), axis=1)[:, :3]
    assert np.array_equal(Cells(centroids, 3).nearest(sample), expected)
    monkeypatch.setattr(pair_search, "BASE_TILE", 7)
    assert np.array_equal(Cells(centroids, 3).nearest(sample), expected)
    monkeypatch.setattr(pair_search, "FLAT_CELLS", 1)  # the graph of large corpora
    assert (Cells(centroids, 3).nearest(sample) == expected).mean() > 0.99


def test_cells_grow_with_the_corpus_and_large_ones_are_cut_by_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    config = DedupConfig(exact_rows=100, cell_rows=40)
    assert [count_cells(rows, config) for rows in (0, 100, 101, 4000)] == [1, 1, 3, 100]
    monkeypatch.setattr(pair_search, "MAX_CELL_ROWS", 10)
    cell_keys = CellKeys(np.array([3, 25, 10]))
    assert (cell_keys.cuts.tolist(), cell_keys.total) == ([1, 3, 1], 5)
    hashes = np.random.default_rng(0).integers(0, 1 << 63, (90, 4)).astype(np.uint64)
    hashes[45:] = hashes[:45]
    cells = np.random.default_rng(1).integers(0, 3, (90, 2))
    cells[45:] = cells[:45]
    keys = cell_keys.of(cells, hashes)
    assert np.array_equal(keys[:45], keys[45:])
    assert [set(keys[cells == cell].tolist()) for cell in range(3)] == [{0}, {1, 2, 3}, {4}]


def test_sharp_pictures_meet_where_a_piece_of_the_hash_is_equal() -> None:
    rng = np.random.default_rng(3)
    hashes = rng.integers(0, 1 << 63, (60, 4)).astype(np.uint64)
    hashes[30:] = hashes[:30] ^ np.array([1, 0, 0, 0], np.uint64)  # the second of four pieces is the first to agree
    sharp = np.arange(60) != 40
    keys = band_keys(hashes, sharp, 100, 5000, 3)
    assert (keys[:30] == keys[30:])[sharp[30:]].tolist() == [[False, True, True]] * 29
    assert (keys[40] == -1).all()
    assert ((keys[sharp] - 100) // 5000 == [0, 1, 2]).all()
    assert band_keys(hashes, sharp, 100, 5000, 0).shape == (60, 0)


@settings(max_examples=60)
@given(seed=st.integers(0, 10**6), nodes=st.integers(1, 60), edges=st.integers(0, 90), chain=st.booleans())
def test_stars_spread_over_buckets_end_as_the_components(seed: int, nodes: int, edges: int, chain: bool) -> None:
    rng = np.random.default_rng(seed)
    left, right = rng.integers(0, nodes, edges), rng.integers(0, nodes, edges)
    if chain:  # the hard case: a path through all nodes, in random order
        order = rng.permutation(nodes)
        left, right = np.append(left, order[:-1]), np.append(right, order[1:])
    count, labels = connected_components(coo_matrix((np.ones(len(left)), (left, right)), shape=(nodes, nodes)))
    expected = {node: int(np.nonzero(labels == labels[node])[0][0]) for node in range(nodes)}
    assert len(set(expected.values())) == count
    names, smallest = connected(left, right)
    assert dict(zip(names.tolist(), smallest.tolist(), strict=True)) == {n: expected[n] for n in set(names.tolist())}
    parts = [contract(edge_frame(left[i::3], right[i::3])) for i in range(3)]

    def by_bucket(frames: list[Any], step: Any) -> list[Any]:
        import polars as pl

        together = pl.concat(frames)
        return [step(together.filter(pl.col("node") % 3 == bucket)) for bucket in range(3)]

    for _ in range(40):
        before = sum(map(edge_checksum, parts)) % 2**64
        parts = by_bucket([both_ways(part) for part in parts], large_star)
        parts = by_bucket([downwards(part) for part in parts], small_star)
        if sum(map(edge_checksum, parts)) % 2**64 == before:
            break
    else:
        pytest.fail("the stars never settle")
    tied = {node: other for part in parts for node, other in part.iter_rows()}
    assert tied == {n: expected[n] for n in set(names.tolist()) if expected[n] != n}


@settings(max_examples=60)
@given(sizes=st.lists(st.integers(0, 9), min_size=1, max_size=8), cuts=st.lists(st.integers(0, 40), max_size=5))
def test_spans_read_every_row_once_in_order(sizes: list[int], cuts: list[int]) -> None:
    total = sum(sizes)
    bounds = [0, *sorted(min(cut, total) for cut in cuts), total]
    files = [(f"f{n}", high - low) for n, (low, high) in enumerate(itertools.pairwise(bounds))]
    rows = {name: list(range(low, low + count)) for (name, count), low in zip(files, bounds, strict=False)}
    spans = running_spans(sizes, files)
    read = [[row for span in part for row in rows[span.uri][span.start : span.stop]] for part in spans]
    assert [len(part) for part in read] == sizes
    assert [row for part in read for row in part] == list(range(total))
    assert all(span.start < span.stop for part in spans for span in part)


def test_vectors_are_matched_by_id_and_the_missing_stay_null() -> None:
    rows = pa.table(
        {
            "image_id": ["b", "a", "c", "a", "b", "b"],
            "row": pa.array([5, 4, 6, None, None, None], pa.int64()),
            "vector": pa.array([None, None, None, b"A", b"C", b"B"], pa.binary(1)),
        }
    )
    assert match_vectors(rows).to_pylist() == [
        {"image_id": "a", "row": 4, "vector": b"A"},
        {"image_id": "b", "row": 5, "vector": b"B"},
        {"image_id": "c", "row": 6, "vector": None},
    ]
