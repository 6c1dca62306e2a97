"""The C library against numpy: both of its builds, float32 and float16, ties, zeros, filters, few rows."""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lookalike.retrieval import native
from lookalike.retrieval.native import NativeStore, pack_steps
from lookalike.retrieval.ranking import NO_ROW, Floats, Hits
from lookalike.retrieval.vectors import quantise
from tests.synthetic import make_vectors

pytestmark = pytest.mark.skipif(not native.AVAILABLE, reason="the package was installed without a C compiler")
DIMS = (3, 8, 21, 64, 150)  # widths below, at and above what a register holds


@pytest.fixture(params=["this processor", "any processor"])
def build(request: pytest.FixtureRequest) -> Iterator[str]:
    native.use_portable(request.param == "any processor")
    yield request.param
    native.use_portable(False)


def make_store(vectors: Floats, dtype: str) -> tuple[NativeStore, Floats]:
    """A store, and what it holds as float64."""
    parts = [np.ascontiguousarray(vectors[:, a:b]) for a, b in pairwise((0, *DIMS))]
    if dtype == "int8":
        blocks, scales = zip(*(quantise(part) for part in parts), strict=True)
        held = np.hstack([codes * by[:, None].astype(np.float64) for codes, by in zip(blocks, scales, strict=True)])
    else:
        blocks, scales = [part.astype(dtype) for part in parts], ()
        held = np.hstack(blocks).astype(np.float64)
    norms = np.stack([np.linalg.norm(held[:, :dim], axis=1) for dim in DIMS]).astype(np.float32)
    return NativeStore(blocks, norms, dtype, scales), held


def cosines(queries: Floats, held: Floats, dim: int) -> Floats:
    """float64 [m, n] at ``dim``; 0 where a prefix has no length."""
    one, other = queries[:, :dim].astype(np.float64), held[:, :dim]
    lengths = np.linalg.norm(one, axis=1)[:, None] * np.linalg.norm(other, axis=1)
    return np.divide(one @ other.T, lengths, out=np.zeros((len(one), len(other))), where=lengths > 0)


def require_best(hits: Hits, expected: Floats, allowed: np.ndarray | None = None) -> None:
    """Every line holds the best of ``expected`` [m, n] among ``allowed`` rows, in order, equal scores by row."""
    k = hits.rows.shape[1]
    for rows, scores, wanted in zip(hits.rows, hits.scores, expected, strict=True):
        found = rows[rows != NO_ROW]
        pool = np.arange(len(wanted)) if allowed is None else np.flatnonzero(allowed)
        assert len(found) == min(k, len(pool)) == len(set(found.tolist()))
        assert set(found.tolist()) <= set(pool.tolist())
        assert (rows[len(found) :] == NO_ROW).all()
        assert np.isneginf(scores[len(found) :]).all()
        best = np.sort(wanted[pool])[::-1][: len(found)]
        np.testing.assert_allclose(scores[: len(found)], best, atol=3e-6)
        np.testing.assert_allclose(scores[: len(found)], wanted[found], atol=3e-6)
        assert all(a > b or r < s for (a, r), (b, s) in pairwise(zip(scores[: len(found)], found, strict=True)))


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
@pytest.mark.parametrize("num_blocks", [1, 3, 5])
def test_a_scan_finds_what_brute_force_finds(build: str, dtype: str, num_blocks: int) -> None:
    vectors, _ = make_vectors(2000, DIMS[-1], num_classes=20)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors[100:140] = vectors[5]  # ties
    vectors[7] = 0
    vectors[8, :20] = 0  # prefixes without length
    store, held = make_store(vectors, dtype)
    queries = np.vstack([vectors[:20] + 0.01, vectors[1500:1510]]).astype(np.float32)
    expected = cosines(queries, held, DIMS[num_blocks - 1])
    for allowed in (None, np.random.default_rng(1).random(2000) < 0.03, np.zeros(2000, bool)):
        bits = None if allowed is None else native.pack_rows(allowed)
        hits, read = store.scan(queries, num_blocks, 60, bits)
        require_best(hits, expected, allowed)
        assert read <= len(queries) * 2000 * DIMS[num_blocks - 1]
    _, few = store.scan(queries, 5, 1)
    assert few < 0.6 * len(queries) * 2000 * DIMS[-1]  # bounds leave most of it unread


@settings(max_examples=30)
@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 1 << 30), st.booleans())
def test_a_scan_of_coarse_numbers_breaks_ties_by_row(num: int, k: int, seed: int, half: bool) -> None:
    generator = np.random.default_rng(seed)
    vectors = generator.integers(-1, 2, (num, DIMS[-1])).astype(np.float32)
    vectors[generator.integers(0, num, num // 2)] = vectors[0]
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1)
    store, held = make_store(vectors, "float16" if half else "float32")
    queries = generator.normal(size=(3, DIMS[-1])).astype(np.float32)
    require_best(store.scan(queries, 5, k)[0], cosines(queries, held, DIMS[-1]))


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
@pytest.mark.parametrize("start", [0, 2])
def test_a_funnel_keeps_what_one_shot_scores_keep(build: str, dtype: str, start: int) -> None:
    vectors, _ = make_vectors(900, DIMS[-1], num_classes=20)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors[30:60] = vectors[3]
    store, held = make_store(vectors, dtype)
    queries, steps = vectors[:25].copy(), [(3, 200, np.inf), (4, 25, np.inf), (5, 12, np.inf)]
    generator = np.random.default_rng(2)
    rows = np.stack([generator.choice(900, 300, replace=False) for _ in queries])
    rows[:, 250:] = NO_ROW
    rows[0, 5:] = NO_ROW
    given = cosines(queries, held, DIMS[start - 1]) if start else np.zeros((25, 900))
    candidates = Hits(rows, np.take_along_axis(given, np.maximum(rows, 0), 1).astype(np.float32))
    hits = store.rerank(queries, candidates, start, pack_steps(steps), 12)
    for line, (found, scores) in enumerate(zip(hits.rows, hits.scores, strict=True)):
        left = rows[line][rows[line] != NO_ROW]
        for stop, keep, _ in steps:
            own = cosines(queries[line : line + 1], held, DIMS[stop - 1])[0]
            left = left[np.lexsort((left, -own[left].round(6)))][:keep]
        assert (found != NO_ROW).sum() == min(12, len(left))
        np.testing.assert_allclose(scores[: len(left)], own[left], atol=4e-6)
        np.testing.assert_allclose(own[found[: len(left)]], own[left], atol=4e-6)


def test_a_wide_funnel_sorts_as_a_narrow_one(build: str) -> None:
    vectors, _ = make_vectors(900, DIMS[-1], num_classes=20)
    store, held = make_store(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), "float32")
    queries = vectors[:4].copy()
    rows = np.tile(np.arange(900), (4, 1))
    hits = store.rerank(queries, Hits(rows, np.zeros(rows.shape, np.float32)), 0, pack_steps([(5, 900, np.inf)]), 900)
    require_best(hits, cosines(queries, held, DIMS[-1]))


@pytest.mark.parametrize("value", [0.0, 1.0, -2.5, 6.1e-5, 5.9e-8, 3.1e-6, 65504.0, 1 / 3])
def test_halves_are_read_right(build: str, value: float) -> None:
    half = np.float16(value)
    block = np.full((1, 3), half)
    store = NativeStore([block], np.ones((1, 1), np.float32), "float16")
    scores = store.scan(np.array([[1, 0, 0]], np.float32), 1, 1)[0].scores
    assert scores[0, 0] == np.float32(half)
