"""The planner on an index in memory: candidates, margins, measured recall, cost, limits, choice."""

import os

import faiss
import numpy as np
import pytest

from lookalike.errors import ArtifactError, UsageError
from lookalike.retrieval import candidates, choice, costs, planner
from lookalike.retrieval.choice import MeasuredPlan, PlanLimits
from lookalike.retrieval.index_meta import EncoderRef, IndexMeta
from lookalike.retrieval.plan import Plan
from lookalike.retrieval.ranking import Hits
from lookalike.retrieval.searcher import Searcher
from lookalike.retrieval.shortlist import Work, shortlist_name
from lookalike.retrieval.synthetic import make_vectors
from lookalike.retrieval.vectors import normalise

DIMS = (4, 8, 16, 32)


@pytest.fixture
def searcher(make_shard):
    data, _ = make_vectors(3000, 32, num_classes=100, seed=4)
    shards = [
        make_shard(data[start:stop], kind="hnsw", offset=start, name=str(start))
        for start, stop in ((0, 1600), (1600, 3000))
    ]
    meta = IndexMeta(
        dims=DIMS,
        num_rows=3000,
        shards=("a", "b"),
        shard_rows=(1600, 1400),
        dtype="float32",
        shortlist="hnsw",
        shortlist_dims=DIMS,
        columns=("image_id",),
        encoder=EncoderRef(fingerprint="m"),
    )
    return Searcher(meta, shards)


@pytest.fixture(scope="module")
def graph(open_shard, tmp_path_factory):
    """One shard of 2,000 vectors with int8 graphs over 8-d and the full 32-d."""
    data, _ = make_vectors(2000, 32, num_classes=60, seed=9)
    shard = open_shard(tmp_path_factory.mktemp("graph"), data, kind="graph", shortlists=(8, 32))
    meta = IndexMeta(
        dims=DIMS,
        num_rows=2000,
        shards=("a",),
        shard_rows=(2000,),
        dtype="float32",
        shortlist="graph",
        shortlist_dims=(8, 32),
        columns=("image_id",),
        encoder=EncoderRef(fingerprint="m"),
    )
    return Searcher(meta, [shard])


def sample_of(searcher, queries, *, k=10, seed=1):
    return planner.take_sample(searcher, queries, k, own_rows=np.full(len(queries), -1), seed=seed)


def candidate(plan, recall, cost, low=None, **more):
    return MeasuredPlan(
        plan=plan,
        recall=recall,
        recall_low=recall if low is None else low,
        recall_high=1,
        model_us=cost,
        mflops=1,
        mflops_done=1,
        **more,
    )


TWO = Plan(shortlist_dim=4, shortlist_k=50, rerank_dim=32)
GOOD = [
    candidate(Plan.exact(32), 1, 9),
    candidate(TWO, 0.995, 5, low=0.98),
    candidate(TWO, 0.999, 7, low=0.992),
    candidate(TWO, 0.999, 7, low=0.992),
    candidate(TWO, 0.9, 1),
]


def test_the_cheapest_good_plan_is_first_and_the_exact_one_always_there():
    ranked = choice.rank_good(GOOD, 0.99, decide_by="lower", rank_by="model", exact=True)
    assert ranked == [2, 3, 0]
    assert choice.rank_good(GOOD, 0.99, decide_by="mean", rank_by="model", exact=True) == [1, 2, 3, 0]
    assert choice.rank_good(GOOD[:2], 0.999, decide_by="mean", rank_by="model", exact=False) == [0]
    cheap_exact = [GOOD[0].model_copy(update={"model_us": 0.1}), *GOOD[1:]]
    assert choice.rank_good(cheap_exact, 0.99, decide_by="lower", rank_by="model", exact=True)[0] == 0
    assert choice.rank_good(cheap_exact, 0.99, decide_by="lower", rank_by="model", exact=False) == [2, 3, 0]


