"""The whole way: Ray Serve deployments behind a gRPC port, the packaged client in front."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from lookalike.errors import UsageError
from lookalike.retrieval.plan import Plan
from lookalike.serve.app import start, stop
from lookalike.serve.client import AsyncClient, Client, SearchPlan, SearchResult
from lookalike.serve.front.ingress import SERVICE_NAME
from lookalike.serve.local import LocalClient
from lookalike.serve.settings.config import RequestLimits, ServeConfig
from lookalike.serve.wire.errors import RetrievalError

if TYPE_CHECKING:
    from tests.serve.conftest import World

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def client(ray_session: None, world: "World") -> Iterator[Client]:
    limits = RequestLimits(max_k=50, max_pixels=10_000)
    address = start(ServeConfig(index=world.index, plan=world.plan, placement="staged", port=0, limits=limits))
    with Client(address) as client:
        client.wait_ready()
        yield client
    stop()


def test_answers_over_the_wire_are_the_searchers(client: Client, world: "World") -> None:
    plan = Plan(shortlist_dim=16, shortlist_k=12, rerank_dim=64)
    vectors = np.stack(list(world.vectors.values()))
    hits = world.searcher.search(vectors, 5, plan)
    results = client.search_batch(vectors, k=5)
    assert [result.ids for result in results] == [world.searcher.ids(rows) for rows in hits.rows]
    assert np.array_equal([[hit.score for hit in result.hits] for result in results], hits.scores)
    assert results[0].info.coverage == 1.0
    assert set(results[0].info.times_ms) == {"shards", "rerank"}


def test_filters_and_min_recall_travel(client: Client, world: "World") -> None:
    result = client.search(image_id="img-004", k=50, where={"view": ["side"]}, min_recall=0.98)
    assert sorted(result.ids) == [name for name in world.images if int(name[-3:]) % 3 == 1]
    assert result.info.plan.scan


def test_streams_and_asyncio(client: Client, world: "World") -> None:
    batches = [["img-001"], ["img-999"], list(world.vectors.values())[:3]]
    plain = list(client.search_stream(batches, k=2))
    assert isinstance(plain[1], RetrievalError)
    assert plain[1].code == grpc.StatusCode.NOT_FOUND

    async def ask() -> None:
        async def endless() -> AsyncIterator[list[str]]:
            number = 0
            while True:  # drawn only as fast as answers are
                yield [f"img-{number % 60:03d}"]
                number += 1

        async with AsyncClient(client.address) as asking:
            one = await asking.search(image_id="img-001", k=2)
            assert [one] == [replace_times(result, one) for result in plain[0]]
            assert (await asking.describe()).num_rows == 60
            with pytest.raises(RetrievalError, match=r"NOT_FOUND.*img-777"):
                await asking.search(image_id="img-777")
            seen = 0
            async for answer in asking.search_stream(endless(), k=1):
                assert not isinstance(answer, RetrievalError)
                assert answer[0].ids == [f"img-{seen:03d}"]
                seen += 1
                if seen == 20:
                    break
            vectors = np.stack(list(world.vectors.values())[:2])
            assert [r.ids for r in await asking.search_batch(vectors, k=2)] == [r.ids for r in plain[2][:2]]

    asyncio.run(asyncio.wait_for(ask(), 30))


def replace_times(result: SearchResult, like: SearchResult) -> SearchResult:
    return replace(result, info=replace(result.info, times_ms=like.info.times_ms))


def test_an_image_query_goes_through_the_encoder_deployment(client: Client, world: "World") -> None:
    result = client.search(image=world.images["img-042"], k=3)
    with LocalClient(ServeConfig(index=world.index, plan=world.plan)) as local:
        assert result.ids == local.search(image=world.images["img-042"], k=3).ids
    assert result.ids[0] == "img-042"
    assert result.hits[0].score == pytest.approx(1.0, abs=1e-4)
    assert client.embed([world.images["img-042"]]).vectors[0] == pytest.approx(world.vectors["img-042"], abs=1e-4)


VECTOR = np.ones(64, np.float32)


@pytest.mark.parametrize(
    ("request_", "code", "words"),
    [
        ({"vector": VECTOR[:3]}, grpc.StatusCode.INVALID_ARGUMENT, "64 float32 numbers are 256"),
        ({"vector": VECTOR, "k": 51}, grpc.StatusCode.INVALID_ARGUMENT, "k=51"),
        ({"vector": VECTOR, "plan": SearchPlan(8, 5, 32)}, grpc.StatusCode.INVALID_ARGUMENT, "[32]"),
        ({"image": b"no image at all"}, grpc.StatusCode.INVALID_ARGUMENT, "15 bytes are no image"),
        ({"image_id": "img-999"}, grpc.StatusCode.NOT_FOUND, "'img-999'"),
        ({"vector": VECTOR, "model_fingerprint": "f00"}, grpc.StatusCode.FAILED_PRECONDITION, "model 'f00'"),
        ({"vector": VECTOR, "timeout_ms": 1}, grpc.StatusCode.DEADLINE_EXCEEDED, "no answer in time"),
    ],
)
def test_status_codes_cross_the_wire(
    client: Client, request_: dict[str, Any], code: grpc.StatusCode, words: str
) -> None:
    with pytest.raises(RetrievalError) as caught:
        client.search(**request_)
    assert (caught.value.code, words in caught.value.message) == (code, True), str(caught.value)


def test_a_client_deadline_ends_the_call(client: Client, world: "World") -> None:
    with Client(client.address, timeout_s=0.001) as hasty, pytest.raises(RetrievalError, match="DEADLINE_EXCEEDED"):
        hasty.search(image=world.images["img-000"])


def test_a_second_service_in_the_same_ray_is_refused(client: Client, world: "World") -> None:
    with pytest.raises(UsageError, match="runs already"):
        start(ServeConfig(index=world.index, port=0))
    assert client.search(image_id="img-000").ids[0] == "img-000"  # and the first one is unharmed


def test_health_and_reflection(client: Client) -> None:
    from google.protobuf.descriptor_pool import DescriptorPool
    from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

    with grpc.insecure_channel(client.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for name in ("", SERVICE_NAME):
            reply = health.Check(health_pb2.HealthCheckRequest(service=name), timeout=10)
            assert reply.status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError, match="no service 'x'"):
            health.Check(health_pb2.HealthCheckRequest(service="x"), timeout=10)
        database = ProtoReflectionDescriptorDatabase(channel)
        assert SERVICE_NAME in database.get_services()
        assert "SearchBatch" in DescriptorPool(database).FindServiceByName(SERVICE_NAME).methods_by_name
