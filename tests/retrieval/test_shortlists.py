"""Every shortlist type: answers against numpy brute force over its own candidates, and faiss's own two-stage index."""

from itertools import count

import faiss
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lookalike.errors import UsageError
from lookalike.retrieval.index_types import MIN_TRAINED, SHORTLISTS, ShortlistOptions, choose_nlist, effort_of
from lookalike.retrieval.plan import Plan
from lookalike.retrieval.ranking import NO_ROW
from lookalike.retrieval.shortlist import build_shortlist, load_shortlist
from lookalike.retrieval.vectors import normalise
from lookalike.train.losses.classes import binarize
from tests.synthetic import make_vectors

KINDS = ("flat", "hnsw", "graph", "hnsw-sq8", "ivf", "ivf-pq", "ivf-rabitq", "binary", "binary-signs")
CODED = {"graph", "hnsw-sq8", "ivf-pq", "ivf-rabitq", "binary", "binary-signs"}
NUM = 3000
NUMBERS = count()
DATA, _ = make_vectors(NUM + 40, 32, num_classes=60, seed=2)
STORED, QUERIES = DATA[:NUM], DATA[NUM:]
PLANS = [
    Plan(shortlist_dim=16, shortlist_k=80, rerank_dim=32),
    Plan(shortlist_dim=8, shortlist_k=120, stages=((16, 60),), rerank_dim=32, nprobe=30, ef_search=150),
    Plan(shortlist_dim=32, shortlist_k=60, rerank_dim=32),
    Plan(shortlist_dim=16, shortlist_k=50, rerank_dim=16, nprobe=8),
]


def cosines(queries, vectors, dim):
    """Oracle: float64, every prefix normalised after truncation; 0 where there is no direction."""
    q, x = queries[:, :dim].astype(np.float64), vectors[:, :dim].astype(np.float64)
    lengths = np.linalg.norm(q, axis=1)[:, None] * np.linalg.norm(x, axis=1)
    return np.divide(q @ x.T, lengths, out=np.zeros_like(lengths), where=lengths > 0)


def rank(rows, scores, k):
    """The best ``k`` of ``rows``: score falling, then row rising."""
    return rows[np.lexsort((rows, -scores))][:k]


def test_the_types_are_those_that_are_documented():
    assert set(SHORTLISTS) == set(KINDS)
    assert {kind for kind in KINDS if effort_of(kind) == "nprobe"} == {"ivf", "ivf-pq", "ivf-rabitq"}
    assert {kind for kind in KINDS if effort_of(kind) == "ef_search"} == {"hnsw", "hnsw-sq8", "graph"}


@pytest.mark.parametrize("kind", KINDS)
def test_every_plan_ranks_the_candidates_of_its_type_as_brute_force_does(make_shard, kind):
    shard = make_shard(STORED, kind=kind)
    assert {shard.index_over(dim).is_exact for dim in shard.meta.dims} == {kind not in CODED}
    for plan in PLANS:
        hits = shard.search(QUERIES, 10, plan)
        candidates = shard.shortlist(QUERIES, 10, plan)
        true = cosines(QUERIES, STORED, plan.rerank_dim)
        at_shortlist = cosines(QUERIES, STORED, plan.shortlist_dim)
        for n, row in enumerate(candidates.rows):
            alive = row[row != NO_ROW]
            assert len(set(alive)) == len(alive)
            np.testing.assert_allclose(candidates.scores[n][row != NO_ROW], at_shortlist[n, alive], atol=3e-6)
            for dim, keep in (*plan.stages, (plan.rerank_dim, 10)):
                alive = rank(alive, cosines(QUERIES[n : n + 1], STORED[alive], dim)[0], keep)
            np.testing.assert_array_equal(hits.rows[n], alive)
            np.testing.assert_allclose(hits.scores[n], true[n, alive], atol=3e-6)


