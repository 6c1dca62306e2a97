"""The Python clients of the retrieval service, blocking and asyncio. They need only grpcio, protobuf and numpy.

    with Client("127.0.0.1:9000") as client:
        for hit in client.search(image=open("chair.jpg", "rb").read(), k=5).hits:
            print(hit.id, hit.score, hit.metadata)

``lookalike.serve.local.LocalClient`` has the same interface over an index on disk, without a server.
"""

import asyncio
import time
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator, Sequence
from math import ceil
from typing import Any, Unpack

import grpc
import grpc.aio

from lookalike import arguments
from lookalike.arguments import names_checked
from lookalike.serve.client.attempts import Attempts, to_error
from lookalike.serve.client.credentials import ClientTls, call_metadata, open_channel
from lookalike.serve.client.requests import (
    FloatArray,
    Query,
    SearchSettings,
    StoredRow,
    to_backup,
    to_batch,
    to_delete,
    to_embed,
    to_feedback,
    to_search,
    to_switch,
    to_upsert,
)
from lookalike.serve.client.results import (
    Description,
    Embeddings,
    SearchResult,
    from_batch,
    from_description,
    from_embeddings,
    from_response,
)
from lookalike.serve.client.stream import Batches, check_async_batches, check_batches
from lookalike.serve.proto import retrieval_pb2 as pb
from lookalike.serve.proto import retrieval_pb2_grpc as pb_grpc
from lookalike.serve.wire.errors import MAX_MESSAGE_BYTES, RetrievalError

DEFAULT_ADDRESS = "127.0.0.1:9000"
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

    @names_checked
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
        self.address = arguments.check_text("address", address, "give host:port as str")
        self.timeout_s = arguments.check_seconds("timeout_s", timeout_s)
        self._channel: Any = open_channel(self._grpc, address, tls, OPTIONS) if channel is None else channel
        self._stub = pb_grpc.RetrievalServiceStub(self._channel)  # type: ignore[no-untyped-call]


