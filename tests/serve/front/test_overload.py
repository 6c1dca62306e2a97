"""Overload: slots, the queue before them, what a refused caller is told, and cheaper plans under load."""

import asyncio
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from lookalike.retrieval.plan import Plan
from lookalike.serve.app import ingress_bounds, read_service
from lookalike.serve.client import SearchPlan
from lookalike.serve.client.results import from_response
from lookalike.serve.front.ingress import Ingress
from lookalike.serve.front.overload import Admission, ImageAdmission, Ladder, ShedError, find_rungs
from lookalike.serve.proto import retrieval_pb2 as pb
from lookalike.serve.settings.config import ServeConfig
from lookalike.serve.settings.load import Degrade
from lookalike.serve.wire.errors import RetrievalError
from lookalike.serve.wire.requests import ServicePlans, has_images
from tests.serve.test_placements import Context

if TYPE_CHECKING:
    from tests.serve.conftest import World

SIZES = (5, 10, 20, 40)
STEPS = [Plan(shortlist_dim=8, shortlist_k=size, rerank_dim=64) for size in SIZES]
PLANS = ServicePlans(STEPS[3], Plan.exact(64), ((0.8, STEPS[0]), (0.92, STEPS[1]), (0.95, STEPS[2]), (0.99, STEPS[3])))


async def hold(admission: Admission, until: asyncio.Event) -> str:
    async with admission.slot():
        await until.wait()
        return "done"


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_beyond_slots_and_queue_requests_are_shed_and_told_when_to_return() -> None:
    async def run() -> None:
        admission, until = Admission(2, 3, 60), asyncio.Event()
        begun = [asyncio.create_task(hold(admission, until)) for _ in range(5)]
        await settle()
        assert (admission.ongoing, admission.waiting, admission.share) == (2, 3, 2.5)
        with pytest.raises(ShedError, match=r"RESOURCE_EXHAUSTED: 2 requests .* 3 wait; retry after \d+ ms"):
            await hold(admission, until)
        until.set()
        assert await asyncio.gather(*begun) == ["done"] * 5
        assert await hold(admission, until) == "done"
        assert (admission.ongoing, admission.waiting, admission.share) == (0, 0, 0)

    asyncio.run(run())


def test_cancelled_requests_free_their_slots_and_places() -> None:
    async def run() -> None:
        admission, never = Admission(2, 3, 60), asyncio.Event()
        begun = [asyncio.create_task(hold(admission, never)) for _ in range(5)]
        await settle()
        for task in (begun[0], begun[4]):
            task.cancel()
        await settle()
        assert (admission.ongoing, admission.waiting) == (2, 1)  # the first that waited has moved up
        for task in begun:
            task.cancel()
        await settle()
        assert (admission.ongoing, admission.waiting) == (0, 0)
        now = asyncio.Event()
        now.set()
        assert await asyncio.gather(*(hold(admission, now) for _ in range(2))) == ["done"] * 2

    asyncio.run(run())


def test_waiting_ends_with_the_time_that_a_request_may_take() -> None:
    async def run() -> None:
        admission, never = Admission(1, -1, 0.02), asyncio.Event()
        first = asyncio.create_task(hold(admission, never))
        await settle()
        with pytest.raises(RetrievalError, match="DEADLINE_EXCEEDED"):
            await hold(admission, never)
        assert admission.waiting == 0
        first.cancel()

    asyncio.run(run())


