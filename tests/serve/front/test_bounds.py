"""Bounds inside the ingress: streams, turns of tenants, answers in slices, whose feedback it is, lines of the log."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
import yaml

from lookalike.retrieval.ranking import Hits
from lookalike.serve.front import log_limit, overload, stream
from lookalike.serve.front.gate import Gate, listener_settings
from lookalike.serve.front.log_limit import LogLimit
from lookalike.serve.front.overload import Admission
from lookalike.serve.front.stream import Streams, answer_in_order, check_idle
from lookalike.serve.front.tenants import hash_token
from lookalike.serve.proto import retrieval_pb2 as pb
from lookalike.serve.settings.config import RequestLimits, ServeConfig
from lookalike.serve.wire.answers import Answer
from lookalike.serve.wire.errors import RetrievalError
from lookalike.serve.wire.requests import SLICE_HITS, check_num_hits, read_filters, write_results


def test_open_streams_are_bounded_in_all_and_by_tenant() -> None:
    streams = Streams(4)
    with streams.hold("a"), streams.hold("a"):
        with pytest.raises(RetrievalError, match=r"RESOURCE_EXHAUSTED.*2 of this caller, who may have 2 of 4"):
            streams.hold("a").__enter__()
        with streams.hold("b"), streams.hold("b"), pytest.raises(RetrievalError, match="4 streams are open"):
            streams.hold("c").__enter__()
        with streams.hold("b", 1), pytest.raises(RetrievalError, match="may have 1 of 4"):
            streams.hold("b", 1).__enter__()
    with streams.hold(""), streams.hold(""), streams.hold(""), streams.hold(""):
        pass  # without tenants all callers share them


def test_an_idle_stream_ends_and_one_that_works_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "LOOK_S", 0.02)
    left_open = asyncio.Event()

    async def requests(num: int) -> AsyncIterator[int]:
        for number in range(num):
            yield number
        await left_open.wait()

    async def slow(number: int) -> int:
        await asyncio.sleep(0.3)
        return number

    async def run() -> tuple[list[int], float]:
        answers, begun = list[int](), time.monotonic()

        async def read() -> None:
            async for answer in answer_in_order(requests(2), slow, 4, lambda idle_s: check_idle(idle_s, 0.1)):
                answers.append(answer)

        with pytest.raises(RetrievalError, match=r"DEADLINE_EXCEEDED: no batch came for 0\.1 s"):
            await read()
        return answers, time.monotonic() - begun

    answers, seconds = asyncio.run(run())
    assert answers == [0, 1]
    assert 0.4 <= seconds < 5


def test_tenants_take_turns_and_leave_slots_to_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> tuple[list[str], int]:
        admission, order, most = Admission(4, 100, 5.0), list[str](), 0

        async def work(tenant: str) -> None:
            nonlocal most
            async with admission.slot(tenant=tenant):
                order.append(tenant)
                most = max(most, admission.ongoing)
                await asyncio.sleep(0.005)

        flood = [asyncio.create_task(work("a")) for _ in range(40)]
        await asyncio.sleep(0.007)
        assert admission.ongoing == 4  # alone it may have all
        await asyncio.gather(*flood, *(work("b") for _ in range(3)))
        assert (admission.ongoing, admission.waiting) == (0, 0)
        return order, most

    order, most = asyncio.run(run())
    assert most == 4
    assert max(place for place, tenant in enumerate(order) if tenant == "b") < 20
    assert len(order) == 43


def test_a_tenant_alone_gets_its_slots_back_when_the_other_has_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overload, "ACTIVE_S", 0.1)

    async def run() -> None:
        admission = Admission(8, 100, 5.0)
        async with admission.slot(tenant="b"):
            pass
        held, until = list[asyncio.Task[None]](), asyncio.Event()

        async def hold() -> None:
            async with admission.slot(tenant="a"):
                await until.wait()

        held = [asyncio.create_task(hold()) for _ in range(4)]
        await asyncio.sleep(0)
        assert (admission.ongoing, admission.waiting) == (2, 2)
        await asyncio.sleep(0.15)
        held += [asyncio.create_task(hold()) for _ in range(2)]
        until.set()
        await asyncio.gather(*held)
        assert (admission.ongoing, admission.waiting) == (0, 0)

    asyncio.run(run())


def test_a_long_answer_is_written_in_slices_and_within_its_time() -> None:
    queries, k = 40, 4 * SLICE_HITS
    rows = np.tile(np.arange(k, dtype=np.int64), (queries, 1))
    entries = {row: (f"id-{row}", "front", "red") for row in range(k)}
    answer = Answer(Hits(rows, np.ones((queries, k), np.float32)), ["image_id", "view", "colour"], entries)

    async def run(seconds: float) -> tuple[list[pb.HitList], int]:
        turns, ended = 0, False

        async def count_turns() -> None:
            nonlocal turns
            while not ended:
                await asyncio.sleep(0)
                turns += 1

        counting = asyncio.create_task(count_turns())
        try:
            results = await write_results(answer, queries, asyncio.get_running_loop().time() + seconds)
        finally:
            ended = True
            await counting
        return results, turns

    results, turns = asyncio.run(run(60.0))
    assert [len(each.hits) for each in results] == [k] * queries
    assert [hit.id for hit in results[-1].hits] == [f"id-{row}" for row in range(k)]
    assert results[0].hits[k - 1].metadata == {"view": "front", "colour": "red"}
    assert turns >= queries * k // SLICE_HITS - 1  # others have a turn after each slice
    with pytest.raises(RetrievalError, match=r"DEADLINE_EXCEEDED.* of 40 answers were written in time"):
        asyncio.run(run(0.0))


def test_hits_and_filters_of_a_request_are_bounded() -> None:
    limits = RequestLimits()
    check_num_hits(65, 1000, limits)
    with pytest.raises(RetrievalError, match=r"256 queries with k=1000 ask for 256000 hits.*65536.*limits.max_hits"):
        check_num_hits(256, 1000, limits)

    class Meta:
        columns = ("view",)

    large = [pb.Filter(column="view", values=["x" * 3000] * 999)]
    with pytest.raises(RetrievalError, match=r"the filter values have 2997000 bytes.*limits.max_filter_bytes"):
        read_filters(large, limits=limits, meta=Meta())  # type: ignore[arg-type]


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    tenants = [{"name": name, "token_sha256": [hash_token(name), hash_token(f"{name}-next")]} for name in ("a", "b")]
    (tmp_path / "t.yaml").write_text(yaml.safe_dump({"tenants": tenants}))
    return Gate(ServeConfig(index="x", tenants=str(tmp_path / "t.yaml")))


def test_feedback_is_taken_on_ones_own_answers(gate: Gate) -> None:
    def caller(token: str):  # type: ignore[no-untyped-def]
        return gate.identify("Feedback", [("authorization", f"Bearer {token}")])

    request_id = caller("a").sign("0123456789abcdef01234567")
    assert len(request_id) == 24
    assert set(request_id) <= set("0123456789abcdef")
    assert request_id.startswith("0123456789abcdef")
    for own in ("a", "a-next"):
        caller(own).check("Feedback", pb.FeedbackRequest(request_id=request_id, kind="click"))
    for token, given in (("b", request_id), ("a", "0123456789abcdef01234567"), ("a", "1" + request_id[1:])):
        with pytest.raises(RetrievalError, match=f"PERMISSION_DENIED.*tenant '{token}'"):
            caller(token).check("Feedback", pb.FeedbackRequest(request_id=given, kind="click"))
    assert Gate(ServeConfig(index="x")).identify("Search", []).sign("0123") == "0123"


def test_one_of_several_tenants_may_have_half_of_the_requests(gate: Gate) -> None:
    config = ServeConfig(index="x")
    half = (config.max_ongoing_requests + config.max_queued_requests) // 2
    caller = gate.identify("Search", [("authorization", "Bearer a")])
    held = [caller.under_way() for _ in range(half)]
    for each in held:
        each.__enter__()
    with pytest.raises(RetrievalError, match=f"RESOURCE_EXHAUSTED.*{half} requests under way"):
        caller.under_way().__enter__()
    for each in held:
        each.__exit__(None, None, None)
    assert listener_settings(config).max_calls > half


def test_a_query_for_many_hits_counts_as_several(tmp_path: Path) -> None:
    tenant = {"name": "a", "token_sha256": [hash_token("a")], "quota": {"queries_per_s": 20}}
    (tmp_path / "t.yaml").write_text(yaml.safe_dump({"tenants": [tenant]}))
    caller = Gate(ServeConfig(index="x", tenants=str(tmp_path / "t.yaml"))).identify(
        "SearchBatch", [("authorization", "Bearer a")]
    )
    batch = pb.SearchBatchRequest(queries=[pb.Query(image_id="x")] * 2, options=pb.SearchOptions(k=1000))
    caller.check("SearchBatch", batch)
    with pytest.raises(RetrievalError, match="20 queries a second; retry after"):
        caller.check("SearchBatch", batch)


def test_serves_lines_about_failed_requests_are_bounded(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    logger = logging.getLogger("ray.serve.test")
    logger.addFilter(LogLimit())
    now = [1000.0]
    monkeypatch.setattr(log_limit.time, "monotonic", lambda: now[0])

    def fail() -> None:
        logger.error("Request %s failed.", "x")

    for _ in range(100):
        fail()
    assert len(caplog.records) == log_limit.BURST
    logger.error("another place")
    now[0] += 10
    fail()
    assert caplog.messages[-2:] == ["another place", "Request x failed. (95 more like this were left out)"]
