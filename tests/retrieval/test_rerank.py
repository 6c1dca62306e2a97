"""Shortlist, re-rank, funnel and scan against numpy brute force and faiss's own two-stage index."""

import os

import faiss
import numpy as np
import pytest

from lookalike.errors import ArtifactError, UsageError
from lookalike.retrieval import native, shard_meta
from lookalike.retrieval.index_types import ShortlistOptions as Options
from lookalike.retrieval.plan import Plan
from lookalike.retrieval.ranking import Hits
from lookalike.retrieval.shard_meta import NORMS_FILE, SHARD_META, block_name, choose_blocks
from lookalike.retrieval.shard_searcher import ShardSearcher
from lookalike.retrieval.shortlist import build_shortlist, shortlist_name


def cosines(queries, vectors, dim):
    """Oracle: float64 cosine at a prefix, every prefix normalised after truncation."""
    q, x = queries[:, :dim].astype(np.float64), vectors[:, :dim].astype(np.float64)
    return (q @ x.T) / np.linalg.norm(q, axis=1)[:, None] / np.linalg.norm(x, axis=1)


def funnel_oracle(queries, vectors, k, plan):
    """Oracle: one query at a time, full cosines at every step, stable sort, rows too far below the k-th left out."""
    rows = []
    steps = [(plan.shortlist_dim, plan.shortlist_k), *plan.stages, (plan.rerank_dim, k)]
    margins = [*(plan.margins or [2.0] * (len(steps) - 1)), 2.0]
    for query in queries:
        alive = np.arange(len(vectors))
        for (dim, keep), margin in zip(steps, margins, strict=True):
            scores = cosines(query[None], vectors[alive], dim)[0]
            order = np.lexsort((alive, -scores))[: max(keep, k)]
            alive, scores = alive[order], scores[order]
            alive = alive[scores >= scores[k - 1] - margin]
        rows.append(alive[:k])
    return np.array(rows)


def test_exact_search_is_brute_force_cosine_at_every_nested_dim(make_shard, vectors, queries):
    shard = make_shard(vectors, offset=1000)
    for dim in shard.meta.dims:
        for batch in (queries, queries[:3]):  # a matrix product, and the kernel for few queries
            hits = shard.search(batch, 7, Plan.exact(dim))
            expected = np.sort(cosines(batch, vectors, dim), axis=1)[:, ::-1][:, :7]
            np.testing.assert_allclose(hits.scores, expected, atol=2e-6)
            np.testing.assert_array_equal(hits.rows - 1000, np.argsort(-cosines(batch, vectors, dim), axis=1)[:, :7])


@pytest.fixture(params=[1, 40, 128])
def block_bytes(request, monkeypatch):
    """Four, three and one blocks."""
    monkeypatch.setattr(shard_meta, "BLOCK_BYTES", request.param)


@pytest.mark.parametrize(
    "plan",
    [
        Plan(shortlist_dim=4, shortlist_k=50, rerank_dim=32),
        Plan(shortlist_dim=8, shortlist_k=40, rerank_dim=16),
        Plan(shortlist_dim=4, shortlist_k=80, stages=((8, 40), (16, 20)), rerank_dim=32),
        Plan(shortlist_dim=8, shortlist_k=60, stages=((16, 15),), rerank_dim=32, scan=True),
        Plan(shortlist_dim=8, shortlist_k=60, stages=((16, 30),), rerank_dim=32, margins=(0.3, 0.02)),
        Plan(shortlist_dim=4, shortlist_k=60, rerank_dim=32, margins=(0.0,)),
        Plan(shortlist_dim=32, shortlist_k=30, rerank_dim=32),
    ],
    ids=lambda plan: plan.describe(),
)
@pytest.mark.usefixtures("block_bytes")
def test_funnel_equals_the_one_shot_oracle(make_shard, vectors, queries, plan):
    hits = make_shard(vectors).search(queries, 10, plan)
    np.testing.assert_array_equal(hits.rows, funnel_oracle(queries, vectors, 10, plan))
    expected = np.take_along_axis(cosines(queries, vectors, plan.rerank_dim), hits.rows, axis=1)
    np.testing.assert_allclose(hits.scores, expected, atol=3e-6)


@pytest.mark.usefixtures("block_bytes")
@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
@pytest.mark.parametrize("margins", [(), (0.2, 0.05)])
def test_one_call_answers_as_its_stages_one_after_the_other_do(make_shard, vectors, queries, dtype, margins):
    """What a placement over several processes rests on, bit for bit."""
    shard = make_shard(vectors, kind="graph", dtype=dtype, offset=70)
    plan = Plan(shortlist_dim=8, shortlist_k=60, stages=((16, 25),), rerank_dim=32, margins=margins, ef_search=80)
    whole = shard.search(queries, 10, plan)
    apart = shard.rerank(queries, shard.shortlist(queries, 10, plan), 10, plan)
    np.testing.assert_array_equal(whole.rows, apart.rows)
    np.testing.assert_array_equal(whole.scores, apart.scores)
    alone = [shard.search(query, 10, plan) for query in queries]
    np.testing.assert_array_equal(whole.scores, np.vstack([hits.scores for hits in alone]))