class Client(_Connection):
    """Blocking client; safe to share between threads.

    Every method raises ``RetrievalError`` with a gRPC status for what the service refuses or fails to do, and
    ``ArgumentError`` (a ``TypeError`` and ``ValueError``) for arguments of the wrong type or name, before it sends any.

    ``address`` is ``host:port``; ``timeout_s`` is the deadline of each call in seconds; ``application`` names the Serve
    application when several share the port; ``token`` is the bearer token, sent in clear text without ``tls``;
    ``channel`` replaces the gRPC channel, for interceptors.
    """

    @names_checked
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
        return from_response(self._call("Search", to_search(image, vector, image_id, settings)))

    @names_checked
    def search_batch(
        self, queries: Query | Sequence[Query] | FloatArray, **settings: Unpack[SearchSettings]
    ) -> list[SearchResult]:
        """Return one result per query, in one round trip; a float [n, dim] array is n vector queries, one query alone
        a batch of one."""
        return from_batch(self._call("SearchBatch", to_batch(queries, settings)))

    @names_checked
    def search_stream(
        self, batches: Iterable[Sequence[Query] | FloatArray], **settings: Unpack[SearchSettings]
    ) -> Iterator[list[SearchResult] | RetrievalError]:
        """Yield the results of each batch, in order, over one call without a deadline.

        A batch that fails yields its error instead. ``batches`` may be endless: it is read as the answers are. What it
        raises itself is raised here, after the answers to the batches before.
        """
        return self._read_stream(Batches(settings), check_batches(batches))

    def _read_stream(
        self, sent: Batches, batches: Iterable[Sequence[Query] | FloatArray]
    ) -> Iterator[list[SearchResult] | RetrievalError]:
        try:
            yield from map(sent.read, self._stream(sent.write_all(batches, self.describe)))
        except grpc.RpcError as error:
            raise to_error(error) from None
        sent.check()

    @names_checked
    def embed(self, images: bytes | Sequence[bytes]) -> Embeddings:
        """Return the vectors of one or many encoded images, one row per image."""
        return from_embeddings(self._call("Embed", to_embed(images)))

    @names_checked
    def feedback(self, request_id: str, kind: str, *, id: str = "") -> None:
        """Report what a user did with an answer.

        ``request_id`` comes from ``SearchInfo``; ``kind`` is a short word such as "click"; ``id`` is the hit that the
        user acted on, if any.
        """
        self._call("Feedback", to_feedback(request_id, kind, id))

    @names_checked
    def describe(self) -> Description:
        """Describe what the service serves."""
        return from_description(self._call("Describe", pb.DescribeRequest()))

    @names_checked
    def upsert(self, rows: StoredRow | Iterable[StoredRow], *, model_fingerprint: str = "") -> int:
        """Store one or many images, or replace those with the same ids.

        Return the number of the write, which is then durable.
        """
        return int(self._call("Upsert", to_upsert(rows, model_fingerprint)).write)

    @names_checked
    def delete(self, ids: str | Iterable[str]) -> int:
        """Remove one or many images by id. Return the number of the write, which is then durable."""
        return int(self._call("Delete", to_delete(ids)).write)

    @names_checked
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
        timeout_s = arguments.check_seconds("timeout_s", timeout_s)
        request = to_switch(index, plan, encoder, includes_writes, timeout_s)
        response: pb.SwitchResponse = self._admin("Switch", request, timeout_s)
        return response.current

    @names_checked
    def rollback(self, *, timeout_s: float = 600.0) -> pb.Generation:
        """Serve the previous index again."""
        timeout_s = arguments.check_seconds("timeout_s", timeout_s)
        response: pb.RollbackResponse = self._admin("Rollback", pb.RollbackRequest(), timeout_s)
        return response.current

    @names_checked
    def compact(self, *, timeout_s: float = 3600.0) -> pb.Generation:
        """Build an index that contains all writes, and serve it."""
        timeout_s = arguments.check_seconds("timeout_s", timeout_s)
        request = pb.CompactRequest(timeout_s=ceil(timeout_s))
        response: pb.CompactResponse = self._admin("Compact", request, timeout_s)
        return response.current

    @names_checked
    def backup(self, path: str, *, timeout_s: float = 600.0) -> int:
        """Copy writes and state into a new file at an absolute path on the writer's machine.

        Returns the number of the last write in it; writes that arrive meanwhile wait.
        """
        timeout_s = arguments.check_seconds("timeout_s", timeout_s)
        response: pb.BackupResponse = self._admin("Backup", to_backup(path), timeout_s)
        return response.last_write

    @names_checked
    def status(self) -> pb.StatusResponse:
        """Return what is served and loaded, and how many rows wait for compaction."""
        response: pb.StatusResponse = self._admin("Status", pb.StatusRequest(), self.timeout_s)
        return response

    @names_checked
    def wait_ready(self, timeout_s: float = 60.0) -> None:
        """Return when the address accepts connections; raise UNAVAILABLE after ``timeout_s`` seconds."""
        timeout_s = arguments.check_seconds("timeout_s", timeout_s)
        try:
            grpc.channel_ready_future(self._channel).result(timeout=timeout_s)
        except grpc.FutureTimeoutError:
            message = f"nothing answers at {self.address} after {timeout_s:g} s; start it with `lookalike serve`"
            raise RetrievalError(grpc.StatusCode.UNAVAILABLE, message) from None

    @names_checked
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

    @names_checked
    async def search(
        self,
        *,
        image: bytes | None = None,
        vector: FloatArray | None = None,
        image_id: str | None = None,
        **settings: Unpack[SearchSettings],
    ) -> SearchResult:
        return from_response(await self._call("Search", to_search(image, vector, image_id, settings)))

    @names_checked
    async def search_batch(
        self, queries: Query | Sequence[Query] | FloatArray, **settings: Unpack[SearchSettings]
    ) -> list[SearchResult]:
        return from_batch(await self._call("SearchBatch", to_batch(queries, settings)))

    @names_checked
    def search_stream(
        self,
        batches: AsyncIterable[Sequence[Query] | FloatArray] | Iterable[Sequence[Query] | FloatArray],
        **settings: Unpack[SearchSettings],
    ) -> AsyncIterator[list[SearchResult] | RetrievalError]:
        return self._read_stream(Batches(settings), check_async_batches(batches))

    async def _read_stream(
        self, sent: Batches, batches: AsyncIterable[Sequence[Query] | FloatArray]
    ) -> AsyncIterator[list[SearchResult] | RetrievalError]:
        call = self._stub.SearchStream(sent.write_async(batches, self.describe), metadata=self._metadata)
        try:
            async for reply in call:
                yield sent.read(reply)
        except grpc.RpcError as error:
            raise to_error(error) from None
        finally:
            call.cancel()
        sent.check()

    @names_checked
    async def embed(self, images: Sequence[bytes]) -> Embeddings:
        return from_embeddings(await self._call("Embed", to_embed(images)))

    @names_checked
    async def feedback(self, request_id: str, kind: str, *, id: str = "") -> None:
        await self._call("Feedback", to_feedback(request_id, kind, id))

    @names_checked
    async def describe(self) -> Description:
        return from_description(await self._call("Describe", pb.DescribeRequest()))

    @names_checked
    async def upsert(self, rows: StoredRow | Iterable[StoredRow], *, model_fingerprint: str = "") -> int:
        return int((await self._call("Upsert", to_upsert(rows, model_fingerprint))).write)

    @names_checked
    async def delete(self, ids: str | Iterable[str]) -> int:
        return int((await self._call("Delete", to_delete(ids))).write)

    @names_checked
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
