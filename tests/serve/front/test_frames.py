"""Floods of HTTP/2 frames, as public reports on other servers describe them, against HAProxy as it is run: the caller
loses its connection or is ignored, others are answered meanwhile, and neither process grows.
"""

import os
import ssl
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import grpc
import psutil
import pytest

from lookalike.serve.app import free_port
from lookalike.serve.front.listener import ListenerSettings
from lookalike.serve.front.tls import proxy
from lookalike.serve.proto import retrieval_pb2 as pb
from lookalike.serve.proto import retrieval_pb2_grpc as pb_grpc
from lookalike.serve.settings.security import Tls
from tests.serve.front.certificates import Authority
from tests.serve.front.test_connections import authority, connect
from tests.serve.front.test_listener import Listener

__all__ = ["authority"]
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, WINDOW_UPDATE, CONTINUATION = 0, 1, 3, 4, 6, 8, 9
END_STREAM, END_HEADERS = 1, 4
MOST_BYTES, MOST_S, GROWTH = 32 << 20, 6.0, 64 << 20
PATH = b"/lookalike.v1.RetrievalService/Search"


@pytest.fixture
def address(authority: Authority) -> Iterator[tuple[str, int]]:
    """The TLS port of a proxy before Serve's own server with its guard."""
    certificate, key = map(str, authority.issue("server"))
    tls = Tls(certificate=certificate, key=key, port=free_port(), source_calls_per_s=200)
    listener = Listener(ListenerSettings())
    with proxy(tls, listener.port) as running:
        host, _, number = running.address.rpartition(":")
        yield host, int(number)
    listener.close()


def open_channel(address: tuple[str, int], authority: Authority) -> grpc.Channel:
    credentials = grpc.ssl_channel_credentials(Path(authority.path).read_bytes())
    options = [("grpc.use_local_subchannel_pool", 1)]
    return grpc.secure_channel(f"{address[0]}:{address[1]}", credentials, options)


def search(address: tuple[str, int], authority: Authority) -> float:
    """Seconds that a search on a new connection takes."""
    start = time.monotonic()
    with open_channel(address, authority) as channel:
        pb_grpc.RetrievalServiceStub(channel).Search(pb.SearchRequest(), timeout=20)  # type: ignore[no-untyped-call]
    return time.monotonic() - start


def frame(kind: int, flags: int, stream: int, content: bytes = b"") -> bytes:
    return struct.pack(">I", len(content))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + content


def literal(name: bytes, value: bytes, *, indexed: bool = False) -> bytes:
    """A header in HPACK without Huffman codes; ``indexed`` puts it into the dynamic table."""
    size = bytes([len(value)]) if len(value) < 127 else b"\x7f" + _rest(len(value) - 127)
    return bytes([0x40 if indexed else 0, len(name)]) + name + size + value


def _rest(number: int) -> bytes:
    parts = b""
    while number >= 128:
        parts, number = parts + bytes([number & 127 | 128]), number >> 7
    return parts + bytes([number])


CALL = b"".join(
    literal(name, value)
    for name, value in (
        (b":method", b"POST"),
        (b":scheme", b"https"),
        (b":path", PATH),
        (b":authority", b"x"),
        (b"te", b"trailers"),
        (b"content-type", b"application/grpc"),
    )
)


def rapid_resets() -> Iterator[bytes]:
    """Calls that are taken back at once (CVE-2023-44487)."""
    for stream in range(1, 60_000, 2):
        yield frame(HEADERS, END_HEADERS, stream, CALL) + frame(RST_STREAM, 0, stream, struct.pack(">I", 8))


def endless_headers() -> Iterator[bytes]:
    """Headers that go on in CONTINUATION frames (CVE-2024-27316 and others)."""
    yield frame(HEADERS, 0, 1, CALL)
    while True:
        yield frame(CONTINUATION, 0, 1, literal(b"x-more", b"y" * 8000))


