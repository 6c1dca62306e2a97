"""The Python clients of the retrieval service, blocking and asyncio. They need only grpcio, protobuf and numpy.

    with Client("127.0.0.1:9000") as client:
        for hit in client.search(image=open("chair.jpg", "rb").read(), k=5).hits:
            print(hit.id, hit.score, hit.metadata)

``lookalike.serve.local.LocalClient`` has the same interface over an index on disk, without a server.
"""

import asyncio
import time
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator, Sequence
from typing import Any, Unpack

import grpc
import grpc.aio

from lookalike.serve.client.attempts import Attempts, to_error
from lookalike.serve.client.credentials import ClientTls, call_metadata, open_channel
from lookalike.serve.client.results import (
    Description,
    Embeddings,
    FloatArray,
    Query,
    SearchResult,
    SearchSettings,
    StoredRow,
    from_batch,
    from_description,
    from_embeddings,
    from_response,
    from_stream,
    one_of,
    to_batch,
    to_options,
    to_query,
    to_upsert,
)
from lookalike.serve.proto import retrieval_pb2 as pb
from lookalike.serve.proto import retrieval_pb2_grpc as pb_grpc
from lookalike.serve.wire.errors import RetrievalError

DEFAULT_ADDRESS = "127.0.0.1:9000"
MAX_MESSAGE_BYTES = 64 << 20
RETRY = """{"methodConfig": [{
    "name": [{"service": "lookalike.v1.RetrievalService"}],
    "retryPolicy": {"maxAttempts": 3, "initialBackoff": "0.05s", "maxBackoff": "1s", "backoffMultiplier": 2.0,
                    "retryableStatusCodes": ["UNAVAILABLE"]}
}]}"""
"""gRPC service config: a call that found no server is repeated within its deadline. All calls are reads, or writes
that may be made twice. ``lookalike.serve.client.attempts`` repeats calls for other reasons."""
OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.enable_retries", 1),
    ("grpc.lb_policy_name", "round_robin"),
    ("grpc.service_config", RETRY),
]


class _Connection:
    """Base of both clients: address, credentials, channel."""

    _grpc: Any = grpc

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        timeout_s: float = 30.0,
        application: str = "",
        token: str | None = None,
        tls: ClientTls | None = None,
        channel: grpc.Channel | grpc.aio.Channel | None = None,
    ) -> None:
        self._metadata = call_metadata(application, token)
        self.address, self.timeout_s = address, timeout_s
        self._channel: Any = open_channel(self._grpc, address, tls, OPTIONS) if channel is None else channel
        self._stub = pb_grpc.RetrievalServiceStub(self._channel)  # type: ignore[no-untyped-call]


