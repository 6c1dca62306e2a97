"""A replica has done once what requests will ask of it before it takes any."""

from typing import TYPE_CHECKING

import pytest

from lookalike.retrieval import shard_searcher
from lookalike.retrieval.shard_searcher import ShardSearcher
from lookalike.serve.generations.generation import read_generation
from lookalike.serve.search.workers import RerankWorker, ShardWorker

if TYPE_CHECKING:
    from tests.serve.conftest import World


def test_held_generations_are_warm(world: "World", monkeypatch: pytest.MonkeyPatch) -> None:
    generation = read_generation(world.index, world.plan, "none")
    seen: list[tuple[str, int]] = []

    def noting(name: str) -> None:
        original = getattr(ShardSearcher, name)

        def noted(self: ShardSearcher, vectors: object, *rest: object) -> object:
            assert rest[-1] == generation.plans.default
            seen.append((name, self.meta.row_offset))
            return original(self, vectors, *rest)

        monkeypatch.setattr(ShardSearcher, name, noted)

    noting("search")
    noting("rerank")
    worker = ShardWorker(1, 2, [generation])
    assert seen == [("search", world.searcher.meta.offsets[1])] * 8
    (shard,) = worker.generations[generation.name].shards
    with monkeypatch.context() as patch:
        patch.setattr(shard_searcher, "load_shortlist", None)  # nothing is left to load
        assert [shard.index_over(dim) is not None for dim in generation.meta.shortlist_dims] == [True, True]
    seen.clear()
    RerankWorker([generation])
    assert sorted(set(seen)) == [("rerank", offset) for offset in world.searcher.meta.offsets]
