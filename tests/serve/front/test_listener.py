"""The guard before Serve's gRPC listener: calls are refused before their messages are read, and bounded by tenant."""

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import grpc
import pytest
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc
from ray.serve._private.grpc_util import gRPCGenericServer  # noqa: PLC2701
from ray.serve._private.proxy_request_response import gRPCStreamingType  # noqa: PLC2701

from lookalike.serve.front import listener as front_listener
from lookalike.serve.front import share as front_share
from lookalike.serve.front.listener import Guard, ListenerSettings, add_guarded
from lookalike.serve.front.tenants import hash_token
from lookalike.serve.proto import retrieval_pb2 as pb
from lookalike.serve.proto import retrieval_pb2_grpc as pb_grpc

LARGE = 24 << 20
OK = grpc.StatusCode.OK
UNLIMITED = [("grpc.max_send_message_length", -1)]


class Listener:
    """Serve's own gRPC server with the guard, on a thread; what is behind it only counts."""

    def __init__(self, settings: ListenerSettings) -> None:
        self.received: list[int] = []
        self.released = asyncio.Event()
        self.released.set()
        self.guard = Guard(lambda: settings)
        self.guard.refresh()
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        asyncio.run_coroutine_threadsafe(self._start(), self.loop).result(10)

    async def _start(self) -> None:
        self.server = gRPCGenericServer(self._handle)
        self.port = self.server.add_insecure_port("127.0.0.1:0")
        add_guarded(Mock(), self.server, self.guard)
        await self.server.start()

    def _handle(self, service_method: str, streaming_type: gRPCStreamingType) -> Any:
        async def unary(request: Any, context: Any) -> bytes:
            self.received.append(request.ByteSize())
            await self.released.wait()
            return b""

        async def stream(requests: Any, context: Any) -> Any:
            async for _ in requests:
                yield b""

        return unary if streaming_type == gRPCStreamingType.UNARY_UNARY else stream

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self.server.stop(0), self.loop).result(10)
        self.loop.call_soon_threadsafe(self.loop.stop)


@contextmanager
def listen(settings: ListenerSettings) -> Iterator[tuple[Listener, grpc.Channel]]:
    listener = Listener(settings)
    with grpc.insecure_channel(f"127.0.0.1:{listener.port}", options=UNLIMITED) as channel:
        yield listener, channel
    listener.close()


def bearer(token: str) -> dict[str, Any]:
    return {"metadata": [("authorization", f"Bearer {token}")], "timeout": 10}


def wait_for(listener: Listener, num: int) -> None:
    """Wait until ``num`` messages have come through."""
    while len(listener.received) < num:
        time.sleep(0.01)


def wait_until_free(listener: Listener) -> None:
    """Wait until nothing is counted any more: a caller has its status a moment before."""
    while any(each.calls or each.size_bytes for each in listener.guard.shares.values()):
        time.sleep(0.01)


def code_of(call: Any) -> grpc.StatusCode:
    try:
        call()
    except grpc.RpcError as error:
        return error.code()  # type: ignore[no-any-return, attr-defined]
    return grpc.StatusCode.OK


@pytest.fixture
def settings(tmp_path: Path) -> ListenerSettings:
    tenants = [
        {"name": name, "token_sha256": [hash_token(name)], "role": role}
        for name, role in (("a", "read"), ("b", "read"), ("w", "write"))
    ]
    (tmp_path / "tenants.yaml").write_text(yaml.safe_dump({"tenants": tenants}))
    return ListenerSettings(tenants=str(tmp_path / "tenants.yaml"), max_calls=3, max_bytes=LARGE)


def image(size: int) -> pb.SearchRequest:
    return pb.SearchRequest(query=pb.Query(image=bytes(size)))


def images(*sizes: int) -> pb.SearchBatchRequest:
    return pb.SearchBatchRequest(queries=[pb.Query(image=bytes(size)) for size in sizes])


SEND_LARGE = """
import sys, grpc
from lookalike.serve.proto import retrieval_pb2 as pb, retrieval_pb2_grpc as pb_grpc

port, size, compression = map(int, sys.argv[1:])
request = pb.SearchBatchRequest(queries=[pb.Query(image=bytes(size))])
with grpc.insecure_channel(f"127.0.0.1:{port}", options=[("grpc.max_send_message_length", -1)]) as channel:
    stub = pb_grpc.RetrievalServiceStub(channel)
    for metadata in ([], [("authorization", "Bearer c")]):
        try:
            stub.SearchBatch(request, metadata=metadata, compression=grpc.Compression(compression), timeout=10)
        except grpc.RpcError as error:
            print(error.code().name)
"""


