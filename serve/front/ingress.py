"""The gRPC ingress deployment: methods named like the RPCs; callers, slots and status codes around ``Service``."""

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import partial
from typing import Any

import grpc
from grpc_health.v1 import health_pb2
from ray.serve.grpc_util import RayServegRPCContext, gRPCInputStream

from lookalike.serve.experiment.assignment import Arm, own_generations
from lookalike.serve.front.fused import open_workers
from lookalike.serve.front.gate import Caller, Gate, listener_settings
from lookalike.serve.front.log_limit import limit_serve_log
from lookalike.serve.front.memory import start_trimming
from lookalike.serve.front.overload import read_time_left
from lookalike.serve.front.service import RPCS, Service
from lookalike.serve.front.stream import Streams, check_idle
from lookalike.serve.generations.follower import Follows
from lookalike.serve.generations.generation import Generation
from lookalike.serve.generations.write_record import WriteRecord
from lookalike.serve.proto import retrieval_pb2 as pb
from lookalike.serve.search.router import Router, Worker
from lookalike.serve.settings.config import ServeConfig
from lookalike.serve.wire.errors import RetrievalError, invalid, shorten
from lookalike.serve.wire.requests import check_local
from lookalike.telemetry import get_logger

log = get_logger(__name__)
SERVICE_NAME = pb.DESCRIPTOR.services_by_name["RetrievalService"].full_name
RESPONSES = {
    method.name: getattr(pb, method.output_type.name)
    for service in pb.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}
"""RPC -> type of its response."""
Handles = tuple[list[Worker], Worker | None, Worker | None]
"""Serve handles of the shards, the re-ranker and the encoder."""
MAX_DETAILS = 2000


def _answering(rpc: str) -> Callable[["Ingress", Any, RayServegRPCContext], Awaitable[Any]]:
    """The method of an RPC that answers one message; Serve passes the context by its name."""

    async def method(self: "Ingress", request: Any, grpc_context: RayServegRPCContext) -> Any:
        return await self.answer(rpc, request, grpc_context)

    method.__name__ = rpc
    return method