def test_requests_with_images_have_slots_of_their_own_and_a_tenant_at_most_half() -> None:
    async def run() -> None:
        config = ServeConfig(index="x", max_ongoing_requests=16, max_queued_requests=16)
        slots, until, begun = ImageAdmission(config), asyncio.Event(), list[str]()

        async def hold_image(tenant: str) -> None:
            async with slots.slot(tenant):
                begun.append(tenant)
                await until.wait()

        held = [asyncio.create_task(hold_image("a")) for _ in range(4)]
        await settle()
        assert begun == ["a", "a"]  # half of a quarter; two more wait
        with pytest.raises(ShedError, match=r"retry after \d+ ms"):
            await hold_image("a")
        held += [asyncio.create_task(hold_image(tenant)) for tenant in ("b", "c", "c", "c")]
        await settle()
        assert sorted(begun) == ["a", "a", "b", "c"]
        with pytest.raises(ShedError, match="8 requests with images"):
            await hold_image("d")
        for task in held[:2]:
            task.cancel()
        until.set()
        await asyncio.gather(*held, return_exceptions=True)
        assert len(begun) == 8
        async with slots.slot("d"):
            pass

    asyncio.run(run())


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (pb.EmbedRequest(images=[b"x"]), True),
        (pb.SearchRequest(query=pb.Query(image=b"x")), True),
        (pb.SearchRequest(query=pb.Query(image_id="x")), False),
        (pb.SearchBatchRequest(queries=[pb.Query(vector=b"x"), pb.Query(image=b"x")]), True),
        (pb.SearchBatchRequest(queries=[pb.Query(vector=b"x")]), False),
        (pb.UpsertRequest(rows=[pb.Row(id="a", vector=b"x"), pb.Row(id="b", image=b"x")]), True),
        (pb.UpsertRequest(rows=[pb.Row(id="a", vector=b"x")]), False),
        (pb.DeleteRequest(ids=["a"]), False),
    ],
)
def test_requests_with_images_are_known(request_: Any, expected: bool) -> None:
    assert has_images(request_) == expected


def test_patient_calls_wait_where_others_are_shed() -> None:
    async def run() -> None:
        admission, until = Admission(1, 0, 60), asyncio.Event()
        first = asyncio.create_task(hold(admission, until))
        await settle()
        with pytest.raises(ShedError):
            await hold(admission, until)

        async def stream() -> str:
            async with admission.slot(patient=True):
                return "served"

        waits = asyncio.create_task(stream())
        await settle()
        until.set()
        assert [await first, await waits] == ["done", "served"]

    asyncio.run(run())


def test_the_time_to_return_follows_the_pace() -> None:
    slow, quick = Admission(2, 0, 60), Admission(2, 0, 60)

    async def serve_one(admission: Admission, seconds: float) -> None:
        async with admission.slot():
            await asyncio.sleep(seconds)

    async def run() -> None:
        before = slow.retry_after_ms
        await serve_one(slow, 0.4)
        for _ in range(20):
            await serve_one(quick, 0)
        assert quick.retry_after_ms < before < slow.retry_after_ms

    asyncio.run(run())


def test_rungs_are_what_is_measured_below_the_default() -> None:
    assert find_rungs(PLANS, 0.9) == [STEPS[2], STEPS[1]]
    assert find_rungs(PLANS, 0.5) == [STEPS[2], STEPS[1], STEPS[0]]
    assert find_rungs(PLANS, 0.96) == []
    assert find_rungs(PLANS._replace(measured=()), 0.1) == []
    assert find_rungs(PLANS._replace(default=Plan.exact(64)), 0.1) == []  # what it costs is not known
    worse = PLANS._replace(measured=((0.92, STEPS[1]), (0.91, STEPS[2]), (0.99, STEPS[3])))
    assert find_rungs(worse, 0.9) == [STEPS[1]]


def test_plans_go_down_with_the_load_and_up_later() -> None:
    ladder = Ladder(Degrade(min_recall=0.9, enter=0.6, leave=0.4))
    loads = [0.5, 0.6, 0.79, 0.81, 3.0, 1.0, 0.65, 0.55, 0.41, 0.39, 0.59, 0.6]
    first, last = STEPS[2], STEPS[1]
    assert [ladder.choose(PLANS, load) for load in loads] == [
        None,
        first,
        first,
        last,
        last,
        last,
        last,
        first,
        first,
        None,
        None,
        first,
    ]


@given(st.lists(st.floats(0, 6), max_size=30), st.floats(0.05, 0.99))
def test_no_plan_is_below_the_floor_and_quiet_restores_the_default(loads: list[float], floor: float) -> None:
    ladder, known = Ladder(Degrade(min_recall=floor)), {plan: recall for recall, plan in PLANS.measured}
    for load in loads:
        plan = ladder.choose(PLANS, load)
        assert plan is None or known[plan] >= floor
    assert ladder.choose(PLANS, 0.0) is None


