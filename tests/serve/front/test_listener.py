"""The guard before Serve's gRPC listener: calls are refused before their messages are read, and bounded by tenant."""

import asyncio
import resource
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
from lookalike.serve.front.listener import Guard, ListenerSettings, add_guarded
from lookalike.serve.front.tenants import hash_token
from lookalike.serve.proto import retrieval_pb2 as pb
from lookalike.serve.proto import retrieval_pb2_grpc as pb_grpc

LARGE = 24 << 20
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


def code_of(call: Any) -> grpc.StatusCode:
    try:
        call()
    except grpc.RpcError as error:
        return error.code()  # type: ignore[no-any-return, attr-defined]
    return grpc.StatusCode.OK


@pytest.fixture
def settings(tmp_path: Path) -> ListenerSettings:
    tenants = [{"name": name, "token_sha256": [hash_token(name)], "role": "read"} for name in ("a", "b")]
    (tmp_path / "tenants.yaml").write_text(yaml.safe_dump({"tenants": tenants}))
    return ListenerSettings(tenants=str(tmp_path / "tenants.yaml"), max_calls=3, max_bytes=LARGE)


def image(size: int) -> pb.SearchRequest:
    return pb.SearchRequest(query=pb.Query(image=bytes(size)))


@pytest.mark.parametrize("compression", [grpc.Compression.NoCompression, grpc.Compression.Gzip])
def test_the_message_of_a_caller_without_a_token_is_not_read(
    settings: ListenerSettings, compression: grpc.Compression
) -> None:
    with listen(settings) as (listener, channel):
        stub = pb_grpc.RetrievalServiceStub(channel)  # type: ignore[no-untyped-call]
        admin = pb_grpc.AdminServiceStub(channel)  # type: ignore[no-untyped-call]
        large = image(LARGE)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for metadata in ([], [("authorization", "Bearer c")]):
            call = lambda given=metadata: stub.Search(large, metadata=given, compression=compression)  # noqa: E731
            assert code_of(call) == grpc.StatusCode.UNAUTHENTICATED
        assert code_of(lambda: admin.Status(pb.StatusRequest(), **bearer("a"))) == grpc.StatusCode.PERMISSION_DENIED
        assert code_of(lambda: list(stub.SearchStream(iter([]), timeout=5))) == grpc.StatusCode.UNAUTHENTICATED
        assert listener.received == []
        copies = 3 if compression == grpc.Compression.NoCompression else 2  # the client's own
        assert 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) < copies * LARGE
        assert code_of(lambda: stub.Search(large, **bearer("a"))) == grpc.StatusCode.OK
        assert len(listener.received) == 1


def test_health_needs_no_token_and_takes_small_messages(settings: ListenerSettings) -> None:
    with listen(settings) as (listener, channel):
        stub = health_pb2_grpc.HealthStub(channel)  # type: ignore[no-untyped-call]
        assert code_of(lambda: stub.Check(health_pb2.HealthCheckRequest(service="x"))) == grpc.StatusCode.OK
        large = health_pb2.HealthCheckRequest(service="x" * 5000)
        assert code_of(lambda: stub.Check(large)) == grpc.StatusCode.INVALID_ARGUMENT
        assert len(listener.received) == 1


def test_calls_and_bytes_of_a_tenant_are_bounded_and_leave_others_alone(settings: ListenerSettings) -> None:
    with listen(settings) as (listener, channel):
        stub = pb_grpc.RetrievalServiceStub(channel)  # type: ignore[no-untyped-call]
        listener.released.clear()
        held = [stub.Search.future(image(LARGE // 3), **bearer("a")) for _ in range(2)]
        while len(listener.received) < 2:
            time.sleep(0.01)
        exhausted = grpc.StatusCode.RESOURCE_EXHAUSTED
        assert code_of(lambda: stub.Search(image(LARGE // 2), **bearer("a"))) == exhausted  # bytes
        held.append(stub.Search.future(image(1), **bearer("a")))
        while len(listener.received) < 3:
            time.sleep(0.01)
        assert code_of(lambda: stub.Search(image(1), **bearer("a"))) == exhausted  # calls
        other = stub.Search.future(image(LARGE), **bearer("b"))
        while len(listener.received) < 4:
            time.sleep(0.01)
        health = health_pb2_grpc.HealthStub(channel)  # type: ignore[no-untyped-call]
        checked = health.Check.future(health_pb2.HealthCheckRequest())
        listener.loop.call_soon_threadsafe(listener.released.set)
        for call in (*held, other, checked):
            call.result(10)
        assert code_of(lambda: stub.Search(image(LARGE), **bearer("a"))) == grpc.StatusCode.OK
        assert listener.guard.calls.total() == listener.guard.sizes.total() == 0
        assert listener.guard.refused == {("Search", "RESOURCE_EXHAUSTED"): 2}


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
