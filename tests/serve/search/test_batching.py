"""Micro-batching: shared calls, the same bits, and callers that do not disturb each other."""

import asyncio
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from ray.exceptions import RayActorError

from lookalike.retrieval.plan import Plan
from lookalike.serve.app import read_service
from lookalike.serve.generations.generation import Generation
from lookalike.serve.search.router import Router, SearchOutcome
from lookalike.serve.search.workers import ShardWorker
from lookalike.serve.settings.config import ServeConfig
from lookalike.serve.settings.load import Batching, Retries
from lookalike.serve.wire.ask import Ask
from lookalike.serve.wire.errors import RetrievalError
from tests.serve.test_placements import PLANS

if TYPE_CHECKING:
    from tests.serve.conftest import World

DEFAULT = Plan(shortlist_dim=16, shortlist_k=12, rerank_dim=64)
ONE_AT_A_TIME = Batching(max_in_flight=1, max_batch=8, max_wait_ms=60_000)


class Watched:
    """A shard that notes its calls, and waits where told to."""

    def __init__(self, shard: ShardWorker) -> None:
        self._shard = shard
        self.sizes: list[int] = []
        self.cancelled = 0
        self.gate = asyncio.Event()
        self.errors: list[Exception] = []
        self.hang = 0
        """Number of the call that never returns."""

    async def search(self, ask: Ask) -> Any:
        self.sizes.append(len(ask.queries))
        try:
            await self.gate.wait()
            if len(self.sizes) == self.hang:
                await asyncio.sleep(3600)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.errors:
            raise self.errors.pop()
        return await self._shard.search(ask)


class Bench:
    """A router over watched shards of the world."""

    def __init__(
        self, generation: Generation, batching: Batching | None = ONE_AT_A_TIME, retries: Retries | None = None
    ) -> None:
        self.name = generation.name
        self.shards = [Watched(ShardWorker(group, 2, [generation])) for group in range(2)]
        self.router = Router(self.shards, retries=retries or Retries(pause_ms=1), batching=batching)

    def ask(
        self, vector: np.ndarray, plan: Plan = DEFAULT, k: int = 6, timeout_s: float = 60.0, **where: list[str]
    ) -> "asyncio.Task[SearchOutcome]":
        deadline = asyncio.get_running_loop().time() + timeout_s
        ask = Ask(self.name, vector[None], k, plan, where)
        return asyncio.ensure_future(self.router.search(ask, deadline=deadline, allow_partial=False))

    def open(self) -> None:
        for shard in self.shards:
            shard.gate.set()


@pytest.fixture(scope="module")
def generation(world: "World") -> Generation:
    return read_service(ServeConfig(index=world.index, plan=world.plan, encoder="none"))


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


@pytest.mark.parametrize("plan", PLANS, ids=Plan.describe)
def test_shared_calls_give_the_bits_of_single_ones(generation: Generation, world: "World", plan: Plan) -> None:
    vectors = [world.vectors[name] for name in list(world.images)[:20]]

    async def run(batching: Batching | None) -> tuple[list[SearchOutcome], list[int]]:
        bench = Bench(generation, batching)
        tasks = [bench.ask(vector, plan) for vector in vectors]
        await settle()
        bench.open()
        return list(await asyncio.gather(*tasks)), bench.shards[0].sizes

    shared, sizes = asyncio.run(run(ONE_AT_A_TIME))
    alone, each = asyncio.run(run(None))
    assert (sizes, each) == ([1, 8, 8, 3], [1] * 20)
    for mine, other in zip(shared, alone, strict=True):
        assert np.array_equal(mine.answer.hits.rows, other.answer.hits.rows)
        assert np.array_equal(mine.answer.hits.scores, other.answer.hits.scores)
        assert mine.answer.entries == other.answer.entries
        assert mine.shards_answered == 2


