"""The client repeats a call that found no server, as its gRPC service config says."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

from lookalike.serve.client import Client
from lookalike.serve.errors import RetrievalError
from lookalike.serve.proto import retrieval_pb2 as pb
from lookalike.serve.proto import retrieval_pb2_grpc as pb_grpc


class Flaky(pb_grpc.RetrievalServiceServicer):
    """Fails the first ``failures`` calls with ``code``."""

    def __init__(self, failures: int, code: grpc.StatusCode) -> None:
        self.failures, self.code, self.calls = failures, code, 0

    def Describe(self, request: Any, context: Any) -> Any:
        self.calls += 1
        if self.calls <= self.failures:
            context.abort(self.code, "not now")
        return pb.DescribeResponse()


@pytest.mark.parametrize(
    ("failures", "code", "calls", "answers"),
    [(2, grpc.StatusCode.UNAVAILABLE, 3, True), (9, grpc.StatusCode.UNAVAILABLE, 3, False),
     (1, grpc.StatusCode.INVALID_ARGUMENT, 1, False)],
)  # fmt: skip
def test_unavailable_is_repeated_twice_and_nothing_else(
    failures: int, code: grpc.StatusCode, calls: int, answers: bool
) -> None:
    servicer, server = Flaky(failures, code), grpc.server(ThreadPoolExecutor(2))
    pb_grpc.add_RetrievalServiceServicer_to_server(servicer, server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with Client(f"127.0.0.1:{port}", timeout_s=10) as client:
            if answers:
                client.describe()
            else:
                with pytest.raises(RetrievalError):
                    client.describe()
        assert servicer.calls == calls
    finally:
        server.stop(None)