@pytest.mark.parametrize(
    ("dims", "dtype", "ends"),
    [
        ((8, 16, 32, 64, 128, 256, 512, 1024, 2048), "float16", (64, 128, 2048)),
        ((8, 16, 32, 64, 128, 256, 512, 1024, 2048), "float32", (32, 64, 128, 2048)),
        ((8, 16, 32, 64, 128, 256, 512), "float16", (64, 512)),
        ((100, 700), "float32", (100, 700)),
        ((4, 8), "float16", (8,)),
        ((64,), "float16", (64,)),
    ],
)
def test_blocks_end_where_a_read_is_worth_its_place(dims, dtype, ends):
    assert choose_blocks(dims, dtype) == ends


def test_two_stage_equals_faiss_index_refine(make_shard, vectors, queries):
    d_s, k, shortlist_k = 8, 10, 50
    transform = faiss.IndexPreTransform(faiss.NormalizationTransform(d_s, 2.0), faiss.IndexFlatIP(d_s))
    base = faiss.IndexPreTransform(faiss.RemapDimensionsTransform(32, d_s, False), transform)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    refine = faiss.IndexRefine(base, faiss.IndexFlatIP(32))
    refine.add(unit)
    q = queries / np.linalg.norm(queries, axis=1, keepdims=True)
    scores, rows = refine.search(q, k, params=faiss.IndexRefineSearchParameters(k_factor=shortlist_k / k))
    hits = make_shard(vectors).search(queries, k, Plan(shortlist_dim=d_s, shortlist_k=shortlist_k, rerank_dim=32))
    np.testing.assert_array_equal(hits.rows, rows)
    np.testing.assert_allclose(hits.scores, scores, atol=3e-6)


def test_prefixes_are_normalised_after_truncation(make_shard):
    """REFERENCE finding: truncating unit vectors without renormalising ranks by length. Row 1 is long, row 0 right."""
    vectors = np.array([[0.1, 0.0, 3.0, 0.0], [2.0, 1.0, 0.0, 0.0]], np.float32)
    hits = make_shard(vectors, dims=(2, 4)).search(np.array([[1.0, 0, 0, 0]]), 2, Plan.exact(2))
    assert hits.rows.tolist() == [[0, 1]]


def test_equal_scores_come_in_the_order_of_rows(make_shard, queries):
    one = np.random.default_rng(0).standard_normal((1, 32)).astype(np.float32)
    shard = make_shard(np.repeat(one, 40, axis=0))
    for plan in (Plan.exact(32), Plan(shortlist_dim=8, shortlist_k=40, stages=((16, 20),), rerank_dim=32)):
        assert shard.search(queries[:2], 5, plan).rows.tolist() == [[0, 1, 2, 3, 4]] * 2


def test_searching_changes_nothing(make_shard, vectors, queries):
    """MRL's published funnel code re-ranked its neighbour array in place, and so spoiled later configurations."""
    shard = make_shard(vectors)
    plan = Plan(shortlist_dim=4, shortlist_k=50, stages=((8, 20),), rerank_dim=32)
    shortlist = shard.shortlist(queries, 10, plan)
    before, sent = Hits(shortlist.rows.copy(), shortlist.scores.copy()), queries.copy()
    first = shard.rerank(queries, shortlist, 10, plan)
    np.testing.assert_array_equal(shortlist.rows, before.rows)
    np.testing.assert_array_equal(shortlist.scores, before.scores)
    np.testing.assert_array_equal(queries, sent)
    np.testing.assert_array_equal(shard.rerank(queries, shortlist, 10, plan).rows, first.rows)
    np.testing.assert_array_equal(shard.search(queries, 10, plan).rows, first.rows)


@pytest.mark.parametrize("case", [("float16", 1e-3, 0.95), ("int8", 1e-2, 0.85)])
def test_coarser_stores_score_within_their_rounding(make_shard, vectors, queries, case):
    dtype, rounding, same = case
    plan = Plan(shortlist_dim=8, shortlist_k=60, rerank_dim=32)
    coarse = make_shard(vectors, dtype=dtype, name="coarse").search(queries, 5, plan)
    full = make_shard(vectors, name="full").search(queries, 5, plan)
    np.testing.assert_allclose(coarse.scores, full.scores, atol=rounding)
    assert (coarse.rows == full.rows).mean() > same


@pytest.mark.usefixtures("block_bytes")
@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_numpy_answers_as_the_library_does(make_shard, vectors, queries, dtype):
    shard = make_shard(vectors, dtype=dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "AVAILABLE", False)
        require_numpy_answers(shard, queries)