def test_candidates_beyond_a_limit_are_marked_and_never_chosen():
    limits = PlanLimits(max_p99_ms=2, max_ram_mb=100)
    rows = [
        candidate(Plan.exact(32), 1, 9, p99_us=9000),
        candidate(TWO, 0.999, 3, p99_us=1999, ram_mb=101),
        candidate(TWO, 0.999, 4, p99_us=2000, ram_mb=100),
        candidate(TWO, 0.5, 1, p99_us=3000, ram_mb=300),
    ]
    marked = limits.mark(rows)
    assert [one.breaks for one in marked] == [
        ("p99 9 ms > 2 ms",),
        ("RAM 101 MB > 100 MB",),
        (),
        ("p99 3 ms > 2 ms", "RAM 300 MB > 100 MB"),
    ]
    settings = {"decide_by": "mean", "rank_by": "model", "exact": True}
    assert choice.rank_good(marked, 0.99, **settings) == [2]
    assert choice.rank_good([marked[0], marked[3]], 0.99, **settings) == []
    assert choice.rank_good(PlanLimits().mark(rows), 0.99, **settings) == [1, 2, 0]


def test_the_nearest_candidate_is_named_with_what_it_breaks_and_what_helps():
    limits, wide = PlanLimits(max_p99_ms=2, max_ram_mb=100), TWO.model_copy(update={"shortlist_k": 77})
    rows = [
        candidate(Plan.exact(32), 1, 9, p99_us=9000),
        candidate(TWO, 0.999, 3, ram_mb=130),
        candidate(wide, 0.9, 3, p99_us=2100),
    ]
    place, why = choice.nearest_miss(rows, 0.99, limits, decide_by="mean")
    assert place == 2
    assert "77 rows" in why
    assert "p99 2.1 ms, limit 2 ms" in why
    assert "recall 0.9000 (mean), target 0.99" in why
    assert "larger shortlist_ks" in why
    place, why = choice.nearest_miss(rows[:2], 0.99, limits, decide_by="mean")
    assert (place, "RAM 130 MB, limit 100 MB" in why, "ivf-rabitq" in why, "recall" in why) == (1, True, True, False)


def test_one_stage_is_held_against_several():
    one = Plan(shortlist_dim=32, shortlist_k=20, rerank_dim=32)
    rows = [candidate(Plan.exact(32), 1, 9), candidate(TWO, 1, 6), candidate(one, 1, 4), candidate(TWO, 1, 5)]
    facts = choice.compare_stages(rows, [2, 3, 1, 0], "model")
    assert facts == {"one_stage": 2, "several_stages": 3, "several_to_one": 1.25}
    assert choice.compare_stages(rows, [2, 0], "model") == {
        "one_stage": 2,
        "several_stages": None,
        "several_to_one": None,
    }


def test_the_pareto_front_is_what_nothing_beats():
    front = choice.pareto_front(GOOD, "model")
    assert front == [4, 1, 2, 0]
    for place, one in enumerate(GOOD):
        beaten = any(other.model_us <= one.model_us and other.recall > one.recall for other in GOOD)
        assert not (place in front and beaten)


PAPER_DIMS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048)
IN_1K, IN_4K = 1_281_167, 4_202_000


def paper_meta(*shard_rows):
    names = tuple(f"s{number}" for number in range(len(shard_rows)))
    return IndexMeta(
        dims=PAPER_DIMS,
        num_rows=sum(shard_rows),
        shards=names,
        shard_rows=shard_rows,
        dtype="float32",
        shortlist="flat",
        shortlist_dims=PAPER_DIMS,
        columns=(),
        encoder=EncoderRef(fingerprint="m"),
    )


