"""The cost model: the paper's count of multiply-adds, a query's work step by step, a plan's memory."""

import os

import pytest

from lookalike.retrieval import costs
from lookalike.retrieval.index_meta import EncoderRef, IndexMeta
from lookalike.retrieval.plan import Plan
from lookalike.retrieval.shortlist import Work, shortlist_name
from tests.synthetic import make_vectors

FUNNEL = Plan(shortlist_dim=8, shortlist_k=60, stages=((16, 40),), rerank_dim=32)
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