def test_settings_out_of_order_are_refused() -> None:
    with pytest.raises(ValidationError, match="not below enter"):
        Degrade(enter=0.5, leave=0.5)


def search(ingress: Any, world: "World", **options: Any) -> Any:
    request = pb.SearchRequest(
        query=pb.Query(vector=world.vectors["img-004"].tobytes()), options=pb.SearchOptions(**options)
    )
    context = Context()
    return ingress.Search(request, grpc_context=context), context


@pytest.fixture(scope="module")
def busy(world: "World") -> ServeConfig:
    return ServeConfig(
        index=world.index,
        plan=world.plan,
        encoder="none",
        placement="fused",
        max_ongoing_requests=4,
        max_queued_requests=0,
        degrade=Degrade(min_recall=0.9),
    )


def test_the_reply_says_what_was_degraded(busy: ServeConfig, world: "World") -> None:
    async def run() -> None:
        ingress = Ingress(busy, read_service(busy))
        admission, until = ingress.service.admission, asyncio.Event()
        calm = from_response(await search(ingress, world)[0])
        assert (calm.info.degraded, calm.info.plan) == (False, SearchPlan(16, 12, 64))
        held = [asyncio.create_task(hold(admission, until)) for _ in range(3)]
        await settle()
        result = from_response(await search(ingress, world)[0])
        assert (result.info.degraded, result.info.plan) == (True, SearchPlan(16, 6, 64))
        for own in ({"min_recall": 0.95}, {"plan": pb.Plan(shortlist_dim=16, shortlist_k=12, rerank_dim=64)}):
            kept = from_response(await search(ingress, world, **own)[0])
            assert (kept.info.degraded, kept.info.plan) == (False, SearchPlan(16, 12, 64))
        held.append(asyncio.create_task(hold(admission, until)))
        await settle()
        answer, context = search(ingress, world)
        assert await answer == pb.SearchResponse()  # not sent beside this status
        assert context.code == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "retry after" in context.details
        assert (await ingress.Describe(pb.DescribeRequest(), grpc_context=Context())).dim == 64  # not queued
        until.set()
        await asyncio.gather(*held)
        assert not from_response(await search(ingress, world)[0]).info.degraded

    asyncio.run(run())


def test_time_in_the_queue_counts_as_the_requests_own(busy: ServeConfig, world: "World") -> None:
    async def run() -> None:
        config = busy.model_copy(update={"max_ongoing_requests": 1, "max_queued_requests": 4})
        ingress, until = Ingress(config, read_service(config)), asyncio.Event()
        first = asyncio.create_task(hold(ingress.service.admission, until))
        await settle()
        answer, context = search(ingress, world, timeout_ms=30)
        late = asyncio.create_task(answer)
        await asyncio.sleep(0.06)
        until.set()
        await first
        await late
        assert context.code == grpc.StatusCode.DEADLINE_EXCEEDED

    asyncio.run(run())


def test_serves_own_bound_lies_beyond(busy: ServeConfig) -> None:
    assert ingress_bounds(busy)["max_ongoing_requests"] > 4
    assert ingress_bounds(busy.model_copy(update={"max_queued_requests": -1}))["max_ongoing_requests"] == 100_000


def test_a_caller_that_leaves_ends_its_work_and_frees_its_slot(busy: ServeConfig, world: "World") -> None:
    async def run() -> None:
        ingress = Ingress(busy, read_service(busy))
        ended: list[str] = []

        async def hang(*_: Any) -> None:
            try:
                await asyncio.Event().wait()
            finally:
                ended.append("shard")

        for shard in ingress.service.router.shards:
            shard.search = hang
        caller = asyncio.create_task(search(ingress, world)[0])
        while not ingress.service.admission.ongoing:
            await asyncio.sleep(0)
        await settle()
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        await settle()
        assert (ingress.service.admission.ongoing, ended) == (0, ["shard", "shard"])

    asyncio.run(run())
