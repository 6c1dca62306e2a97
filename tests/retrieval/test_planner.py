"""The planner on an index in memory: candidates, measured recall, cost, choice."""

import faiss
import numpy as np
import pytest

from lookalike.errors import ArtifactError, UsageError
from lookalike.retrieval import candidates, costs, planner
from lookalike.retrieval.plan import Plan
from lookalike.retrieval.planner import Measured
from lookalike.retrieval.ranking import Hits
from lookalike.retrieval.searcher import EncoderRef, IndexMeta, Searcher
from lookalike.retrieval.store import normalise
from lookalike.retrieval.synthetic import make_vectors

DIMS = (4, 8, 16, 32)


@pytest.fixture
def searcher(make_shard):
    data, _ = make_vectors(3000, 32, num_classes=100, seed=4)
    shards = [make_shard(data[start:stop], kind="hnsw", offset=start, name=str(start))
              for start, stop in ((0, 1600), (1600, 3000))]  # fmt: skip
    meta = IndexMeta(dims=DIMS, num_rows=3000, shards=("a", "b"), shard_rows=(1600, 1400), dtype="float32",
                     shortlist="hnsw", shortlist_dims=DIMS, columns=("image_id",),
                     encoder=EncoderRef(fingerprint="m"))  # fmt: skip
    return Searcher(meta, shards)


def candidate(plan, recall, cost, low=None):
    return Measured(plan=plan, recall=recall, recall_low=recall if low is None else low, recall_high=1, model_us=cost,
                    mflops=1, mflops_done=1)  # fmt: skip


TWO = Plan(shortlist_dim=4, shortlist_k=50, rerank_dim=32)
GOOD = [candidate(Plan.exact(32), 1, 9), candidate(TWO, 0.995, 5, low=0.98), candidate(TWO, 0.999, 7, low=0.992),
        candidate(TWO, 0.999, 7, low=0.992), candidate(TWO, 0.9, 1)]  # fmt: skip


def test_the_cheapest_good_plan_is_first_and_the_exact_one_always_there():
    ranked = planner.rank_good(GOOD, 0.99, decide_by="lower", rank_by="model", exact=True)
    assert ranked == [2, 3, 0]
    assert planner.rank_good(GOOD, 0.99, decide_by="mean", rank_by="model", exact=True) == [1, 2, 3, 0]
    assert planner.rank_good(GOOD[:2], 0.999, decide_by="mean", rank_by="model", exact=False) == [0]
    cheap_exact = [GOOD[0].model_copy(update={"model_us": 0.1}), *GOOD[1:]]
    assert planner.rank_good(cheap_exact, 0.99, decide_by="lower", rank_by="model", exact=True)[0] == 0
    assert planner.rank_good(cheap_exact, 0.99, decide_by="lower", rank_by="model", exact=False) == [2, 3, 0]


def test_the_pareto_front_is_what_nothing_beats():
    front = planner.pareto_front(GOOD, "model")
    assert front == [4, 1, 2, 0]
    for place, one in enumerate(GOOD):
        beaten = any(other.model_us <= one.model_us and other.recall > one.recall for other in GOOD)
        assert not (place in front and beaten)


def test_mflops_are_those_the_mrl_paper_prints():
    """1K: D_s 16, K 200, D_r 2048 -> 20.91; funnel 8 -> 16..2048 with 800, 400, 200, 50, 10 -> 10.31."""
    dims = (8, 16, 32, 64, 128, 2048)
    meta = IndexMeta(dims=dims, num_rows=1_281_167, shards=("a",), shard_rows=(1_281_167,), dtype="float32",
                     shortlist="flat", shortlist_dims=dims, columns=(),
                     encoder=EncoderRef(fingerprint="m"))  # fmt: skip
    plan = Plan(shortlist_dim=16, shortlist_k=200, rerank_dim=2048)
    assert costs.paper_mflops(meta, plan) == pytest.approx(20.91, abs=0.005)
    stages = ((16, 400), (32, 200), (64, 50), (128, 10))
    funnel = Plan(shortlist_dim=8, shortlist_k=800, stages=stages, rerank_dim=2048)
    assert costs.paper_mflops(meta, funnel) == pytest.approx(10.31, abs=0.02)


