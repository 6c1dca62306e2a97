"""Stored and written rows together are what an index of both would answer, in every placement."""

import asyncio
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lookalike.retrieval.filters import FILTERS_KEPT
from lookalike.retrieval.plan import Plan
from lookalike.serve.generations.generation import Generation, read_generation
from lookalike.serve.generations.write_record import WriteKind, WriteRecord
from lookalike.serve.proto import retrieval_pb2 as pb
from lookalike.serve.search.delta import search_all
from lookalike.serve.search.router import Router
from lookalike.serve.search.workers import RerankWorker, ShardWorker
from lookalike.serve.wire.ask import Ask

if TYPE_CHECKING:
    from tests.serve.conftest import World

PLANS = [
    Plan.exact(64),
    Plan(shortlist_dim=16, shortlist_k=60, rerank_dim=64),
    Plan(shortlist_dim=8, shortlist_k=60, stages=((16, 50),), rerank_dim=64),
    Plan.exact(16),
]
Content = dict[str, tuple[np.ndarray, str] | None]


def records_of(steps: list[tuple[list[str], bool]], seed: int, model: str, final: Content) -> list[WriteRecord]:
    """Writes of random vectors, or deletions; ``final`` is brought to what they leave."""
    rng, records = np.random.default_rng(seed), []
    for number, (ids, is_delete) in enumerate(steps, 1):
        if is_delete:
            final |= dict.fromkeys(ids)
            records.append(WriteRecord(number, WriteKind.DELETE, pb.DeleteRequest(ids=ids).SerializeToString()))
            continue
        rows = []
        for image_id in ids:
            vector, view = rng.normal(size=64).astype(np.float32), ("front", "side")[int(rng.integers(2))]
            final.pop(image_id, None)
            final[image_id] = (vector, view)
            rows.append(pb.Row(id=image_id, vector=vector.tobytes(), metadata={"view": view}))
        message = pb.UpsertRequest(rows=rows, model_fingerprint=model)
        records.append(WriteRecord(number, WriteKind.UPSERT, message.SerializeToString()))
    return records


def routers(generation: Generation, records: list[WriteRecord]) -> list[Router]:
    shards = [ShardWorker(group, 2, [generation]) for group in range(2)]
    for shard in shards:
        half = len(records) // 2
        shard.apply(shard.generations[generation.name], records[:half])
        shard.apply(shard.generations[generation.name], records)  # the first half is known
    return [Router(shards), Router(shards, RerankWorker([generation]))]


def brute_force(final: Content, query: np.ndarray, dim: int, view: str | None) -> list[tuple[str, float]]:
    found = []
    for image_id, row in final.items():
        if row is not None and view in (None, row[1]):
            prefix = row[0][:dim]
            found.append((image_id, float(prefix @ query[:dim] / np.linalg.norm(prefix) / np.linalg.norm(query[:dim]))))
    return sorted(found, key=lambda one: -one[1])


steps_of_writes = st.lists(
    st.tuples(st.lists(st.integers(0, 80), min_size=1, max_size=12, unique=True), st.booleans()), max_size=8
)


@settings(max_examples=25)
@given(steps=steps_of_writes, seed=st.integers(0, 1000), view=st.sampled_from([None, "front"]))
def test_any_writes_over_an_index(world: "World", steps: list[tuple[list[int], bool]], seed: int, view: str) -> None:
    generation = read_generation(world.index, None, "none", check=False)
    views = world.searcher.column("view")
    ids = world.searcher.ids(range(60))
    final: Content = {image_id: (world.vectors[image_id], views[row]) for row, image_id in enumerate(ids)}
    named = [([f"img-{number:03d}" for number in numbers], is_delete) for numbers, is_delete in steps]
    records = records_of(named, seed, generation.meta.model_fingerprint, final)
    queries = np.random.default_rng(seed + 1).normal(size=(4, 64)).astype(np.float32)
    conditions = {"view": [view]} if view else {}
    for router in routers(generation, records):
        assert asyncio.run(count(router, generation.name)) == sum(row is not None for row in final.values())
        for plan in PLANS:
            found = asyncio.run(ask(router, generation.name, queries, plan, conditions))
            for line, query in enumerate(queries):
                wanted = brute_force(final, query, plan.rerank_dim, view)[:7]
                rows, scores = found.hits.rows[line], found.hits.scores[line]
                got = [found.entries[row][0] for row in rows.tolist() if row >= 0]
                assert got == [image_id for image_id, _ in wanted]
                np.testing.assert_allclose(scores[: len(wanted)], [score for _, score in wanted], atol=2e-6)