@pytest.mark.parametrize(
    ("rows", "dim", "dims", "sizes", "mflops"),
    [
        (IN_1K, 8, (2048,), (200,), 10.66),
        (IN_1K, 16, (2048,), (200,), 20.91),
        (IN_1K, 64, (2048,), (200,), 82.40),
        (IN_4K, 8, (2048,), (200,), 34.03),
        (IN_4K, 64, (2048,), (200,), 269.34),
        (IN_1K, 8, (16, 32, 64, 128, 2048), (800, 400, 200, 50, 10), 10.31),
        (IN_1K, 16, (32, 64, 128, 256, 2048), (200, 100, 50, 25, 10), 20.54),
        (IN_1K, 32, (64, 128, 256, 512, 2048), (200, 100, 50, 25, 10), 41.07),
        (IN_4K, 32, (64, 128, 256, 512, 2048), (800, 400, 200, 50, 10), 134.66),
        (IN_4K, 64, (128, 256, 512, 1024, 2048), (800, 400, 200, 50, 10), 269.31),
    ],
)
def test_mflops_are_those_the_mrl_paper_prints(rows, dim, dims, sizes, mflops):
    """Adaptive and funnel retrieval on ImageNet-1K and 4K, to the digit: ``sizes`` rows are read at ``dims``."""
    plan = Plan(
        shortlist_dim=dim,
        shortlist_k=sizes[0],
        stages=tuple(zip(dims[:-1], sizes[1:], strict=True)),
        rerank_dim=dims[-1],
    )
    assert costs.paper_mflops(paper_meta(rows), plan) == pytest.approx(mflops, abs=0.005)


def test_mflops_of_the_paper_add_up_over_shards_and_count_no_rows_that_are_not_there():
    plan = Plan(shortlist_dim=8, shortlist_k=200, stages=((64, 100),), rerank_dim=2048)
    small = (150 * 8 + 150 * 64 + 100 * 2048) / 1e6
    large = (1000 * 8 + 200 * 64 + 100 * 2048) / 1e6
    assert costs.paper_mflops(paper_meta(150, 1000), plan) == pytest.approx(small + large)
    assert costs.paper_mflops(paper_meta(150, 1000), Plan.exact(256)) == pytest.approx(1150 * 256 / 1e6)


def test_the_bootstrap_interval_is_the_normal_one_where_queries_are_many():
    recall = np.random.default_rng(2).choice([0.6, 0.8, 0.9, 1.0], 400, p=[0.1, 0.2, 0.3, 0.4])
    half = 1.96 * recall.std() / np.sqrt(400)
    low, high = planner.bootstrap_interval(recall, 5)
    assert (recall.mean() - low, high - recall.mean()) == pytest.approx((half, half), rel=0.12)
    assert planner.bootstrap_interval(recall, 5) == (low, high)
    assert planner.bootstrap_interval(recall, 6) != (low, high)


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
        (None, 4, False),
        (None, 16, False),
        (None, None, True),
    }
    plain = searcher.meta.model_copy(update={"shortlist": "binary"})
    efforts = candidates.list_plans(plain, **settings)
    assert {(plan.ef_search, plan.nprobe) for plan in efforts} == {(None, None)}
    only_two = {"single_stage": False, "funnels": False}
    no_single = candidates.list_plans(searcher.meta, k=10, shortlist_ks=[50], efs=[None], **only_two)
    assert {(plan.shortlist_dim, plan.stages) for plan in no_single} == {(4, ()), (8, ()), (16, ())}


def test_funnels_are_none_one_stage_at_a_quarter_and_halving():
    dims = (8, 16, 32, 64, 128, 256, 512, 1024, 2048)
    assert candidates.list_funnels(dims, 128, 60, 10) == [(), ((512, 25),), ((256, 30),)]
    assert candidates.list_funnels(dims, 64, 200, 10) == [(), ((512, 25),), ((128, 100), (256, 50), (512, 25))]
    assert candidates.list_funnels(dims, 1024, 200, 10) == [()]
    assert candidates.list_funnels((64, 512), 64, 200, 10) == [()]
    assert candidates.list_funnels((64, 128, 512), 64, 50, 10) == [(), ((128, 25),)]
    assert candidates.list_funnels((64, 128, 512), 64, 25, 10) == [()]