def empty_continuations() -> Iterator[bytes]:
    """The same without any content."""
    yield frame(HEADERS, 0, 1, CALL)
    while True:
        yield frame(CONTINUATION, 0, 1) * 1000


def headers_by_reference() -> Iterator[bytes]:
    """A large header named thousands of times by its place in the table (CVE-2016-6581)."""
    for stream in range(1, 2000, 2):
        yield frame(
            HEADERS, END_HEADERS, stream, CALL + literal(b"x-large", b"y" * 3900, indexed=True) + b"\xbe" * 9000
        )


def pings() -> Iterator[bytes]:
    """Pings whose answers nobody reads (CVE-2019-9512)."""
    while True:
        yield frame(PING, 0, 0, bytes(8)) * 1000


def settings() -> Iterator[bytes]:
    """Settings, each of which must be acknowledged (CVE-2019-9515)."""
    while True:
        yield frame(SETTINGS, 0, 0) * 1000


def empty_data() -> Iterator[bytes]:
    """A message in frames without content (CVE-2019-9518)."""
    yield frame(HEADERS, END_HEADERS, 1, CALL)
    while True:
        yield frame(DATA, 0, 1) * 1000


def windows() -> Iterator[bytes]:
    """Window updates of a byte each."""
    yield frame(HEADERS, END_HEADERS, 1, CALL)
    while True:
        yield frame(WINDOW_UPDATE, 0, 1, struct.pack(">I", 1)) * 1000


def unfinished_calls() -> Iterator[bytes]:
    """Calls that never send their message, many beyond what a connection may carry."""
    for stream in range(1, 20_000, 2):
        yield frame(HEADERS, END_HEADERS, stream, CALL)


def send(address: tuple[str, int], frames: Iterator[bytes]) -> None:
    """Send frames, and read nothing, until the other side closes or the bounds of this test are met."""
    end, sent = time.monotonic() + MOST_S, 0
    with suppress(OSError, ssl.SSLError), connect(address, "127.0.0.2", encrypted=True) as connection:
        connection.settimeout(1)
        connection.sendall(PREFACE + frame(SETTINGS, 0, 0))
        for part in frames:
            connection.sendall(part)
            sent += len(part)
            if sent > MOST_BYTES or time.monotonic() > end:
                return


def used_bytes() -> int:
    """Memory of this process, which holds the backend, and of its children, HAProxy among them."""
    own = psutil.Process(os.getpid())
    return sum(process.memory_info().rss for process in [own, *own.children(recursive=True)])


FLOODS = [
    rapid_resets,
    endless_headers,
    empty_continuations,
    headers_by_reference,
    pings,
    settings,
    empty_data,
    windows,
    unfinished_calls,
]


def test_calls_of_one_source_are_bounded_and_told_so(address: tuple[str, int], authority: Authority) -> None:
    with open_channel(address, authority) as channel:
        stub = pb_grpc.RetrievalServiceStub(channel)  # type: ignore[no-untyped-call]
        calls = [stub.Search.future(pb.SearchRequest()) for _ in range(300)]
        assert {call.code() for call in calls} == {grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED}
        refused = next(call for call in calls if call.code() != grpc.StatusCode.OK)
        assert "more than 200 calls in a second; slow down, and retry after 2000 ms" in refused.details()
    time.sleep(2.1)
    assert search(address, authority) < 2


@pytest.mark.parametrize("flood", FLOODS)
def test_a_flood_of_frames_leaves_others_alone(
    address: tuple[str, int], authority: Authority, flood: "type[Iterator[bytes]]"
) -> None:
    search(address, authority)
    before = used_bytes()
    thread = threading.Thread(target=send, args=(address, flood()))
    thread.start()
    slowest_s = search(address, authority)
    while thread.is_alive():
        slowest_s = max(slowest_s, search(address, authority))
        time.sleep(0.2)
    assert slowest_s < 2
    assert search(address, authority) < 2
    assert used_bytes() - before < GROWTH
