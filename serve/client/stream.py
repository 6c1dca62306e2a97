"""The batches of one stream, as a client sends them and reads their answers.

A batch above the service's bound would end the stream there, so it is refused here, in its place. The bound is asked of
the service when a batch is first large enough for it to matter.
"""

from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable, Iterator
from typing import Any

from lookalike import arguments
from lookalike.errors import ArgumentError
from lookalike.serve.client.requests import BYTES, SearchSettings, to_options, to_queries
from lookalike.serve.client.results import Description, SearchResult, from_stream
from lookalike.serve.proto import retrieval_pb2 as pb
from lookalike.serve.wire.bounds import SMALL_BYTES, stream_bytes
from lookalike.serve.wire.errors import RetrievalError, invalid

NEEDED = "an iterable of batches, each a list of queries"


class Batches:
    """Requests of a stream. A batch that is no request travels empty, and its own error is read in its place."""

    def __init__(self, settings: SearchSettings) -> None:
        self._options = to_options(settings)
        self._refusals: deque[RetrievalError | None] = deque()
        """For each batch without an answer so far, why it was not sent."""
        self.failure: Exception | None = None
        """What the caller's own iterator raised; it ends the stream after the answers to what came before."""
        self._most: int | None = None

    def write(self, queries: Any) -> pb.SearchStreamRequest:
        """Return the message of one batch."""
        try:
            batch = pb.SearchBatchRequest(queries=to_queries(queries), options=self._options)
            refusal = None
        except ArgumentError as error:
            batch, refusal = pb.SearchBatchRequest(), invalid(str(error))
        self._refusals.append(refusal)
        return pb.SearchStreamRequest(batch=batch)

    def write_all(
        self, batches: Iterable[Any], describe: Callable[[], Description]
    ) -> Iterator[pb.SearchStreamRequest]:
        """Yield the messages of all batches."""
        try:
            for queries in batches:
                request = self.write(queries)
                if self._is_large(request) and self._most is None:
                    self._most = stream_bytes(describe().limits)
                yield self._bounded(request)
        except Exception as error:  # noqa: BLE001  (gRPC would lose it)
            self.failure = error

    async def write_async(
        self, batches: AsyncIterable[Any], describe: Callable[[], Awaitable[Description]]
    ) -> AsyncIterator[pb.SearchStreamRequest]:
        """Yield the messages of all batches of an asynchronous iterable."""
        try:
            async for queries in batches:
                request = self.write(queries)
                if self._is_large(request) and self._most is None:
                    self._most = stream_bytes((await describe()).limits)
                yield self._bounded(request)
        except Exception as error:  # noqa: BLE001  (gRPC would lose it)
            self.failure = error

    @staticmethod
    def _is_large(request: pb.SearchStreamRequest) -> bool:
        return bool(request.ByteSize() > SMALL_BYTES)

    def _bounded(self, request: pb.SearchStreamRequest) -> pb.SearchStreamRequest:
        """Return the message, or an empty one for a batch above the service's bound."""
        if self._most is None or (size := request.ByteSize()) <= self._most:
            return request
        self._refusals[-1] = invalid(
            f"the batch has {size} bytes, the limit of the service is {self._most} for a batch of a stream; send fewer "
            "queries at once, or raise its limits.max_request_bytes"
        )
        return pb.SearchStreamRequest(batch=pb.SearchBatchRequest())

    def read(self, reply: pb.SearchStreamResponse) -> "list[SearchResult] | RetrievalError":
        """Return the answer to the next batch."""
        refusal = self._refusals.popleft()
        return from_stream(reply) if refusal is None else refusal

    def check(self) -> None:
        """Raise what the caller's own iterator raised."""
        if self.failure is not None:
            raise self.failure


def check_batches(batches: Any) -> Iterable[Any]:
    """Return an iterable that is no single batch by its type."""
    if isinstance(batches, (str, *BYTES)) or not hasattr(batches, "__iter__"):
        raise ArgumentError(f"batches is {arguments.show(batches)}; give {NEEDED}")
    checked: Iterable[Any] = batches
    return checked


def check_async_batches(batches: Any) -> AsyncIterable[Any]:
    """Return an asynchronous iterable, also of a plain one."""
    if hasattr(batches, "__aiter__"):
        checked: AsyncIterable[Any] = batches
        return checked
    return _one_by_one(check_batches(batches))


async def _one_by_one(batches: Iterable[Any]) -> AsyncIterator[Any]:
    for queries in batches:
        yield queries
