"""The planner on an index in memory: measured recall, margins, counted work, times."""

import faiss
import numpy as np
import pytest

from lookalike.intervals import mean_interval
from lookalike.retrieval import candidates, choice, planner
from lookalike.retrieval.plan import Plan
from lookalike.retrieval.ranking import Hits
from lookalike.retrieval.vectors import normalise
from tests.synthetic import make_vectors

TWO = Plan(shortlist_dim=4, shortlist_k=50, rerank_dim=32)
FUNNEL = Plan(shortlist_dim=8, shortlist_k=60, stages=((16, 40),), rerank_dim=32)


def sample_of(searcher, queries, *, k=10):
    return planner.take_sample(searcher, queries, k, own_rows=np.full(len(queries), -1))


def test_recall_has_the_interval_of_a_mean_and_the_exact_answer_is_exact(graph):
    queries, _ = make_vectors(100, 32, num_classes=60, seed=3)
    sample = sample_of(graph, queries)
    exact, two = planner.measure(sample, [FUNNEL])
    recall = planner.per_query_recall(graph.search(queries, 10, FUNNEL), sample.exact, same_dim=True)
    assert (two.recall_low, two.recall_high) == mean_interval(recall)
    assert (exact.recall_low, exact.recall_high) == (1, 1)


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
    sample, holdout = sample_of(graph, queries[:400]), sample_of(graph, queries[400:])
    plans = candidates.list_plans(graph.meta, k=10, shortlist_ks=[20, 60, 120], efs=[None])
    measured = planner.measure(sample, plans)
    early = planner.measure_early_exit(sample, measured, 0.95, "mean")
    assert early
    for plan in (row.plan for row in early):
        assert len(plan.margins) == 1 + len(plan.stages)
        plain = planner.measure(holdout, [plan.model_copy(update={"margins": ()}), plan])[1:]
        assert plain[0].recall - plain[1].recall <= 0.01 * len(plan.margins)
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


def test_the_model_counts_the_rows_of_the_lists_and_the_prefixes_of_coded_types(make_shard, index_of):
    data, _ = make_vectors(3030, 32, num_classes=100, seed=4)
    queries = data[3000:]
    plan = Plan(shortlist_dim=16, shortlist_k=20, rerank_dim=32, nprobe=4)
    cost = {}
    for kind in ("ivf", "ivf-rabitq", "binary", "binary-signs"):
        shard = make_shard(data[:3000], kind=kind, name=kind)
        plans = [plan, plan.model_copy(update={"nprobe": 9})]
        _, few, many = planner.measure(sample_of(index_of(shard), queries), plans)
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
        rows = np.mean([sum(lists.invlists.list_size(int(number)) for number in line) for line in nearest])
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
    assert all(row.query_us > 0 and row.batch_us > 0 and row.p99_us > 0 for row in timed)
    assert timed[1].exact_ratio == pytest.approx(timed[0].query_us / timed[1].query_us)


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