async def ask(router, generation, queries, plan, conditions):
    deadline = asyncio.get_running_loop().time() + 30
    outcome = await router.search(Ask(generation, queries, 7, plan, conditions), deadline=deadline, allow_partial=False)
    return outcome.answer


async def count(router: Router, generation: str) -> int:
    return await router.count_rows(generation, deadline=asyncio.get_running_loop().time() + 30)


def test_stored_vectors_are_the_newest(world: "World") -> None:
    generation = read_generation(world.index, None, "none", check=False)
    final: Content = {}
    steps = [(["img-001", "new"], False), (["img-002", "new"], True), (["img-001"], False)]
    (router, _) = routers(generation, records_of(steps, 3, generation.meta.model_fingerprint, final))

    async def look(image_id: str) -> np.ndarray:
        deadline = asyncio.get_running_loop().time() + 30
        return (await router.stored_vectors(generation.name, [image_id], deadline=deadline))[0]

    wanted = final["img-001"]
    assert wanted is not None
    unit = wanted[0] / np.linalg.norm(wanted[0])
    np.testing.assert_allclose(asyncio.run(look("img-001")), unit, atol=1e-6)
    for gone in ("img-002", "new"):
        with pytest.raises(Exception, match="NOT_FOUND"):
            asyncio.run(look(gone))


def test_a_filter_by_id_finds_written_rows_too(world: "World") -> None:
    generation = read_generation(world.index, None, "none", check=False)
    records = records_of([(["img-001", "new"], False), (["img-002"], True)], 3, generation.meta.model_fingerprint, {})
    for router in routers(generation, records):
        wanted = {"image_id": ["img-001", "img-002", "img-003", "new", "nobody"]}
        found = asyncio.run(ask(router, generation.name, np.ones((1, 64), np.float32), Plan.exact(64), wanted))
        ids = {found.entries[row][0] for row in found.hits.rows[0].tolist() if row >= 0}
        assert ids == {"img-001", "img-003", "new"}


def test_vectors_of_another_model_are_left_out(world: "World") -> None:
    generation = read_generation(world.index, None, "none", check=False)
    (router, _) = routers(generation, records_of([(["img-001"], False)], 3, "another", {}))
    query = world.vectors["img-001"][None]
    found = asyncio.run(ask(router, generation.name, query, Plan.exact(64), {}))
    assert found.entries[int(found.hits.rows[0, 0])][0] == "img-001"
    assert found.hits.scores[0, 0] == pytest.approx(1, abs=1e-5)


def test_masks_of_many_filters_are_not_kept(world: "World") -> None:
    generation = read_generation(world.index, None, "none", check=False)
    shard = ShardWorker(0, 1, [generation])
    opened = shard.generations[generation.name]
    shard.apply(opened, records_of([(["img-001"], True)], 3, generation.meta.model_fingerprint, {}))
    written = opened.delta.written()
    assert written is not None
    gone = "img-001"
    for number in range(500):
        wanted = {"image_id": [gone, f"nobody-{number}"]}
        ask_for = Ask(generation.name, world.vectors[gone][None], 3, Plan.exact(64), wanted)
        assert (search_all(opened.shards, written, ask_for).rows == -1).all()
    assert 0 < len(written.masks) <= FILTERS_KEPT * len(opened.shards)
