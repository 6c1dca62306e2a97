"""The int8 graph against brute force: recall, unreachable rows, filters, files, and life without the C library."""

from pathlib import Path

import numpy as np
import pytest

from lookalike.errors import ArtifactError
from lookalike.retrieval import graph, native
from lookalike.retrieval.filters import Allowed
from lookalike.retrieval.graph import Graph, build_graph
from lookalike.retrieval.kernels import faiss_threads
from lookalike.retrieval.ranking import NO_ROW, Floats
from lookalike.retrieval.vectors import quantise
from tests.synthetic import make_vectors

ROWS, DIM = 4000, 48


def unit(vectors: Floats) -> Floats:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def vectors() -> Floats:
    made, _ = make_vectors(ROWS + 50, DIM, num_classes=40)
    return unit(made)


@pytest.fixture(scope="module")
def built(vectors: Floats) -> Graph:
    return build(vectors[:ROWS])


def build(vectors: Floats) -> Graph:
    with faiss_threads(1):
        return build_graph(np.ascontiguousarray(vectors), hnsw_m=16, ef_construction=80)


def recall(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.mean([len(set(one) & set(other)) / len(other) for one, other in zip(found, expected, strict=True)]))


def test_codes_are_as_near_as_eight_bits_allow(vectors: Floats) -> None:
    codes, scales = quantise(vectors)
    assert codes.min() >= -127
    assert np.abs(codes * scales[:, None] - vectors).max() <= scales.max() / 2 + 1e-7
    codes, scales = quantise(np.zeros((2, 4), np.float32))
    assert not codes.any()
    assert not scales.any()


def test_neighbours_are_those_of_brute_force(built: Graph, vectors: Floats) -> None:
    queries = vectors[ROWS:]
    expected = np.argsort(-(queries @ vectors[:ROWS].T), axis=1)[:, :10]
    hits = built.search(queries, 40, ef_search=100)
    assert recall(hits.rows, expected) > 0.98
    cosines = np.take_along_axis(queries @ vectors[:ROWS].T, hits.rows, axis=1)
    np.testing.assert_allclose(hits.scores, cosines, atol=0.02)
    assert (np.diff(hits.scores, axis=1) <= 0).all()


def test_every_row_can_be_found_where_many_are_the_same(vectors: Floats) -> None:
    rows = vectors[:1500].copy()
    rows[:600] = rows[0]
    rows[700:900] = rows[701]
    made = build(rows)
    assert made.entries.max() < 1500
    hits = made.search(rows, 1500)
    assert all(set(line) == set(range(1500)) for line in hits.rows.tolist()[::100])


def test_without_the_library_codes_are_scanned(built: Graph, vectors: Floats, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "AVAILABLE", False)
    plain = Graph(built.codes, built.scales, built.links, built.entries)
    queries = vectors[ROWS:]
    expected = plain.search(queries, 20)
    products = (quantise(queries)[0].astype(np.int64) @ built.codes.T.astype(np.int64)) * built.scales
    np.testing.assert_array_equal(expected.rows, np.argsort(-products, axis=1, kind="stable")[:, :20])
    again = build(vectors[:ROWS])
    np.testing.assert_array_equal(again.entries, built.entries)
    np.testing.assert_array_equal(again.links, built.links)


@pytest.mark.skipif(not native.AVAILABLE, reason="the package was installed without a C compiler")
@pytest.mark.parametrize("portable", [False, True])
def test_a_search_of_all_rows_is_a_scan(
    built: Graph, vectors: Floats, portable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    native.use_portable(portable)
    walked = built.search(vectors[ROWS:], 30, ef_search=ROWS)
    native.use_portable(False)
    monkeypatch.setattr(native, "AVAILABLE", False)
    scanned = Graph(built.codes, built.scales, built.links, built.entries).search(vectors[ROWS:], 30)
    np.testing.assert_array_equal(walked.rows, scanned.rows)
    np.testing.assert_allclose(walked.scores, scanned.scores, rtol=1e-6)


@pytest.mark.parametrize("library", [True, False])
def test_a_filter_lets_through_what_it_allows(
    built: Graph, vectors: Floats, library: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "AVAILABLE", library and native.AVAILABLE)
    searched = Graph(built.codes, built.scales, built.links, built.entries)
    allowed = np.random.default_rng(0).random(ROWS) < 0.1
    queries = vectors[ROWS:]
    hits = searched.search(queries, 20, ef_search=40, allowed=Allowed(allowed))
    assert allowed[hits.rows].all()
    own = np.flatnonzero(allowed)
    expected = own[np.argsort(-(queries @ vectors[own].T), axis=1)[:, :10]]
    assert recall(hits.rows, expected) > 0.97
    nothing = searched.search(queries, 20, allowed=Allowed(np.zeros(ROWS, bool)))
    assert (nothing.rows == NO_ROW).all()


def test_files_come_back_and_damage_is_named(built: Graph, vectors: Floats, tmp_path: Path) -> None:
    path = str(tmp_path / "shortlist-00048.graph")
    built.save(path)
    loaded = Graph.load(path, num_rows=ROWS, dim=DIM)
    for name in graph.ARRAYS:
        np.testing.assert_array_equal(getattr(loaded, name), getattr(built, name))
        assert getattr(loaded, name).ctypes.data % graph.ALIGNED == 0
    np.testing.assert_array_equal(
        loaded.search(vectors, 5, ef_search=30).rows, built.search(vectors, 5, ef_search=30).rows
    )
    with pytest.raises(ArtifactError, match="build the index again"):
        Graph.load(path, num_rows=ROWS + 1, dim=DIM)
    content = Path(path).read_bytes()
    for damaged in (content[:-70_000], content[:100], b"", b"x" * len(content)):
        Path(path).write_bytes(damaged)
        with pytest.raises(ArtifactError, match=r"graph is damaged"):
            Graph.load(path, num_rows=ROWS, dim=DIM)
    Graph(built.codes, built.scales, np.where(built.links == 3, ROWS, built.links), built.entries).save(path)
    with pytest.raises(ArtifactError, match=r"has links to rows that do not exist"):
        Graph.load(path, num_rows=ROWS, dim=DIM)
    Path(path).unlink()
    with pytest.raises(ArtifactError, match=r"graph is missing"):
        Graph.load(path, num_rows=ROWS, dim=DIM)


@pytest.mark.parametrize("num", [0, 1, 2, 40])
def test_few_rows(num: int, vectors: Floats, tmp_path: Path) -> None:
    made = build(vectors[:num])
    made.save(str(tmp_path / "few"))
    hits = Graph.load(str(tmp_path / "few"), num_rows=num, dim=DIM).search(vectors[:3], 5, ef_search=9)
    expected = np.argsort(-vectors[:3] @ vectors[:num].T, axis=1)[:, :5]
    assert hits.rows.shape == (3, min(num, 5)) if num else (hits.rows == NO_ROW).all()
    for found, wanted in zip(hits.rows.tolist(), expected.tolist(), strict=True):
        assert set(found) - {NO_ROW} == set(wanted)
