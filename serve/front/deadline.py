"""Callers' gRPC deadlines, handed on from Serve's listener to the replicas, which see the metadata of a call alone."""

from collections.abc import Awaitable, Callable
from typing import Any

HEADER = "lookalike-time-left-ms"
"""Metadata key; what a caller sends under it can only shorten its own call."""
NO_DEADLINE_S = 1e6
"""From here on gRPC means that there is no deadline."""
Handler = Callable[[Any, Any], Awaitable[bytes]]


class TimedContext:
    """A gRPC context whose metadata says how much time is left."""

    def __init__(self, context: Any) -> None:
        self._context = context

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    def invocation_metadata(self) -> list[tuple[str, str | bytes]]:
        metadata = list(self._context.invocation_metadata() or ())
        left_s = self._context.time_remaining()
        if left_s is not None and left_s < NO_DEADLINE_S:
            metadata.append((HEADER, str(max(0, int(1000 * left_s)))))
        return metadata


def pass_deadlines(_: Any, server: Any) -> None:
    """Make the methods that are added to Serve's listener after this pass on the deadlines of their calls.

    It is one of the listener's servicers, and adds no method itself. Streams are left alone: their batches have
    timeouts.
    """
    make_handler = server.service_handler_factory

    def make_timed(service_method: str, streaming_type: Any) -> Any:
        handler = make_handler(service_method=service_method, streaming_type=streaming_type)
        return _timed(handler) if streaming_type.name == "UNARY_UNARY" else handler

    server.service_handler_factory = make_timed


def _timed(handler: Handler) -> Handler:
    async def answer(request: Any, context: Any) -> bytes:
        return await handler(request, TimedContext(context))

    return answer