def require_numpy_answers(shard, queries):
    """A shard opened where there is no library answers as ``shard``, opened where it is."""
    plain = ShardSearcher.open(shard.store.folder)
    assert plain.store.native is None
    stored = plain.store.read(slice(None)).astype(np.float64)
    for plan in (Plan.exact(16), Plan(shortlist_dim=8, shortlist_k=40, stages=((16, 20),), rerank_dim=32)):
        one, other = shard.search(queries, 6, plan), plain.search(queries, 6, plan)
        np.testing.assert_array_equal(one.rows, other.rows)
        np.testing.assert_allclose(one.scores, other.scores, atol=2e-6)
        expected = np.take_along_axis(cosines(queries, stored, plan.rerank_dim), one.rows, axis=1)
        np.testing.assert_allclose(one.scores, expected, atol=3e-6)


def test_zero_vectors_score_zero_and_break_nothing(make_shard, vectors, queries):
    vectors[3] = 0
    vectors[4, :4] = 0  # has a direction, but not at the smallest prefix
    shard = make_shard(vectors)
    assert shard.meta.num_zero == 1
    hits = shard.search(queries, 300, Plan(shortlist_dim=4, shortlist_k=300, rerank_dim=32))
    assert np.isfinite(hits.scores).all()
    assert (hits.scores[hits.rows == 3] == 0).all()
    np.testing.assert_allclose(hits.scores[:, 0], shard.search(queries, 1, Plan.exact(32)).scores[:, 0], atol=2e-6)


def test_more_results_than_rows_are_padded(make_shard, vectors, queries):
    for count in (0, 3):
        shard = make_shard(vectors[:count], name=f"s{count}", offset=5)
        for plan in (Plan.exact(32), Plan(shortlist_dim=4, shortlist_k=10, rerank_dim=32)):
            hits = shard.search(queries, 6, plan)
            assert (hits.rows[:, count:] == -1).all()
            assert np.isneginf(hits.scores[:, count:]).all()
            assert (np.sort(hits.rows[:, :count], axis=1) == np.arange(5, 5 + count)).all()


@pytest.mark.parametrize(
    ("query", "message"),
    [(np.ones(31), "31"), (np.full(32, np.nan), "NaN"), (np.zeros(32), "zeros"), (np.full(32, np.inf), "infinity")],
)
def test_bad_queries_are_refused(make_shard, vectors, query, message):
    with pytest.raises(UsageError, match=message):
        make_shard(vectors).search(query, 3, Plan.exact(32))


def test_bad_plans_are_refused(make_shard, vectors, queries):
    shard = make_shard(vectors)
    with pytest.raises(UsageError, match=r"\[12\] are not nested dims.*\[4, 8, 16, 32\]"):
        shard.search(queries, 3, Plan(shortlist_dim=12, shortlist_k=9, rerank_dim=32))
    with pytest.raises(UsageError, match="at least 1"):
        shard.search(queries, 0, Plan.exact(32))
    for bad in ({"stages": ((8, 20), (4, 10))}, {"stages": ((16, 90),)}, {"rerank_dim": 2}, {"stages": ((16, 0),)}):
        with pytest.raises(ValueError, match="must"):
            Plan(**({"shortlist_dim": 4, "shortlist_k": 50, "rerank_dim": 32} | bad))
    for margins in ((0.1,), (0.1, 0.1, 0.1), (-0.1, 0.1), (np.nan, 0.1)):
        with pytest.raises(ValueError, match="margins"):
            Plan(shortlist_dim=4, shortlist_k=50, stages=((8, 20),), rerank_dim=32, margins=margins)
    with pytest.raises(ValueError, match="re-ranks"):
        Plan(shortlist_dim=32, rerank_dim=32, margins=(0.1,))
    with pytest.raises(UsageError, match="its own"):
        shard.rerank(queries, Hits(np.full((20, 1), 300), np.ones((20, 1))), 1, Plan.exact(32))


def remove(path):
    os.remove(path)


def truncate(size):
    return lambda path: os.truncate(path, size)


def replace(array):
    return lambda path: np.save(path, array)


def write_meta(path):
    with open(path, "w") as file:
        file.write('{"num_rows": 300}')


def index_other_rows(path):
    build_shortlist("flat", np.ones((10, 8), np.float32), Options()).save(path)


BLOCK, INDEX = block_name(0, 32), shortlist_name(8, "flat")


@pytest.mark.parametrize(
    ("name", "harm"),
    [
        (BLOCK, remove),
        (BLOCK, replace(np.zeros((299, 32), np.float32))),
        (BLOCK, replace(np.zeros((300, 32)))),
        (NORMS_FILE, truncate(1000)),
        (SHARD_META, write_meta),
        (SHARD_META, remove),
        (INDEX, truncate(2000)),
        (INDEX, index_other_rows),
    ],
)
def test_a_damaged_shard_is_refused_when_opened(make_shard, vectors, name, harm):
    folder = make_shard(vectors).store.folder
    harm(f"{folder}/{name}")
    with pytest.raises(ArtifactError, match=r"build the index again|restore"):
        ShardSearcher.open(folder).load()
