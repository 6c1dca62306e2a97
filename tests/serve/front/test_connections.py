"""Connections that say nothing: bounded by source and in all, closed soon; HAProxy as it is run, with shorter times."""

import socket
import ssl
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from lookalike.serve.app import free_port
from lookalike.serve.client import Client, ClientTls
from lookalike.serve.front import tls as front_tls
from lookalike.serve.front.tls import proxy
from lookalike.serve.proto import retrieval_pb2 as pb
from lookalike.serve.proto import retrieval_pb2_grpc as pb_grpc
from lookalike.serve.settings.security import Tls
from tests.serve.front.certificates import Authority

VECTOR = np.ones(8, np.float32)
QUIET_S = 1
SLOW_S = 2.5
"""Longer than a caller may stay quiet before its first call."""


class Backend(pb_grpc.RetrievalServiceServicer):
    """Answers at once, for k=2 slowly."""

    def Search(self, request: pb.SearchRequest, context: grpc.ServicerContext) -> pb.SearchResponse:
        time.sleep(SLOW_S if request.options.k == 2 else 0)
        return pb.SearchResponse(hits=[pb.Hit(id="hit")])

    def SearchStream(self, requests: Iterator[pb.SearchStreamRequest], context: grpc.ServicerContext) -> Any:
        for request in requests:
            yield pb.SearchStreamResponse(tag=request.tag, batch=pb.SearchBatchResponse())


class Health(health_pb2_grpc.HealthServicer):
    """Always serving."""

    def Check(self, request: health_pb2.HealthCheckRequest, context: grpc.ServicerContext) -> Any:
        return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("certificates"), "authority")


@pytest.fixture
def address(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, int]]:
    """The TLS port of a proxy that takes 60 connections, 20 of one source."""
    monkeypatch.setattr(front_tls, "QUIET_S", QUIET_S)
    certificate, key = authority.issue("server")
    files = {"certificate": str(certificate), "key": str(key)}
    tls = Tls(**files, port=free_port(), max_connections=60, source_connections=20, source_connections_per_s=50)
    server = grpc.server(ThreadPoolExecutor(4))
    pb_grpc.add_RetrievalServiceServicer_to_server(Backend(), server)  # type: ignore[no-untyped-call]
    health_pb2_grpc.add_HealthServicer_to_server(Health(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with proxy(tls, port) as running:
        host, _, number = running.address.rpartition(":")
        yield host, int(number)
    server.stop(None).wait()


def connect(address: tuple[str, int], source: str, *, encrypted: bool = False) -> socket.socket:
    plain = socket.create_connection(address, timeout=5, source_address=(source, 0))
    if not encrypted:
        return plain
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    return context.wrap_socket(plain)


def seconds_open(connection: socket.socket) -> float:
    """Seconds until the other side closes; what it sends before is read."""
    start = time.monotonic()
    connection.settimeout(20)
    try:
        while connection.recv(4096):
            pass
    except (ConnectionError, ssl.SSLError):
        pass
    return time.monotonic() - start


def search(address: tuple[str, int], authority: Authority, **options: Any) -> float:
    """Seconds that a search on a new connection takes."""
    start = time.monotonic()
    with Client(f"{address[0]}:{address[1]}", tls=ClientTls(authority.path), **options) as client:
        assert client.search(vector=VECTOR).ids == ["hit"]
    return time.monotonic() - start


@pytest.mark.parametrize("encrypted", [False, True])
def test_quiet_connections_of_one_source_shut_nobody_out(
    address: tuple[str, int], authority: Authority, encrypted: bool
) -> None:
    with ExitStack() as stack:
        for _ in range(80):
            try:
                stack.enter_context(connect(address, "127.0.0.2", encrypted=encrypted))
            except (OSError, ssl.SSLError):
                continue  # refused: beyond its source's bound
        assert search(address, authority) < 1


@pytest.mark.parametrize("encrypted", [False, True])
def test_quiet_connections_are_closed_and_make_room_for_their_own_source(
    address: tuple[str, int], authority: Authority, encrypted: bool
) -> None:
    connections = [connect(address, "127.0.0.1", encrypted=encrypted) for _ in range(20)]
    assert all(seconds_open(each) < QUIET_S + 2 for each in connections)
    assert search(address, authority) < 1
    refused = []
    for _ in range(25):
        try:
            refused.append(connect(address, "127.0.0.3", encrypted=encrypted))
        except (OSError, ssl.SSLError):
            break
    else:
        assert min(map(seconds_open, refused)) < QUIET_S / 2


def test_a_slow_handshake_and_half_a_preface_end_in_time(address: tuple[str, int]) -> None:
    halting = connect(address, "127.0.0.1")
    halting.sendall(b"\x16\x03\x01")
    half = connect(address, "127.0.0.1", encrypted=True)
    half.sendall(b"PRI * HTTP/2")
    whole = connect(address, "127.0.0.1", encrypted=True)
    whole.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))
    assert all(seconds_open(each) < 2 * QUIET_S + 2 for each in (halting, half, whole))


def test_slow_answers_and_streams_that_pause_are_left_alone(address: tuple[str, int], authority: Authority) -> None:
    with Client(f"{address[0]}:{address[1]}", tls=ClientTls(authority.path)) as client:
        assert client.search(vector=VECTOR, k=2).ids == ["hit"]

        def batches() -> Iterator[list[Any]]:
            yield [VECTOR]
            time.sleep(SLOW_S)
            yield [VECTOR]

        assert len(list(client.search_stream(batches()))) == 2


def test_without_a_token_large_and_compressed_messages_do_not_arrive(
    address: tuple[str, int], authority: Authority
) -> None:
    credentials = grpc.ssl_channel_credentials(Path(authority.path).read_bytes())
    with grpc.secure_channel(f"{address[0]}:{address[1]}", credentials) as channel:
        stub = health_pb2_grpc.HealthStub(channel)  # type: ignore[no-untyped-call]
        small, large = (health_pb2.HealthCheckRequest(service="x" * size) for size in (100, 1 << 20))
        assert stub.Check(small, timeout=5).status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError) as caught:
            stub.Check(large, timeout=2)
        assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        with pytest.raises(grpc.RpcError) as caught:
            stub.Check(large, timeout=5, compression=grpc.Compression.Gzip)
        assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.UNIMPLEMENTED, "send it uncompressed")
        assert stub.Check(small, timeout=5).status == health_pb2.HealthCheckResponse.SERVING
