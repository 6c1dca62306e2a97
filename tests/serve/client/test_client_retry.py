"""The clients repeat a call that found no server, lost its replica or was told to come back later."""

import asyncio
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
import pytest

from lookalike.serve.client import AsyncClient, Client
from lookalike.serve.proto import retrieval_pb2 as pb
from lookalike.serve.proto import retrieval_pb2_grpc as pb_grpc
from lookalike.serve.wire.errors import RetrievalError


class Flaky(pb_grpc.RetrievalServiceServicer):
    """Fails the first ``failures`` calls with ``code``."""

    def __init__(self, failures: int, code: grpc.StatusCode, details: str = "not now") -> None:
        self.failures, self.code, self.calls, self.details = failures, code, 0, details

    def Delete(self, request: Any, context: Any) -> Any:
        self.Describe(request, context)
        return pb.DeleteResponse(write=5)

    def Describe(self, request: Any, context: Any) -> Any:
        self.calls += 1
        if self.calls <= self.failures:
            context.abort(self.code, self.details)
        return pb.DescribeResponse()


@pytest.mark.parametrize(
    ("failures", "code", "calls", "answers"),
    [
        (2, grpc.StatusCode.UNAVAILABLE, 3, True),
        (9, grpc.StatusCode.UNAVAILABLE, 3, False),
        (1, grpc.StatusCode.INVALID_ARGUMENT, 1, False),
    ],
)
def test_unavailable_is_repeated_twice_and_nothing_else(
    failures: int, code: grpc.StatusCode, calls: int, answers: bool
) -> None:
    servicer = Flaky(failures, code)
    with served(servicer) as address, Client(address, timeout_s=10) as client:
        if answers:
            client.describe()
        else:
            with pytest.raises(RetrievalError):
                client.describe()
    assert servicer.calls == calls


@contextmanager
def served(servicer: Flaky) -> Iterator[str]:
    server = grpc.server(ThreadPoolExecutor(2))
    pb_grpc.add_RetrievalServiceServicer_to_server(servicer, server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None)


DIED = (grpc.StatusCode.INTERNAL, "The actor died unexpectedly before finishing this task.")
RESET = (grpc.StatusCode.INTERNAL, "The actor 3c42c5e04b18 is unavailable: RPC error: recvmsg:Connection reset by peer")
SHED = (grpc.StatusCode.RESOURCE_EXHAUSTED, "64 requests wait; retry after 30 ms")


@pytest.mark.parametrize(
    ("failures", "trouble", "calls", "code"),
    [
        (2, DIED, 3, None),
        (2, RESET, 3, None),
        (9, DIED, 5, grpc.StatusCode.UNAVAILABLE),
        (2, SHED, 3, None),
        (9, SHED, 5, grpc.StatusCode.RESOURCE_EXHAUSTED),
        (1, (grpc.StatusCode.RESOURCE_EXHAUSTED, "the quota is used up"), 1, grpc.StatusCode.RESOURCE_EXHAUSTED),
        (1, (grpc.StatusCode.INTERNAL, "KeyError: 'x'"), 1, grpc.StatusCode.INTERNAL),
        (1, (grpc.StatusCode.RESOURCE_EXHAUSTED, "retry after 60000 ms"), 1, grpc.StatusCode.RESOURCE_EXHAUSTED),
    ],
)
def test_dead_replicas_and_full_queues(
    failures: int, trouble: tuple[grpc.StatusCode, str], calls: int, code: grpc.StatusCode | None
) -> None:
    async def delete(address: str) -> int:
        async with AsyncClient(address, timeout_s=20) as client:
            return await client.delete(["x"])

    def delete_blocking(address: str) -> int:
        with Client(address, timeout_s=20) as client:
            return client.delete(["x"])

    for way in (delete_blocking, lambda address: asyncio.run(delete(address))):
        servicer = Flaky(failures, *trouble)
        with served(servicer) as address:
            start = time.monotonic()
            if code is None:
                assert way(address) == 5
                assert time.monotonic() - start >= (0.06 if trouble is SHED else 0.05)
            else:
                with pytest.raises(RetrievalError) as caught:
                    way(address)
                assert caught.value.code == code
        assert servicer.calls == calls


def test_an_answer_too_large_for_the_client_says_what_to_ask_for() -> None:
    class Wordy(Flaky):
        def Describe(self, request: Any, context: Any) -> Any:
            return pb.DescribeResponse(version="x" * 1000)

    with served(Wordy(0, grpc.StatusCode.OK)) as address:
        narrow = grpc.insecure_channel(address, options=[("grpc.max_receive_message_length", 100)])
        with (
            Client(address, channel=narrow) as client,
            pytest.raises(RetrievalError, match=r"RESOURCE_EXHAUSTED.*larger than max.*ask for a smaller k"),
        ):
            client.describe()