def test_sizes_between_a_good_one_and_the_next_smaller_are_tried():
    tried = [Plan(shortlist_dim=4, shortlist_k=size, rerank_dim=32) for size in (10, 50, 70)]
    tried.append(Plan(shortlist_dim=8, shortlist_k=65, rerank_dim=32))
    plan = Plan(shortlist_dim=4, shortlist_k=70, stages=((8, 60),), rerank_dim=32)
    found = candidates.list_between(plan, tried, 10)
    assert [(one.shortlist_k, one.stages) for one in found] == [(55, ((8, 55),)), (60, ((8, 60),)), (65, ((8, 60),))]
    assert candidates.list_between(tried[0], tried, 10) == []
    assert [one.shortlist_k for one in candidates.list_between(tried[3], tried, 63)] == [64]


FUNNEL = Plan(shortlist_dim=8, shortlist_k=60, stages=((16, 40),), rerank_dim=32)


def cosines(searcher, queries, rows, dim):
    stored = searcher.vectors(np.arange(searcher.meta.num_rows)).astype(np.float64)[:, :dim]
    own = queries[:, :dim].astype(np.float64)
    whole = own @ stored.T / np.linalg.norm(own, axis=1)[:, None] / np.linalg.norm(stored, axis=1)
    return np.take_along_axis(whole, rows, axis=1)


def test_margins_are_quantiles_of_how_far_neighbours_lie_below_the_kth_best(graph):
    queries, _ = make_vectors(50, 32, num_classes=60, seed=3)
    exact = graph.search(queries, 10).rows
    (plan,) = candidates.calibrate_margins(graph, queries, exact, 10, FUNNEL, quantiles=(0.9,))
    assert plan.model_copy(update={"margins": ()}) == FUNNEL
    rows = graph.shards[0].shortlist(queries, 10, FUNNEL).rows
    for dim, keep, margin in ((8, 60, plan.margins[0]), (16, 40, plan.margins[1])):
        scores = cosines(graph, queries, rows, dim)
        order = np.argsort(-scores, axis=1)[:, :keep]
        rows, scores = np.take_along_axis(rows, order, axis=1), np.take_along_axis(scores, order, axis=1)
        gaps = np.sort(
            [
                max(0, line[9] - score)
                for line, places, truth in zip(scores, rows, exact, strict=True)
                for score, row in zip(line, places, strict=True)
                if row in truth
            ]
        )
        level = 0.9 + (0.9 * 0.1 / len(gaps)) ** 0.5
        assert (gaps <= margin + 1e-6).mean() >= level
        assert (gaps <= margin - 1.1e-4).mean() < level
        assert 0 < margin < gaps[-1]
    wider = candidates.calibrate_margins(graph, queries, exact, 10, FUNNEL, quantiles=(0.999, 0.5))
    assert wider[0].margins > plan.margins > wider[1].margins
    single = Plan(shortlist_dim=32, shortlist_k=20, rerank_dim=32)
    assert candidates.calibrate_margins(graph, queries, exact, 10, single) == []


def test_rows_that_margins_leave_are_counted_and_cost_less(graph):
    queries, _ = make_vectors(50, 32, num_classes=60, seed=3)
    early = FUNNEL.model_copy(update={"margins": (0.1, 0.05)})
    rows = graph.shards[0].shortlist(queries, 10, FUNNEL).rows
    scores = np.sort(cosines(graph, queries, rows, 8), axis=1)[:, ::-1]
    expected = (scores >= scores[:, 9:10] - 0.1).sum(axis=1).mean()
    ((first, second),) = candidates.count_left(graph, queries, 10, early)
    assert first == pytest.approx(expected, abs=0.05)
    assert 10 <= second <= min(first, 40)
    _, plain, short = planner.measure(sample_of(graph, queries), [FUNNEL, early])
    walked = plain.mflops_done - (60 * 8 + 60 * 8 + 40 * 16) / 1e6  # prefixes, step to 16, step to 32
    assert short.mflops_done == pytest.approx(walked + (60 * 8 + first * 8 + second * 16) / 1e6)
    assert short.model_us < plain.model_us