def test_candidates_differ_fit_the_shards_and_leave_enough_rows(searcher):
    sizes = [5, 50, 10_000]
    plans = candidates.list_plans(searcher.meta, k=10, shortlist_ks=sizes, efs=[None, 64, 2000], scan_dims=[8, 32])
    assert len({plan.model_dump_json() for plan in plans}) == len(plans)
    assert {plan.shortlist_k for plan in plans} == {10, 50, 1600}
    for plan in plans:
        plan.require_dims(DIMS)
        assert all(keep >= 20 for _, keep in plan.stages)
        assert plan.ef_search is None or plan.ef_search > plan.shortlist_k
    assert any(plan.scan and plan.shortlist_dim == 8 for plan in plans)
    assert any(plan.shortlist_dim == 32 for plan in plans)
    lists = searcher.meta.model_copy(update={"shortlist": "ivf-rabitq"})
    settings = {"k": 10, "shortlist_ks": [50], "efs": [64], "nprobes": (4, 16), "funnels": False}
    probing = candidates.list_plans(lists, scan_dims=[8], **settings)
    assert {(plan.ef_search, plan.nprobe, plan.scan) for plan in probing} == {
        (None, 4, False), (None, 16, False), (None, None, True)}  # fmt: skip
    plain = searcher.meta.model_copy(update={"shortlist": "binary"})
    efforts = candidates.list_plans(plain, **settings)
    assert {(plan.ef_search, plan.nprobe) for plan in efforts} == {(None, None)}
    only_two = {"single_stage": False, "funnels": False}
    no_single = candidates.list_plans(searcher.meta, k=10, shortlist_ks=[50], efs=[None], **only_two)
    assert {(plan.shortlist_dim, plan.stages) for plan in no_single} == {(4, ()), (8, ()), (16, ())}


def test_measured_recall_is_overlap_with_brute_force_and_the_same_each_time(searcher):
    queries, _ = make_vectors(60, 32, num_classes=100, seed=8)
    plans = [Plan(shortlist_dim=dim, shortlist_k=k, rerank_dim=32) for dim, k in ((4, 20), (16, 300))]
    nobody = np.full(60, -1)
    exact, few, many = planner.measure(searcher, queries, 10, plans, own_rows=nobody, seed=1)
    stored = searcher.vectors(np.arange(3000)).astype(np.float64)
    truth = np.argsort(-(queries @ stored.T), axis=1)[:, :10]
    found = searcher.search(queries, 10, plans[0]).rows
    overlap = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(truth, found, strict=True)])
    assert few.recall == pytest.approx(overlap, abs=1e-6)
    assert exact.recall == exact.recall_low == 1
    assert few.recall < many.recall
    assert few.recall_low < few.recall < few.recall_high
    assert few.mflops_done < many.mflops_done
    assert planner.measure(searcher, queries, 10, plans, own_rows=nobody, seed=1)[1:] == [few, many]


