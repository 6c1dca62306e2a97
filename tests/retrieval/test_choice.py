"""The choice among measured plans: the cheapest good one, limits, the nearest miss, the Pareto front."""

from lookalike.retrieval.choice import MeasuredPlan, PlanLimits, compare_stages, nearest_miss, pareto_front, rank_good
from lookalike.retrieval.plan import Plan


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
    ranked = rank_good(GOOD, 0.99, decide_by="lower", rank_by="model", exact=True)
    assert ranked == [2, 3, 0]
    assert rank_good(GOOD, 0.99, decide_by="mean", rank_by="model", exact=True) == [1, 2, 3, 0]
    assert rank_good(GOOD[:2], 0.999, decide_by="mean", rank_by="model", exact=False) == [0]
    cheap_exact = [GOOD[0].model_copy(update={"model_us": 0.1}), *GOOD[1:]]
    assert rank_good(cheap_exact, 0.99, decide_by="lower", rank_by="model", exact=True)[0] == 0
    assert rank_good(cheap_exact, 0.99, decide_by="lower", rank_by="model", exact=False) == [2, 3, 0]


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
    assert rank_good(marked, 0.99, **settings) == [2]
    assert rank_good([marked[0], marked[3]], 0.99, **settings) == []
    assert rank_good(PlanLimits().mark(rows), 0.99, **settings) == [1, 2, 0]


def test_the_nearest_candidate_is_named_with_what_it_breaks_and_what_helps():
    limits, wide = PlanLimits(max_p99_ms=2, max_ram_mb=100), TWO.model_copy(update={"shortlist_k": 77})
    rows = [
        candidate(Plan.exact(32), 1, 9, p99_us=9000),
        candidate(TWO, 0.999, 3, ram_mb=130),
        candidate(wide, 0.9, 3, p99_us=2100),
    ]
    place, why = nearest_miss(rows, 0.99, limits, decide_by="mean")
    assert place == 2
    assert "77 rows" in why
    assert "p99 2.1 ms, limit 2 ms" in why
    assert "recall 0.9000 (mean), target 0.99" in why
    assert "larger shortlist_ks" in why
    place, why = nearest_miss(rows[:2], 0.99, limits, decide_by="mean")
    assert (place, "RAM 130 MB, limit 100 MB" in why, "ivf-rabitq" in why, "recall" in why) == (1, True, True, False)


def test_one_stage_is_held_against_several():
    one = Plan(shortlist_dim=32, shortlist_k=20, rerank_dim=32)
    rows = [candidate(Plan.exact(32), 1, 9), candidate(TWO, 1, 6), candidate(one, 1, 4), candidate(TWO, 1, 5)]
    facts = compare_stages(rows, [2, 3, 1, 0], "model")
    assert facts == {"one_stage": 2, "several_stages": 3, "several_to_one": 1.25}
    assert compare_stages(rows, [2, 0], "model") == {"one_stage": 2, "several_stages": None, "several_to_one": None}


def test_the_pareto_front_is_what_nothing_beats():
    front = pareto_front(GOOD, "model")
    assert front == [4, 1, 2, 0]
    for place, one in enumerate(GOOD):
        beaten = any(other.model_us <= one.model_us and other.recall > one.recall for other in GOOD)
        assert not (place in front and beaten)