def test_early_exit_twins_of_the_cheapest_good_plans_keep_recall_on_other_queries(graph):
    queries, _ = make_vectors(800, 32, num_classes=60, seed=3)
    sample, holdout = sample_of(graph, queries[:400]), sample_of(graph, queries[400:], seed=2)
    plans = candidates.list_plans(graph.meta, k=10, shortlist_ks=[20, 60, 120], efs=[None])
    measured = planner.measure(sample, plans)
    early = planner.measure_early_exit(sample, measured, 0.95, "mean")
    assert early
    for one in early:
        assert len(one.plan.margins) == 1 + len(one.plan.stages)
        plain = planner.measure(holdout, [one.plan.model_copy(update={"margins": ()}), one.plan])[1:]
        assert plain[0].recall - plain[1].recall <= 0.01 * len(one.plan.margins)
    assert planner.measure_early_exit(sample, measured, 0.95, "mean") == early
    assert planner.measure_early_exit(sample, measured, 1.0, "lower") == []


def test_where_one_stage_is_the_cheapest_it_is_chosen(graph):
    """2,000 short vectors: nothing that a second stage could save is worth the price of a step."""
    queries, _ = make_vectors(100, 32, num_classes=60, seed=3)
    plans = candidates.list_plans(graph.meta, k=10, shortlist_ks=[10, 20, 100, 300], efs=[None, 64])
    measured = planner.measure(sample_of(graph, queries), plans)
    ranked = choice.rank_good(measured, 0.95, decide_by="lower", rank_by="model", exact=True)
    facts = choice.compare_stages(measured, ranked, "model")
    assert measured[ranked[0]].plan.is_single_stage
    assert facts["one_stage"] == ranked[0]
    assert facts["several_to_one"] > 1


def test_memory_is_the_shortlist_of_the_dim_and_the_norms_that_the_plan_uses(graph, searcher):
    folder = graph.shards[0].store.folder
    plan = Plan(shortlist_dim=8, shortlist_k=20, rerank_dim=32)
    memory = costs.plan_memory(graph, plan, 10)
    file = os.path.getsize(f"{folder}/{shortlist_name(8, 'graph')}")
    assert memory.ram == memory.shard_ram == pytest.approx((file + 2 * 4 * 2000 + 2000 / 8) / 1e6)
    assert memory.mapped == pytest.approx(2000 * 32 * 4 / 1e6)
    exact = costs.plan_memory(graph, Plan.exact(32), 10)
    assert exact.ram == pytest.approx(4 * 2000 / 1e6)
    assert exact.mapped == pytest.approx(2000 * (32 + 3) * 4 / 1e6)
    two = costs.plan_memory(searcher, plan, 10)
    files = [os.path.getsize(f"{shard.store.folder}/{shortlist_name(8, 'hnsw')}") for shard in searcher.shards]
    assert two.ram == pytest.approx((sum(files) + 2 * 4 * 3000 + 3000 / 8) / 1e6)
    assert two.shard_ram == pytest.approx((files[0] + 2 * 4 * 1600 + 1600 / 8) / 1e6)


def test_a_query_is_counted_step_by_step(graph):
    queries, blocks = make_vectors(5, 32, num_classes=60, seed=3)[0], graph.shards[0].meta.block_borders
    assert blocks == [(0, 32)]
    counts, kind = costs.count_query(graph, queries, FUNNEL, k=10, work=Work(2500, 0))
    assert kind == "graph"
    assert counts == costs.Counts(
        calls=1,
        rows=500,
        row_numbers=4000,
        beam=60,
        steps=3,
        places=60 + 60 + 40,
        numbers=60 * 8 + 60 * 8 + 40 * 16,
        ordered=60 + 40,
    )
    scan = FUNNEL.model_copy(update={"scan": True})
    counts, kind = costs.count_query(graph, queries, scan, k=10, work=Work(0, 0))
    assert (kind, counts.rows, counts.steps, counts.numbers) == ("flat", 2000, 2, 60 * 8 + 40 * 16)
    assert 0 < counts.row_numbers <= 2000 * 8