@pytest.mark.parametrize(
    ("kind", "least"),
    [
        ("flat", 1.0),
        ("hnsw", 0.99),
        ("graph", 0.98),
        ("hnsw-sq8", 0.97),
        ("ivf", 0.97),
        ("ivf-pq", 0.95),
        ("ivf-rabitq", 0.9),
        ("binary", 0.5),
        ("binary-signs", 0.5),  # 16 bits
    ],
)
def test_every_type_finds_most_of_what_a_flat_one_finds(make_shard, kind, least):
    plan = Plan(shortlist_dim=16, shortlist_k=100, rerank_dim=32)
    hits = make_shard(STORED, kind=kind).search(QUERIES, 10, plan)
    candidates = np.argsort(-cosines(QUERIES, STORED, 16), axis=1)[:, :100]
    full = cosines(QUERIES, STORED, 32)
    best = [rank(rows, full[n, rows], 10) for n, rows in enumerate(candidates)]
    assert np.mean([len(set(a) & set(b)) / 10 for a, b in zip(hits.rows, best, strict=True)]) >= least


def test_sign_codes_are_those_that_the_binary_task_trains():
    """By the Hamming distance of ``x > 0``; ``binary`` compares the bits of a rotation, another order."""
    unit, queries = (normalise(np.ascontiguousarray(rows[:, :16])) for rows in (STORED, QUERIES))
    codes = [binarize(torch.from_numpy(rows)).numpy() for rows in (queries, unit)]
    differing = (16 - codes[0] @ codes[1].T) / 2
    nearest = np.sort(differing, axis=1)[:, :50]
    own, rotated = (
        build_shortlist(kind, unit, ShortlistOptions()).search(queries, 50).rows for kind in ("binary-signs", "binary")
    )
    np.testing.assert_array_equal(np.take_along_axis(differing, own, axis=1), nearest)
    assert (np.take_along_axis(differing, rotated, axis=1) > nearest).any()


def test_exact_zeros_are_no_ones_in_a_sign_code(tmp_path):
    """Features behind a ReLU: half of them are zero, none is negative. The oracle is numpy's packing of ``x > 0``."""
    rng = np.random.default_rng(8)
    stored = np.maximum(rng.normal(size=(400, 32)), 0).astype(np.float32)
    queries = stored[:50] * (1 + 0.2 * rng.random((50, 32), np.float32))
    stored[7] = -0.0
    unit, asked = normalise(stored), normalise(queries)
    built = build_shortlist("binary-signs", unit, ShortlistOptions())
    built.save(str(tmp_path / "index"))
    loaded = load_shortlist("binary-signs", str(tmp_path / "index"), num_rows=400, dim=32)
    codes = [np.packbits(rows > 0, axis=1, bitorder="little") for rows in (asked, unit)]
    np.testing.assert_array_equal(faiss.vector_to_array(loaded.index.codes).reshape(400, -1), codes[1])
    differing = np.unpackbits(codes[0][:, None] ^ codes[1], axis=2).sum(axis=2)
    for index in (built, loaded):
        found = index.search(asked, 10)
        np.testing.assert_array_equal(np.take_along_axis(differing, found.rows, axis=1), np.sort(differing)[:, :10])
        assert (found.rows[:, 0] == np.arange(50)).mean() > 0.95


def test_signs_of_vectors_without_zeros_are_those_of_indexes_made_before():
    """faiss alone packs ``x >= 0``: the same bits, so such a stored index keeps its answers."""
    unit = normalise(STORED)
    before = faiss.IndexLSH(32, 32, False, False)
    before.add(unit)
    now = build_shortlist("binary-signs", unit, ShortlistOptions()).index
    np.testing.assert_array_equal(*(faiss.vector_to_array(index.codes) for index in (before, now)))


def test_ivf_pq_codes_prefixes_and_not_residuals(make_shard):
    assert not make_shard(STORED, kind="ivf-pq").index_over(16).index.by_residual