class Ingress(Follows):
    """One replica of the front. Without ``workers`` it opens the whole index itself (placement ``fused``)."""

    def __init__(
        self,
        config: ServeConfig,
        generation: Generation,
        workers: Handles | None = None,
        writer: Any = None,
        arms: Sequence[Arm] = (),
    ) -> None:
        self.writer = writer
        self._local: list[Any] = []
        """Workers in this process."""
        self._generations = {generation.name: generation}
        if workers is None:
            generations = [generation, *own_generations(arms, generation)] if writer is None else []
            router = open_workers(config, generation, generations)
            self._local = list(router.shards)
            if router.encoder is not None:
                router.encoder.warm_up()
                self._local.append(router.encoder)
        else:
            batching = config.batching if config.batching.enabled else None
            decode_s = config.limits.max_decode_s
            router = Router(*workers, retries=config.retries, batching=batching, decode_s=decode_s)
        self.service = Service(config, generation, router, writer, arms)
        self._observer = self.service.observer
        self._gate = Gate(config)
        self._streams, self._stream_idle_s = Streams(config.max_streams), config.stream_idle_s
        self._loopback_only = config.loopback_only
        listener_settings(config).publish()
        limit_serve_log()
        start_trimming()

    def __del__(self) -> None:
        """Write the lines that wait for the access log; Serve calls this when a replica is stopped."""
        if hasattr(self, "_observer"):
            self._observer.close()

    async def SearchStream(
        self, requests: gRPCInputStream[pb.SearchStreamRequest], grpc_context: RayServegRPCContext
    ) -> AsyncIterator[pb.SearchStreamResponse]:
        """Answer a stream; its batches go on record, and the stream itself only if it fails."""
        tenant = ""
        try:
            caller = self._identify("SearchStream", grpc_context)
            tenant = caller.name
            with caller.under_way(), self._streams.hold(tenant, caller.max_streams):
                check, look = partial(caller.check, "SearchStream"), partial(self._look, grpc_context)
                async for response in self.service.search_stream(requests, check, tenant, look, caller.sign):
                    yield response
            if requests.is_cancelled():  # so Serve ends a stream whose caller left, or whose bytes are no message
                raise invalid("the stream broke off: it ended, or went on with bytes that are no SearchStreamRequest")
        except Exception as error:  # noqa: BLE001
            failure = as_retrieval_error(error)
            self._observer.count("SearchStream", failure.code.name, tenant)
            raise tell(grpc_context, failure) from None

    def _look(self, context: RayServegRPCContext, idle_s: float) -> None:
        """Raise to end an open stream: it is idle, or its token is no longer valid."""
        check_idle(idle_s, self._stream_idle_s)
        self._identify("SearchStream", context)

    Search, SearchBatch, Embed = _answering("Search"), _answering("SearchBatch"), _answering("Embed")
    Describe, Feedback = _answering("Describe"), _answering("Feedback")
    Upsert, Delete = _answering("Upsert"), _answering("Delete")
    Switch, Rollback, Compact = _answering("Switch"), _answering("Rollback"), _answering("Compact")
    Status, Backup = _answering("Status"), _answering("Backup")

    async def answer(self, rpc: str, request: Any, context: RayServegRPCContext) -> Any:
        """The response of ``rpc``; a failure sets the status of ``context``, and the empty response is not sent.

        Nothing is raised, because Serve logs a traceback for each exception.
        """
        try:
            with self._observer.watch(rpc) as trace:
                caller = self._identify(rpc, context)
                trace.tenant, trace.request_id = caller.name, caller.sign(trace.request_id)
                trace.allowed_s = read_time_left(context.invocation_metadata())
                with caller.request(rpc, request):
                    async with self.service.slot(rpc, request, caller.name):
                        return await RPCS[rpc](self.service, request, trace)
        except Exception as error:  # noqa: BLE001
            tell(context, as_retrieval_error(error))
            return RESPONSES[rpc]()

    def open(self, generation: Generation) -> list[Any]:
        return [worker.open(generation) for worker in self._local]

    def apply(self, opened: list[Any], records: Sequence[WriteRecord]) -> None:
        for worker, own in zip(self._local, opened, strict=True):
            worker.apply(own, records)

    def add(self, generation: Generation, opened: list[Any]) -> None:
        for worker, own in zip(self._local, opened, strict=True):
            worker.add(generation, own)
        self._generations[generation.name] = generation

    def drop(self, name: str) -> None:
        for worker in self._local:
            worker.drop(name)
        self._generations.pop(name, None)

    def switch(self, name: str) -> None:
        self.service.current = self._generations[name]

    async def Check(self, request: health_pb2.HealthCheckRequest, grpc_context: RayServegRPCContext) -> Any:
        """``grpc.health.v1.Health/Check``: SERVING while searches of all shards are answered."""
        if request.service not in ("", SERVICE_NAME):
            message = f"no service {shorten(request.service)}; ask for {SERVICE_NAME!r}"
            tell(grpc_context, RetrievalError(grpc.StatusCode.NOT_FOUND, message))
            return health_pb2.HealthCheckResponse()
        states = health_pb2.HealthCheckResponse
        return states(status=states.SERVING if await self.service.pulse.is_serving() else states.NOT_SERVING)

    async def Watch(self, request: health_pb2.HealthCheckRequest, grpc_context: RayServegRPCContext) -> Any:
        """``grpc.health.v1.Health/Watch``: UNIMPLEMENTED, so that clients do without it."""
        message = "Watch is not implemented; ask with Check"
        raise tell(grpc_context, RetrievalError(grpc.StatusCode.UNIMPLEMENTED, message))
        yield

    def _identify(self, rpc: str, context: RayServegRPCContext) -> Caller:
        if self._loopback_only:
            check_local(context.peer())
        return self._gate.identify(rpc, context.invocation_metadata())


def as_retrieval_error(error: Exception) -> RetrievalError:
    """``error``, or INTERNAL for a fault of the service, whose traceback goes to the log and not to callers."""
    if isinstance(error, RetrievalError):
        return error
    log.error("fault", exc_info=error)
    return RetrievalError(grpc.StatusCode.INTERNAL, f"the service failed ({type(error).__name__}); its log says more")


def tell(context: RayServegRPCContext, error: RetrievalError) -> RetrievalError:
    """Set the status that the caller gets when ``error`` is raised; its message must fit a header of HTTP/2."""
    text = error.message.encode("ascii", "backslashreplace").decode()
    context.set_code(error.code)
    context.set_details(text if len(text) <= MAX_DETAILS else f"{text[: MAX_DETAILS - 3]}...")
    return error
