"""The candidate plans: prefixes, sizes, efforts and funnels."""

from lookalike.retrieval import candidates
from lookalike.retrieval.plan import Plan

DIMS = (4, 8, 16, 32)


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