class Client(_Connection):
    """Blocking client; safe to share between threads. Every method raises ``RetrievalError`` with a gRPC status.

    ``address`` is ``host:port``; ``timeout_s`` is the deadline of each call in seconds; ``application`` names the Serve
    application when several share the port; ``token`` is the bearer token, sent in clear text without ``tls``;
    ``channel`` replaces the gRPC channel, for interceptors.
    """

    def search(
        self,
        *,
        image: bytes | None = None,
        vector: FloatArray | None = None,
        image_id: str | None = None,
        **settings: Unpack[SearchSettings],
    ) -> SearchResult:
        """Return the ``k`` stored images nearest to one query: exactly one of ``image``, ``vector`` and ``image_id``.

        ``vector`` is float [dim], normalised or not; ``SearchSettings`` lists the other arguments.
        """
        query = to_query(one_of(image, vector, image_id))
        return from_response(self._call("Search", pb.SearchRequest(query=query, options=to_options(settings))))

    def search_batch(
        self, queries: Sequence[Query] | FloatArray, **settings: Unpack[SearchSettings]
    ) -> list[SearchResult]:
        """Return one result per query, in one round trip; a float [n, dim] array is n vector queries."""
        return from_batch(self._call("SearchBatch", to_batch(queries, settings)))

    def search_stream(
        self, batches: Iterable[Sequence[Query] | FloatArray], **settings: Unpack[SearchSettings]
    ) -> Iterator[list[SearchResult] | RetrievalError]:
        """Yield the results of each batch, in order, over one call without a deadline.

        A batch that fails yields its error instead. ``batches`` may be endless: it is read as the answers are.
        """
        requests = (pb.SearchStreamRequest(batch=to_batch(queries, settings)) for queries in batches)
        try:
            yield from map(from_stream, self._stream(requests))
        except grpc.RpcError as error:
            raise to_error(error) from None

    def embed(self, images: Sequence[bytes]) -> Embeddings:
        """Return the vectors of encoded images, one row per image."""
        return from_embeddings(self._call("Embed", pb.EmbedRequest(images=images)))

    def feedback(self, request_id: str, kind: str, *, id: str = "") -> None:
        """Report what a user did with an answer.

        ``request_id`` comes from ``SearchInfo``; ``kind`` is a short word such as "click"; ``id`` is the hit that the
        user acted on, if any.
        """
        self._call("Feedback", pb.FeedbackRequest(request_id=request_id, id=id, kind=kind))

    def describe(self) -> Description:
        """Describe what the service serves."""
        return from_description(self._call("Describe", pb.DescribeRequest()))

    def upsert(self, rows: Iterable[StoredRow], *, model_fingerprint: str = "") -> int:
        """Store images, or replace those with the same ids. Return the number of the write, which is then durable."""
        return int(self._call("Upsert", to_upsert(rows, model_fingerprint)).write)

    def delete(self, ids: Iterable[str]) -> int:
        """Remove images by id. Return the number of the write, which is then durable."""
        return int(self._call("Delete", pb.DeleteRequest(ids=ids)).write)

    def switch(
        self,
        index: str,
        *,
        plan: str = "",
        encoder: str = "",
        includes_writes: int | None = None,
        timeout_s: float = 600.0,
    ) -> pb.Generation:
        """Serve another index once all replicas have loaded it; see ``SwitchRequest`` in ``retrieval.proto``."""
        request = pb.SwitchRequest(
            index=index, plan=plan, encoder=encoder, includes_writes=includes_writes, timeout_s=round(timeout_s)
        )
        response: pb.SwitchResponse = self._admin("Switch", request, timeout_s)
        return response.current

    def rollback(self, *, timeout_s: float = 600.0) -> pb.Generation:
        """Serve the previous index again."""
        response: pb.RollbackResponse = self._admin("Rollback", pb.RollbackRequest(), timeout_s)
        return response.current

    def compact(self, *, timeout_s: float = 3600.0) -> pb.Generation:
        """Build an index that contains all writes, and serve it."""
        request = pb.CompactRequest(timeout_s=round(timeout_s))
        response: pb.CompactResponse = self._admin("Compact", request, timeout_s)
        return response.current

    def backup(self, path: str, *, timeout_s: float = 600.0) -> int:
        """Copy writes and state into a new file at an absolute path on the writer's machine.

        Returns the number of the last write in it; writes that arrive meanwhile wait.
        """
        response: pb.BackupResponse = self._admin("Backup", pb.BackupRequest(path=path), timeout_s)
        return response.last_write

    def status(self) -> pb.StatusResponse:
        """Return what is served and loaded, and how many rows wait for compaction."""
        response: pb.StatusResponse = self._admin("Status", pb.StatusRequest(), self.timeout_s)
        return response

    def wait_ready(self, timeout_s: float = 60.0) -> None:
        """Return when the address accepts connections; raise UNAVAILABLE after ``timeout_s`` seconds."""
        try:
            grpc.channel_ready_future(self._channel).result(timeout=timeout_s)
        except grpc.FutureTimeoutError:
            message = f"nothing answers at {self.address} after {timeout_s:g} s; start it with `lookalike serve`"
            raise RetrievalError(grpc.StatusCode.UNAVAILABLE, message) from None

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _stream(self, requests: Iterator[pb.SearchStreamRequest]) -> Iterator[pb.SearchStreamResponse]:
        answers: Iterator[pb.SearchStreamResponse] = self._stub.SearchStream(requests, metadata=self._metadata)
        return answers

    def _call(self, method: str, request: Any) -> Any:
        attempts = Attempts(self.timeout_s)
        while True:
            try:
                return getattr(self._stub, method)(request, timeout=attempts.left_s, metadata=self._metadata)
            except grpc.RpcError as error:
                pause_s = attempts.failed(error)
            time.sleep(pause_s)

    def _admin(self, method: str, request: Any, timeout_s: float) -> Any:
        stub = pb_grpc.AdminServiceStub(self._channel)  # type: ignore[no-untyped-call]
        try:
            return getattr(stub, method)(request, timeout=timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise to_error(error) from None


class AsyncClient(_Connection):
    """The same for asyncio. Methods are coroutines; cancelling one also ends its call in the service."""

    _grpc = grpc.aio

    async def search(
        self,
        *,
        image: bytes | None = None,
        vector: FloatArray | None = None,
        image_id: str | None = None,
        **settings: Unpack[SearchSettings],
    ) -> SearchResult:
        query = to_query(one_of(image, vector, image_id))
        return from_response(await self._call("Search", pb.SearchRequest(query=query, options=to_options(settings))))

    async def search_batch(
        self, queries: Sequence[Query] | FloatArray, **settings: Unpack[SearchSettings]
    ) -> list[SearchResult]:
        return from_batch(await self._call("SearchBatch", to_batch(queries, settings)))

    async def search_stream(
        self, batches: AsyncIterable[Sequence[Query] | FloatArray], **settings: Unpack[SearchSettings]
    ) -> AsyncIterator[list[SearchResult] | RetrievalError]:
        requests = (pb.SearchStreamRequest(batch=to_batch(queries, settings)) async for queries in batches)
        call = self._stub.SearchStream(requests, metadata=self._metadata)
        try:
            async for reply in call:
                yield from_stream(reply)
        except grpc.RpcError as error:
            raise to_error(error) from None
        finally:
            call.cancel()

    async def embed(self, images: Sequence[bytes]) -> Embeddings:
        return from_embeddings(await self._call("Embed", pb.EmbedRequest(images=images)))

    async def feedback(self, request_id: str, kind: str, *, id: str = "") -> None:
        await self._call("Feedback", pb.FeedbackRequest(request_id=request_id, id=id, kind=kind))

    async def describe(self) -> Description:
        return from_description(await self._call("Describe", pb.DescribeRequest()))

    async def upsert(self, rows: Iterable[StoredRow], *, model_fingerprint: str = "") -> int:
        return int((await self._call("Upsert", to_upsert(rows, model_fingerprint))).write)

    async def delete(self, ids: Iterable[str]) -> int:
        return int((await self._call("Delete", pb.DeleteRequest(ids=ids))).write)

    async def close(self) -> None:
        await self._channel.close()

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _call(self, method: str, request: Any) -> Any:
        attempts = Attempts(self.timeout_s)
        while True:
            try:
                return await getattr(self._stub, method)(request, timeout=attempts.left_s, metadata=self._metadata)
            except grpc.RpcError as error:
                pause_s = attempts.failed(error)
            await asyncio.sleep(pause_s)