@pytest.mark.parametrize("kind", ["ivf", "ivf-rabitq", "hnsw-sq8"])
def test_two_stages_equal_faiss_index_refine_over_the_same_index(make_shard, kind):
    """faiss.IndexRefine over the shard's own index of a truncated prefix, the full vectors flat behind it."""
    shard = make_shard(STORED, kind=kind)
    inner, effort = shard.index_over(16).index, 12
    own = faiss.extract_index_ivf(inner) if kind.startswith("ivf") else inner
    if kind.startswith("ivf"):
        own.nprobe = effort
    else:
        own.hnsw.efSearch = 60
    cut = faiss.RemapDimensionsTransform(32, 16, False)
    base = faiss.IndexPreTransform(cut, faiss.IndexPreTransform(faiss.NormalizationTransform(16, 2.0), inner))
    unit = normalise(STORED)
    full = faiss.IndexFlatIP(32)
    full.add(unit)
    base.ntotal = base.index.ntotal = NUM
    refine = faiss.IndexRefine(base, full)
    refine.ntotal = NUM
    scores, rows = refine.search(normalise(QUERIES), 10, params=faiss.IndexRefineSearchParameters(k_factor=6))
    hits = shard.search(QUERIES, 10, Plan(shortlist_dim=16, shortlist_k=60, rerank_dim=32, nprobe=effort))
    assert (hits.rows == rows).mean() > 0.995  # a tie at the edge of a shortlist may fall either way
    np.testing.assert_allclose(hits.scores, scores, atol=1e-3)


@pytest.mark.parametrize("kind", ["ivf", "ivf-pq"])
def test_lists_can_be_made_by_fewer_dimensions_than_rows_are_compared_by(tmp_path, kind):
    """AdANNS: the lists a query looks into are those whose centroids are nearest at the coarse dim."""
    unit, queries = normalise(STORED[:, :24].copy()), normalise(QUERIES[:, :24].copy())
    built = build_shortlist(kind, unit, ShortlistOptions(coarse_dim=8))
    built.save(str(tmp_path / "index"))
    loaded = load_shortlist(kind, str(tmp_path / "index"), num_rows=NUM, dim=24)
    hits = loaded.search(queries, NUM, nprobe=3)
    np.testing.assert_array_equal(built.search(queries, NUM, nprobe=3).rows, hits.rows)
    index = loaded.index
    centroids = index.quantizer.reconstruct_n(0, index.nlist)
    assert not centroids[:, 8:].any()
    coarse = normalise(STORED[:, :8].copy()) @ centroids[:, :8].T
    own, near = coarse.argmax(axis=1), np.argsort(-(queries[:, :8] @ centroids[:, :8].T), axis=1)[:, :3]
    for found, lists in zip(hits.rows, near, strict=True):
        assert set(own[found[found != NO_ROW]]) <= set(lists)
        if kind == "ivf":
            assert set(found[found != NO_ROW]) == set(np.flatnonzero(np.isin(own, lists)))
    assert build_shortlist(kind, unit, ShortlistOptions(coarse_dim=24)).nlist == index.nlist