def test_measured_recall_is_overlap_with_brute_force_and_the_same_each_time(searcher):
    queries, _ = make_vectors(60, 32, num_classes=100, seed=8)
    plans = [Plan(shortlist_dim=dim, shortlist_k=k, rerank_dim=32) for dim, k in ((4, 20), (16, 300))]
    exact, few, many = planner.measure(sample_of(searcher, queries), plans)
    stored = searcher.vectors(np.arange(3000)).astype(np.float64)
    truth = np.argsort(-(queries @ stored.T), axis=1)[:, :10]
    found = searcher.search(queries, 10, plans[0]).rows
    overlap = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(truth, found, strict=True)])
    assert few.recall == pytest.approx(overlap, abs=1e-6)
    assert exact.recall == exact.recall_low == 1
    assert few.recall < many.recall
    assert few.recall_low < few.recall < few.recall_high
    assert few.mflops_done < many.mflops_done
    assert planner.measure(sample_of(searcher, queries), plans)[1:] == [few, many]


def test_the_model_counts_the_rows_of_the_lists_and_the_prefixes_of_coded_types(make_shard):
    data, _ = make_vectors(3030, 32, num_classes=100, seed=4)
    queries = data[3000:]
    plan = Plan(shortlist_dim=16, shortlist_k=20, rerank_dim=32, nprobe=4)
    cost = {}
    for kind in ("ivf", "ivf-rabitq", "binary", "binary-signs"):
        shard = make_shard(data[:3000], kind=kind, name=kind)
        meta = IndexMeta(
            dims=DIMS,
            num_rows=3000,
            shards=("a",),
            shard_rows=(3000,),
            dtype="float32",
            shortlist=kind,
            shortlist_dims=DIMS,
            columns=("image_id",),
            encoder=EncoderRef(fingerprint="m"),
        )
        plans = [plan, plan.model_copy(update={"nprobe": 9})]
        _, few, many = planner.measure(sample_of(Searcher(meta, [shard]), queries), plans)
        cost[kind] = few
        index = shard.index_over(16)
        if kind.startswith("binary"):
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
    assert cost["binary-signs"].model_us == cost["binary"].model_us


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
    measured = planner.measure(sample_of(searcher, queries, k=5), [TWO])
    timed = planner.time_plans(searcher, queries, 5, measured, repeats=2)
    assert timed[0].exact_ratio == 1
    assert all(one.query_us > 0 and one.batch_us > 0 for one in timed)
    assert timed[1].exact_ratio == pytest.approx(timed[0].query_us / timed[1].query_us)
    assert all(one.p99_us > 0 for one in timed)


def test_times_are_the_least_of_the_repeats_and_the_tail_is_over_queries(searcher, monkeypatch):
    queries = searcher.vectors(np.arange(100))
    measured = planner.measure(sample_of(searcher, queries[:4], k=5), [TWO])
    turn = {"number": -1}

    def seconds(_, asked, k, plan):
        if len(asked) > 1:
            turn["number"] += not plan.is_exact
            return 1.0
        slow = 2.0 if turn["number"] == 1 else 1.0  # one repeat of three on a busy machine
        return slow * (1e-3 if np.array_equal(asked[0], queries[7]) else 1e-4)

    monkeypatch.setattr(planner, "_seconds", seconds)
    timed = planner.time_plans(searcher, queries, 5, measured, repeats=3)
    assert timed[1].query_us == pytest.approx((99 * 100 + 1000) / 100)
    assert timed[1].p99_us == pytest.approx(1000)
    twice = planner.time_plans(searcher, np.repeat(queries, 2, axis=0)[:-1], 5, measured, repeats=3)
    assert twice[1].p99_us == pytest.approx(1000)


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