def test_only_like_searches_share(generation: Generation, world: "World") -> None:
    async def run() -> None:
        bench, vector = Bench(generation), world.vectors["img-004"]
        tasks = [
            bench.ask(vector),
            *(
                bench.ask(vector, **asked)
                for asked in (  # type: ignore[arg-type]
                    {},
                    {"k": 3},
                    {"plan": Plan.exact(64)},
                    {"view": ["side"]},
                    {},
                    {"view": ["side"]},
                )
            ),
        ]
        await settle()
        bench.open()
        outcomes = await asyncio.gather(*tasks)
        assert sorted(bench.shards[0].sizes) == [1, 1, 1, 2, 2]
        assert [outcome.answer.hits.rows.shape[1] for outcome in outcomes] == [6, 6, 3, 6, 6, 6, 6]
        answer = outcomes[6].answer
        place = list(answer.names).index("view")
        assert {entry[place] for entry in answer.entries.values()} == {"side"}

    asyncio.run(run())


def test_nobody_waits_while_calls_may_be_made(generation: Generation, world: "World") -> None:
    async def run() -> None:
        bench = Bench(generation, Batching(max_in_flight=3))
        tasks = [bench.ask(world.vectors["img-004"]) for _ in range(3)]
        await settle()
        assert bench.shards[0].sizes == [1, 1, 1]
        bench.open()
        await asyncio.gather(*tasks)

    asyncio.run(run())


def test_a_caller_that_leaves_or_is_late_disturbs_nobody(generation: Generation, world: "World") -> None:
    async def run() -> None:
        bench = Bench(generation)
        names = ["img-001", "img-002", "img-003", "img-004"]
        first, second, third, late = (
            bench.ask(world.vectors[name], timeout_s=0.1 if name == names[3] else 60) for name in names
        )
        await settle()
        second.cancel()
        with pytest.raises(RetrievalError, match="DEADLINE_EXCEEDED"):
            await late
        assert bench.shards[0].sizes == [1]  # the others wait for the first
        bench.open()
        assert (await first).answer.entries != (await third).answer.entries
        assert bench.shards[0].sizes == [1, 1]  # those that had left were not asked for
        assert bench.shards[0].cancelled == 0

    asyncio.run(run())


def test_a_call_ends_when_all_its_callers_have_left(generation: Generation, world: "World") -> None:
    async def run() -> None:
        bench = Bench(generation)
        bench.ask(world.vectors["img-001"]).cancel()
        first = bench.ask(world.vectors["img-001"])
        await settle()
        gathered = [bench.ask(world.vectors["img-002"]) for _ in range(2)]
        await settle()
        first.cancel()
        await settle()
        assert (bench.shards[0].sizes, bench.shards[0].cancelled) == ([1, 2], 1)
        gathered[0].cancel()
        await settle()
        assert bench.shards[0].cancelled == 1
        bench.open()
        assert (await gathered[1]).shards_answered == 2

    asyncio.run(run())


def test_a_lost_call_is_made_again_for_all_its_callers(generation: Generation, world: "World") -> None:
    async def run() -> None:
        bench = Bench(generation)
        tasks = [bench.ask(world.vectors[name]) for name in ("img-001", "img-002", "img-003")]
        await settle()
        bench.shards[0].errors = [RayActorError(), RayActorError()]
        bench.open()
        assert [outcome.shards_answered for outcome in await asyncio.gather(*tasks)] == [2, 2, 2]

    asyncio.run(run())


def test_when_calls_hang_the_others_go_all_the_same(generation: Generation, world: "World") -> None:
    async def run() -> None:
        bench = Bench(generation, ONE_AT_A_TIME.model_copy(update={"max_wait_ms": 20}))
        tasks = [bench.ask(world.vectors["img-001"]) for _ in range(4)]
        while len(bench.shards[0].sizes) < 2:
            await asyncio.sleep(0.005)
        assert bench.shards[0].sizes == [1, 3]
        bench.open()
        await asyncio.gather(*tasks)

    asyncio.run(run())


def test_a_shared_call_that_hangs_is_made_again_as_one(generation: Generation, world: "World") -> None:
    """More callers share it than second calls may be made at once."""

    async def run() -> None:
        bench = Bench(
            generation,
            Batching(max_in_flight=1, max_batch=64, max_wait_ms=60_000),
            Retries(hedge_ms=50, hedge_share=0.01),
        )
        for shard in bench.shards:
            shard.hang = 2  # the second call
        bench.open()
        tasks = [bench.ask(world.vectors["img-001"], timeout_s=5) for _ in range(40)]
        assert [outcome.shards_answered for outcome in await asyncio.gather(*tasks)] == [2] * 40
        assert bench.shards[0].sizes == [1, 39, 39]

    asyncio.run(run())