def test_the_model_counts_the_rows_of_the_lists_and_the_prefixes_of_coded_types(make_shard):
    data, _ = make_vectors(3030, 32, num_classes=100, seed=4)
    queries, nobody = data[3000:], np.full(30, -1)
    plan = Plan(shortlist_dim=16, shortlist_k=20, rerank_dim=32, nprobe=4)
    cost = {}
    for kind in ("ivf", "ivf-rabitq", "binary"):
        shard = make_shard(data[:3000], kind=kind, name=kind)
        meta = IndexMeta(dims=DIMS, num_rows=3000, shards=("a",), shard_rows=(3000,), dtype="float32", shortlist=kind,
                         shortlist_dims=DIMS, columns=("image_id",), encoder=EncoderRef(fingerprint="m"))  # fmt: skip
        plans = [plan, plan.model_copy(update={"nprobe": 9})]
        _, few, many = planner.measure(Searcher(meta, [shard]), queries, 10, plans, own_rows=nobody, seed=1)
        cost[kind] = few
        index = shard.index_over(16)
        if kind == "binary":
            assert few.mflops_done == pytest.approx((3000 * 16 + 20 * 16 + 20 * 16) / 1e6)
            assert few.model_us == many.model_us
            continue
        assert few.model_us < many.model_us
        lists = index.index if kind == "ivf" else faiss.extract_index_ivf(index.index)
        unit = normalise(np.ascontiguousarray(queries[:, :16]))
        turned = unit if kind == "ivf" else faiss.downcast_VectorTransform(index.index.chain.at(0)).apply(unit)
        _, nearest = lists.quantizer.search(turned, 4)
        rows = np.mean([sum(lists.invlists.list_size(int(one)) for one in line) for line in nearest])
        again = 20 * 16 * (kind == "ivf-rabitq")
        assert few.mflops_done == pytest.approx(((rows + lists.nlist) * 16 + again + 20 * 16) / 1e6)
    assert cost["binary"].mflops_done > cost["ivf"].mflops_done


def test_a_query_that_is_indexed_does_not_find_itself(searcher):
    own = np.array([3, -1, 2999])
    queries = searcher.vectors(np.array([3, 10, 2999]))
    hits = planner.search_without(searcher, queries, 5, Plan.exact(32), own)
    everything = searcher.search(queries, 6)
    assert hits.rows[0].tolist() == everything.rows[0, 1:].tolist()
    assert hits.rows[1].tolist() == everything.rows[1, :5].tolist()
    assert 2999 not in hits.rows[2]
    assert hits.rows.shape == (3, 5)


def test_rows_as_good_as_the_kth_count_as_found():
    exact = Hits(np.array([[1, 2]]), np.array([[0.9, 0.8]], np.float32))
    twin = Hits(np.array([[1, 7]]), np.array([[0.9, 0.8]], np.float32))
    worse = Hits(np.array([[1, 7]]), np.array([[0.9, 0.7]], np.float32))
    assert planner.per_query_recall(twin, exact, same_dim=True).tolist() == [1]
    assert planner.per_query_recall(worse, exact, same_dim=True).tolist() == [0.5]
    assert planner.per_query_recall(twin, exact, same_dim=False).tolist() == [0.5]


def test_times_are_measured_for_every_candidate(searcher):
    queries = searcher.vectors(np.arange(4))
    measured = planner.measure(searcher, queries, 5, [TWO], own_rows=np.full(4, -1), seed=0)
    timed = planner.time_plans(searcher, queries, 5, measured, repeats=2)
    assert timed[0].exact_ratio == 1
    assert all(one.query_us > 0 and one.batch_us > 0 for one in timed)
    assert timed[1].exact_ratio == pytest.approx(timed[0].query_us / timed[1].query_us)


def test_rows_lead_to_ids_metadata_and_vectors_and_back(searcher):
    rows = np.array([0, 1600, 2999, 5, -1])
    assert searcher.ids(rows) == ["id-000000", "id-000000", "id-001399", "id-000005", ""]
    assert searcher.metadata(rows)[3:] == [{"image_id": "id-000005"}, {}]
    np.testing.assert_array_equal(searcher.vectors([1600])[0], searcher.shards[1].store.read(np.array([0]))[0])
    assert [shard.find("id-000007") for shard in searcher.shards] == [7, 1607]
    assert [shard.find(name) for shard in searcher.shards for name in ("", "id-00000", "zz")] == [-1] * 6
    for wrong in (3000, -2):
        with pytest.raises(UsageError, match="outside"):
            searcher.ids([wrong])
    with pytest.raises(UsageError, match="no vector"):
        searcher.vectors([-1])


def test_shards_that_are_not_those_of_the_index_are_refused(searcher):
    with pytest.raises(ArtifactError, match="build the index again"):
        Searcher(searcher.meta, searcher.shards[::-1])