@pytest.mark.parametrize("kind", KINDS)
def test_builds_are_the_same_bytes_and_come_back_from_disk(tmp_path, kind):
    unit = normalise(np.ascontiguousarray(STORED[:, :16]))
    for name in "ab":
        build_shortlist(kind, unit.copy(), ShortlistOptions()).save(str(tmp_path / name))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    loaded = load_shortlist(kind, str(tmp_path / "a"), num_rows=NUM, dim=16)
    fresh = build_shortlist(kind, unit, ShortlistOptions())
    asked = normalise(np.ascontiguousarray(QUERIES[:, :16]))
    np.testing.assert_array_equal(loaded.search(asked, 20).rows, fresh.search(asked, 20).rows)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_answers_like_its_queries_alone(make_shard, kind):
    shard = make_shard(STORED, kind=kind)
    for plan in PLANS[:2]:
        batch = shard.search(QUERIES, 10, plan)
        np.testing.assert_array_equal(batch.rows, np.vstack([shard.search(one, 10, plan).rows for one in QUERIES]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num", [0, 1, 38, MIN_TRAINED - 1, MIN_TRAINED])
def test_small_shards_work_without_a_word_from_faiss(make_shard, capfd, kind, num):
    shard = make_shard(STORED[:num], kind=kind, offset=7)
    hits = shard.search(QUERIES[:3], 50, Plan(shortlist_dim=8, shortlist_k=60, rerank_dim=32, nprobe=1000))
    assert (hits.rows[:, num:] == NO_ROW).all()
    found = hits.rows[:, : min(num, 50)]
    assert ((found >= 7) & (found < 7 + num)).all()
    assert capfd.readouterr() == ("", "")


def test_lists_grow_with_the_root_of_the_rows_and_leave_k_means_enough():
    assert [choose_nlist(n, ShortlistOptions()) for n in (0, 1, 39, 10_000, 1_000_000)] == [1, 1, 1, 200, 2000]
    assert choose_nlist(10_000, ShortlistOptions(nlist=100)) == 100
    assert choose_nlist(10_000, ShortlistOptions(nlist=5000)) == 256
    index = build_shortlist("ivf-rabitq", normalise(STORED), ShortlistOptions(nlist=50))
    assert index.nlist == 50
    assert build_shortlist("hnsw", normalise(STORED[:50]), ShortlistOptions()).nlist == 0


def test_looking_into_more_lists_finds_more_and_all_lists_find_all(make_shard):
    shard = make_shard(STORED, kind="ivf")
    truth = shard.search(QUERIES, 10, Plan(shortlist_dim=16, shortlist_k=100, rerank_dim=32, scan=True)).rows
    found = []
    for nprobe in (1, 4, 10_000):
        rows = shard.search(QUERIES, 10, Plan(shortlist_dim=16, shortlist_k=100, rerank_dim=32, nprobe=nprobe)).rows
        found.append((rows == truth).mean())
    assert found[0] < found[1] < found[2]
    assert found[2] == 1


@pytest.mark.parametrize("kind", KINDS)
def test_not_a_number_is_refused_with_its_row(kind):
    for bad in (np.nan, np.inf, -np.inf):
        broken = normalise(STORED[:200])
        broken[17, 3] = bad
        with pytest.raises(UsageError, match="row 17"):
            build_shortlist(kind, broken, ShortlistOptions())


def test_codes_of_a_prefix_that_does_not_divide_share_fewer_dimensions():
    unit = normalise(np.ascontiguousarray(STORED[:, :9]))
    index = build_shortlist("ivf-pq", unit, ShortlistOptions(pq_dims=4))
    assert index.index.pq.M == 3
    assert build_shortlist("ivf-pq", unit[:, :1].copy(), ShortlistOptions(pq_dims=4)).index.ntotal == NUM


@given(
    kind=st.sampled_from(KINDS),
    data=st.tuples(st.integers(1, 60), st.integers(0, 400), st.integers(0, 9)),
    sizes=st.tuples(st.integers(1, 40), st.integers(1, 1500)),
)
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_duplicates_zeros_and_ties_come_in_order_with_true_cosines(make_shard, kind, data, sizes):
    """Shards of few distinct vectors and many zeros: whatever survives, the order and the scores are those of numpy."""
    (distinct, zeros, seed), (k, kept) = data, sizes
    generator = np.random.default_rng(seed)
    stored = generator.standard_normal((distinct, 8)).astype(np.float32)[generator.integers(0, distinct, 1200)]
    stored[generator.permutation(1200)[:zeros]] = 0
    shard = make_shard(stored, dims=(4, 8), kind=kind, name=f"shard-{next(NUMBERS)}")
    queries = generator.standard_normal((3, 8)).astype(np.float32)
    hits = shard.search(queries, k, Plan(shortlist_dim=4, shortlist_k=kept, rerank_dim=8))
    true = cosines(queries, stored, 8)
    for n, row in enumerate(hits.rows):
        alive = row[row != NO_ROW]
        assert len(set(alive)) == len(alive) > 0
        np.testing.assert_allclose(hits.scores[n][: len(alive)], true[n, alive], atol=3e-6)
        order = np.lexsort((alive, -hits.scores[n][: len(alive)]))
        np.testing.assert_array_equal(order, np.arange(len(alive)))
        assert (row[len(alive) :] == NO_ROW).all()