def peak_bytes() -> int:
    """Most memory of this process since its peak was last cleared."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


@pytest.mark.parametrize("compression", [grpc.Compression.NoCompression, grpc.Compression.Gzip])
def test_the_message_of_a_caller_without_a_token_is_not_read(
    settings: ListenerSettings, compression: grpc.Compression
) -> None:
    with listen(settings) as (listener, channel):
        stub = pb_grpc.RetrievalServiceStub(channel)  # type: ignore[no-untyped-call]
        admin = pb_grpc.AdminServiceStub(channel)  # type: ignore[no-untyped-call]
        Path("/proc/self/clear_refs").write_text("5")
        before = peak_bytes()
        caller = [sys.executable, "-c", SEND_LARGE, str(listener.port), str(LARGE), str(int(compression))]
        done = subprocess.run(caller, capture_output=True, text=True, check=True)
        assert done.stdout.split() == ["UNAUTHENTICATED"] * 2
        assert peak_bytes() - before < LARGE // 2
        assert code_of(lambda: admin.Status(pb.StatusRequest(), **bearer("a"))) == grpc.StatusCode.PERMISSION_DENIED
        assert code_of(lambda: list(stub.SearchStream(iter([]), timeout=5))) == grpc.StatusCode.UNAUTHENTICATED
        assert listener.received == []
        assert code_of(lambda: stub.SearchBatch(images(LARGE), **bearer("a"))) == grpc.StatusCode.OK
        assert len(listener.received) == 1


def test_health_needs_no_token_and_takes_small_messages(settings: ListenerSettings) -> None:
    with listen(settings) as (listener, channel):
        stub = health_pb2_grpc.HealthStub(channel)  # type: ignore[no-untyped-call]
        assert code_of(lambda: stub.Check(health_pb2.HealthCheckRequest(service="x"))) == grpc.StatusCode.OK
        large = health_pb2.HealthCheckRequest(service="x" * 5000)
        assert code_of(lambda: stub.Check(large)) == grpc.StatusCode.INVALID_ARGUMENT
        assert len(listener.received) == 1


def test_calls_of_a_tenant_are_bounded_and_leave_others_alone(settings: ListenerSettings) -> None:
    with listen(settings) as (listener, channel):
        stub = pb_grpc.RetrievalServiceStub(channel)  # type: ignore[no-untyped-call]
        listener.released.clear()
        held = [stub.Search.future(image(1), **bearer("a")) for _ in range(3)]
        wait_for(listener, 3)
        assert code_of(lambda: stub.Search(image(1), **bearer("a"))) == grpc.StatusCode.RESOURCE_EXHAUSTED
        other = stub.Search.future(image(1), **bearer("b"))
        wait_for(listener, 4)
        health = health_pb2_grpc.HealthStub(channel)  # type: ignore[no-untyped-call]
        checked = health.Check.future(health_pb2.HealthCheckRequest())
        listener.loop.call_soon_threadsafe(listener.released.set)
        for call in (*held, other, checked):
            call.result(10)
        wait_until_free(listener)
        assert listener.guard.refused == {("Search", "RESOURCE_EXHAUSTED"): 1}


def test_bytes_of_a_tenant_are_bounded_and_small_messages_do_not_wait(
    settings: ListenerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(front_share, "WAIT_S", 0.3)
    bounds = {"Search": LARGE // 2}
    with listen(settings._replace(max_calls=9, max_message=bounds)) as (listener, channel):
        stub = pb_grpc.RetrievalServiceStub(channel)  # type: ignore[no-untyped-call]
        listener.released.clear()
        held = [stub.Search.future(image(LARGE // 2 - 100), **bearer("a"))]
        wait_for(listener, 1)
        held.append(stub.Search.future(image(1000), **bearer("a")))  # counted as the largest, until it is read
        wait_for(listener, 2)
        third = [stub.Search.future(image(LARGE // 2 - 100), **bearer("a")) for _ in range(2)]
        assert {call.code() for call in third} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        held.append(stub.Describe.future(pb.DescribeRequest(), **bearer("a")))
        held.append(stub.Search.future(image(LARGE // 2 - 100), **bearer("b")))
        wait_for(listener, 4)
        waiting = stub.Search.future(image(LARGE // 2 - 100), **bearer("a"))
        time.sleep(0.1)
        listener.loop.call_soon_threadsafe(listener.released.set)
        for call in (*held, waiting):
            call.result(10)
        wait_until_free(listener)


@pytest.mark.parametrize("compression", [grpc.Compression.NoCompression, grpc.Compression.Gzip])
def test_a_message_too_large_for_its_method_is_refused_unparsed(
    settings: ListenerSettings, compression: grpc.Compression
) -> None:
    with listen(settings) as (listener, channel):
        stub = pb_grpc.RetrievalServiceStub(channel)  # type: ignore[no-untyped-call]
        with pytest.raises(grpc.RpcError) as caught:
            stub.Search(image(LARGE), compression=compression, **bearer("a"))
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT  # type: ignore[attr-defined]
        given = image(LARGE).ByteSize()
        said = caught.value.details()  # type: ignore[attr-defined]
        assert f"{given} bytes, the limit is {settings.max_message['Search']} for Search; send less" in said
        many = pb.DeleteRequest(ids=["i" * 500] * 1000)
        assert code_of(lambda: stub.Delete(many, **bearer("w"))) == grpc.StatusCode.INVALID_ARGUMENT
        assert listener.received == []


def test_large_honest_requests_pass(settings: ListenerSettings) -> None:
    with listen(settings._replace(max_bytes=1 << 28, bytes_per_s=1 << 28)) as (_, channel):
        stub = pb_grpc.RetrievalServiceStub(channel)  # type: ignore[no-untyped-call]
        assert code_of(lambda: stub.SearchBatch(images(*[5_000_000] * 8), **bearer("a"))) == grpc.StatusCode.OK
        assert code_of(lambda: stub.Embed(pb.EmbedRequest(images=[bytes(5 << 20)] * 8), **bearer("a"))) == OK
        vectors = pb.SearchBatchRequest(queries=[pb.Query(vector=bytes(4 * 2048))] * 256)
        assert code_of(lambda: stub.SearchBatch(vectors, **bearer("a"))) == OK
        filters = [pb.Filter(column="c", values=["v" * 1000] * 1000)]
        full = pb.SearchRequest(query=pb.Query(image=bytes(10_000_000)), options=pb.SearchOptions(filters=filters))
        assert code_of(lambda: stub.Search(full, **bearer("a"))) == OK
        batches = [pb.SearchStreamRequest(batch=vectors)] * 20
        assert len(list(stub.SearchStream(iter(batches), **bearer("a")))) == 20
        rows = [
            pb.Row(id=str(row), vector=bytes(8192), metadata=dict.fromkeys(map(str, range(100)), "x" * 30))
            for row in range(256)
        ]
        assert code_of(lambda: stub.Upsert(pb.UpsertRequest(rows=rows), **bearer("w"))) == OK


def test_large_messages_of_one_caller_are_passed_on_at_a_pace(settings: ListenerSettings) -> None:
    with listen(settings._replace(max_calls=9, max_bytes=1 << 28, bytes_per_s=20 << 20)) as (listener, channel):
        stub = pb_grpc.RetrievalServiceStub(channel)  # type: ignore[no-untyped-call]
        start = time.monotonic()
        large = [stub.Search.future(image(10_000_000), **bearer("a")) for _ in range(4)]
        for call in [stub.Search.future(image(1000), **bearer(name)) for name in ("a", "b") * 3]:
            call.result(5)
        small_s = time.monotonic() - start
        for call in large:
            call.result(10)
        assert time.monotonic() - start > 1.4 > small_s
        assert len(listener.received) == 10


def test_after_a_message_beyond_a_bound_a_caller_has_one_call_at_a_time(
    settings: ListenerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(front_share, "WAIT_S", 0.3)
    with listen(settings._replace(max_calls=9, bytes_per_s=1 << 28)) as (listener, channel):
        stub = pb_grpc.RetrievalServiceStub(channel)  # type: ignore[no-untyped-call]
        assert code_of(lambda: stub.Search(image(LARGE), **bearer("a"))) == grpc.StatusCode.INVALID_ARGUMENT
        listener.released.clear()
        held = [stub.Search.future(image(1), **bearer("a"))]
        wait_for(listener, 1)
        assert code_of(lambda: stub.Search(image(1), **bearer("a"))) == grpc.StatusCode.RESOURCE_EXHAUSTED
        held += [stub.Search.future(image(1), **bearer("b")), stub.Describe.future(pb.DescribeRequest(), **bearer("a"))]
        wait_for(listener, 3)
        listener.loop.call_soon_threadsafe(listener.released.set)
        for call in held:
            call.result(10)
        assert code_of(lambda: stub.Search(image(1), **bearer("a"))) == OK


def test_a_message_of_very_many_parts_is_refused_unparsed(settings: ListenerSettings) -> None:
    with listen(settings) as (listener, channel):
        stub = pb_grpc.RetrievalServiceStub(channel)  # type: ignore[no-untyped-call]
        empty = pb.SearchBatchRequest(queries=[pb.Query()] * 300_000)
        values = [pb.Filter(column="c", values=["v"] * 300_000)]
        filters = pb.SearchBatchRequest(options=pb.SearchOptions(filters=values))
        for request in (empty, filters):
            with pytest.raises(grpc.RpcError) as caught:
                stub.SearchBatch(request, **bearer("a"))
            assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT  # type: ignore[attr-defined]
            assert "more than 100000 fields; send fewer" in caught.value.details()  # type: ignore[attr-defined]
        assert listener.received == []


def test_bytes_that_are_no_message_are_invalid(settings: ListenerSettings) -> None:
    with listen(settings) as (_, channel):
        send = channel.unary_unary("/lookalike.v1.RetrievalService/Search")
        for content in (b"\xff" * 10, b"\x0a\xff\xff\xff\xff\x0f", b"\xff" * 100_000, b"\x0b" * 100_000):
            with pytest.raises(grpc.RpcError) as caught:
                send(content, **bearer("a"))
            assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT  # type: ignore[attr-defined]
            assert "no request of Search" in caught.value.details()  # type: ignore[attr-defined]


def test_a_stream_with_a_batch_too_large_says_so(settings: ListenerSettings) -> None:
    with listen(settings) as (listener, channel):
        stub = pb_grpc.RetrievalServiceStub(channel)  # type: ignore[no-untyped-call]
        batches = [pb.SearchStreamRequest(batch=images(size)) for size in (1, settings.max_message["SearchStream"])]
        call = stub.SearchStream(iter(batches), **bearer("a"))
        next(call)
        with pytest.raises(grpc.RpcError) as caught:
            next(call)
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT  # type: ignore[attr-defined]
        assert "for SearchStream; send less" in caught.value.details()  # type: ignore[attr-defined]
        wait_until_free(listener)


def test_without_tenants_callers_count_by_their_address() -> None:
    settings = ListenerSettings(max_calls=2)
    with listen(settings) as (listener, channel):
        stub = pb_grpc.RetrievalServiceStub(channel)  # type: ignore[no-untyped-call]
        listener.released.clear()
        one, other = ({"metadata": [("x-forwarded-for", source)], "timeout": 10} for source in ("10.0.0.1", "10.0.0.2"))
        held = [stub.Search.future(image(1), **one) for _ in range(2)]
        wait_for(listener, 2)
        assert code_of(lambda: stub.Search(image(1), **one)) == grpc.StatusCode.RESOURCE_EXHAUSTED
        held.append(stub.Search.future(image(1), **other))
        wait_for(listener, 3)
        listener.loop.call_soon_threadsafe(listener.released.set)
        for call in held:
            call.result(10)


def test_a_call_that_sends_no_message_ends(settings: ListenerSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front_listener, "READ_S", 0.2)
    with listen(settings) as (_, channel):
        silent = channel.stream_unary(
            "/lookalike.v1.RetrievalService/Search", request_serializer=pb.SearchRequest.SerializeToString
        )
        waiting = threading.Event()

        def nothing() -> Iterator[Any]:
            waiting.wait(10)
            yield from ()

        start = time.monotonic()
        assert code_of(lambda: silent(nothing(), **bearer("a"))) == grpc.StatusCode.DEADLINE_EXCEEDED
        assert time.monotonic() - start < 5
        waiting.set()
        assert code_of(lambda: silent(iter([]), **bearer("a"))) == grpc.StatusCode.INVALID_ARGUMENT


def test_settings_that_cannot_be_read_change_nothing(settings: ListenerSettings) -> None:
    news: list[Any] = [settings]
    guard = Guard(lambda: news[0])
    guard.refresh()
    news[0] = settings._replace(tenants="/no/tenants.yaml")
    guard.refresh()
    assert guard.settings == settings
