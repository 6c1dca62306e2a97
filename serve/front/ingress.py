"""The gRPC ingress deployment: methods named like the RPCs, exact status codes, metrics. The work is ``Service``'s."""

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, TypeVar

import grpc
from grpc_health.v1 import health_pb2
from ray.serve.grpc_util import RayServegRPCContext, gRPCInputStream
from ray.util.metrics import Counter, Histogram

from lookalike.serve.experiment.assignment import Arm, own_generations
from lookalike.serve.front.fused import open_workers
from lookalike.serve.front.gate import Caller, Gate
from lookalike.serve.front.overload import ADMITTED, ShedError, allowed_ms
from lookalike.serve.front.service import Service
from lookalike.serve.generations.follower import Follows
from lookalike.serve.generations.generation import Generation
from lookalike.serve.generations.journal import Record
from lookalike.serve.proto import retrieval_pb2 as pb
from lookalike.serve.search.router import Router, Worker
from lookalike.serve.settings.config import ServeConfig
from lookalike.serve.watch import trace
from lookalike.serve.wire.errors import CODES, RetrievalError, invalid, shorten
from lookalike.telemetry import get_logger

log = get_logger(__name__)
Request = TypeVar("Request")
Response = TypeVar("Response")
SERVICE_NAME = pb.DESCRIPTOR.services_by_name["RetrievalService"].full_name
SERVICERS = [
    "lookalike.serve.proto.retrieval_pb2_grpc.add_RetrievalServiceServicer_to_server",
    "lookalike.serve.proto.retrieval_pb2_grpc.add_AdminServiceServicer_to_server",
    "grpc_health.v1.health_pb2_grpc.add_HealthServicer_to_server",
]
"""What Serve's gRPC listener must be started with (``grpc_options.grpc_servicer_functions``)."""
Handles = tuple[list[Worker], Worker | None, Worker | None]
"""Serve handles of the shards, the re-ranker and the encoder."""
MAX_DETAILS = 2000
SECONDS = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0]


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
            held = [generation, *own_generations(arms, generation)] if writer is None else []
            router = open_workers(config, generation, held)
            self._local = [*router.shards, *([router.encoder] if router.encoder is not None else [])]
        else:
            router = Router(
                *workers, retries=config.retries, batching=config.batching if config.batching.enabled else None
            )
        self._service = Service(config, generation, router, writer, arms)
        self._observer = self._service.observer
        self._gate = Gate(config)
        self._loopback_only = config.loopback_only
        self._requests = Counter("lookalike_requests_total", "Requests by status.", ("method", "code", "tenant"))
        self._seconds = Histogram("lookalike_request_duration_seconds", "Time in the ingress.", SECONDS, ("method",))
        self._stages = Histogram("lookalike_stage_duration_seconds", "Time of a search's parts.", SECONDS, ("stage",))
        self._missing = Counter("lookalike_shards_missing_total", "Shards that partial answers went without.")
        self._shed = Counter("lookalike_shed_total", "Requests refused because the queue was full.", ("method",))
        self._degraded = Counter("lookalike_degraded_total", "Answers by a cheaper plan because of the load.")

    def __del__(self) -> None:
        """Serve calls it when a replica is stopped: what waits for the access log is written."""
        if hasattr(self, "_observer"):
            self._observer.close()

    async def Search(self, request: pb.SearchRequest, grpc_context: RayServegRPCContext) -> pb.SearchResponse:
        """RPC."""
        response = await self._answer("Search", self._service.search, request, grpc_context)
        self._observe(response.info)
        return response

    async def SearchBatch(
        self, request: pb.SearchBatchRequest, grpc_context: RayServegRPCContext
    ) -> pb.SearchBatchResponse:
        """RPC."""
        response = await self._answer("SearchBatch", self._service.search_batch, request, grpc_context)
        self._observe(response.info)
        return response

    async def SearchStream(
        self, requests: gRPCInputStream[pb.SearchStreamRequest], grpc_context: RayServegRPCContext
    ) -> AsyncIterator[pb.SearchStreamResponse]:
        """RPC; counted by its batches."""
        seen = trace.begin("SearchStream")
        try:
            caller = self._identify("SearchStream", grpc_context)
            seen.tenant = caller.name
            with caller.under_way():
                async for response in self._service.search_stream(requests, partial(caller.check, "SearchStream")):
                    failed = response.WhichOneof("outcome") == "failure"
                    code = CODES[response.failure.code].name if failed else "OK"
                    self._requests.inc(1, {"method": "SearchStream", "code": code, "tenant": seen.tenant})
                    if not failed:
                        self._observe(response.batch.info)
                    yield response
            if requests.is_cancelled():  # so Serve ends a stream whose caller left, or whose bytes are no message
                raise invalid("the stream broke off: it ended, or went on with bytes that are no SearchStreamRequest")
        except Exception as error:  # noqa: BLE001
            failure = as_retrieval_error(error)
            self._requests.inc(1, {"method": "SearchStream", "code": failure.code.name, "tenant": seen.tenant})
            raise tell(grpc_context, failure) from None

    async def Feedback(self, request: pb.FeedbackRequest, grpc_context: RayServegRPCContext) -> pb.FeedbackResponse:
        """RPC."""
        return await self._answer("Feedback", self._service.feedback, request, grpc_context)

    async def Embed(self, request: pb.EmbedRequest, grpc_context: RayServegRPCContext) -> pb.EmbedResponse:
        """RPC."""
        return await self._answer("Embed", self._service.embed, request, grpc_context)

    async def Describe(self, request: pb.DescribeRequest, grpc_context: RayServegRPCContext) -> pb.DescribeResponse:
        """RPC."""
        return await self._answer("Describe", self._service.describe, request, grpc_context)

    async def Upsert(self, request: pb.UpsertRequest, grpc_context: RayServegRPCContext) -> pb.UpsertResponse:
        """RPC."""
        return await self._answer("Upsert", self._service.upsert, request, grpc_context)

    async def Delete(self, request: pb.DeleteRequest, grpc_context: RayServegRPCContext) -> pb.DeleteResponse:
        """RPC."""
        return await self._answer("Delete", self._service.delete, request, grpc_context)

    async def Switch(self, request: pb.SwitchRequest, grpc_context: RayServegRPCContext) -> pb.SwitchResponse:
        """RPC."""
        return await self._answer("Switch", self._service.switch, request, grpc_context)

    async def Rollback(self, request: pb.RollbackRequest, grpc_context: RayServegRPCContext) -> pb.RollbackResponse:
        """RPC."""
        return await self._answer("Rollback", self._service.rollback, request, grpc_context)

    async def Compact(self, request: pb.CompactRequest, grpc_context: RayServegRPCContext) -> pb.CompactResponse:
        """RPC."""
        return await self._answer("Compact", self._service.compact, request, grpc_context)

    async def Status(self, request: pb.StatusRequest, grpc_context: RayServegRPCContext) -> pb.StatusResponse:
        """RPC."""
        return await self._answer("Status", self._service.status, request, grpc_context)

    def open(self, generation: Generation) -> list[Any]:
        """What each worker in this process opens."""
        return [worker.open(generation) for worker in self._local]

    def apply(self, opened: list[Any], records: Sequence[Record]) -> None:
        """Give writes to the workers in this process."""
        for worker, own in zip(self._local, opened, strict=True):
            worker.apply(own, records)

    def add(self, generation: Generation, opened: list[Any]) -> None:
        """Be able to answer for a generation."""
        for worker, own in zip(self._local, opened, strict=True):
            worker.add(generation, own)
        self._generations[generation.name] = generation

    def drop(self, name: str) -> None:
        """Let go of a generation."""
        for worker in self._local:
            worker.drop(name)
        self._generations.pop(name, None)

    def switch(self, name: str) -> None:
        """Requests that begin now belong to this generation."""
        self._service.current = self._generations[name]

    async def Check(self, request: health_pb2.HealthCheckRequest, grpc_context: RayServegRPCContext) -> Any:
        """``grpc.health.v1.Health/Check``: a replica that answers serves."""
        if request.service not in ("", SERVICE_NAME):
            message = f"no service {shorten(request.service)}; ask for {SERVICE_NAME!r}"
            raise tell(grpc_context, RetrievalError(grpc.StatusCode.NOT_FOUND, message))
        return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)

    async def Watch(self, request: health_pb2.HealthCheckRequest, grpc_context: RayServegRPCContext) -> Any:
        """``grpc.health.v1.Health/Watch``: UNIMPLEMENTED, on which clients go on without it."""
        message = "Watch is not implemented; ask with Check"
        raise tell(grpc_context, RetrievalError(grpc.StatusCode.UNIMPLEMENTED, message))
        yield

    async def _answer(
        self, rpc: str, work: Callable[[Request], Awaitable[Response]], request: Request, context: RayServegRPCContext
    ) -> Response:
        start, code = time.perf_counter(), grpc.StatusCode.CANCELLED
        seen = self._observer.begin(rpc)
        try:
            caller = self._identify(rpc, context)
            seen.tenant = caller.name
            with caller.request(rpc, request):
                async with self._service.admission.slot(allowed_ms(request)) if rpc in ADMITTED else nullcontext():
                    response = await work(request)
            code = grpc.StatusCode.OK
            return response
        except Exception as error:  # noqa: BLE001
            failure = as_retrieval_error(error)
            code = failure.code
            if isinstance(error, ShedError):
                self._shed.inc(1, {"method": rpc})
            raise tell(context, failure) from None
        finally:
            self._observer.end(seen, code)
            self._requests.inc(1, {"method": rpc, "code": code.name, "tenant": seen.tenant})
            self._seconds.observe(time.perf_counter() - start, {"method": rpc})

    def _identify(self, rpc: str, context: RayServegRPCContext) -> Caller:
        self._check_caller(context)
        return self._gate.identify(rpc, context.invocation_metadata())

    def _check_caller(self, context: RayServegRPCContext) -> None:
        peer = context.peer()
        if self._loopback_only and not peer.startswith(("ipv4:127.", "ipv6:[::1]", "ipv6:%5B::1%5D", "unix:")):
            raise RetrievalError(
                grpc.StatusCode.PERMISSION_DENIED,
                f"caller {peer} is on another machine; set serve.loopback_only=false to admit it",
            )

    def _observe(self, info: pb.SearchInfo) -> None:
        for part in info.stage_times:
            self._stages.observe(part.duration_ms / 1000, {"stage": part.stage})
        if missing := info.coverage.shards_asked - info.coverage.shards_answered:
            self._missing.inc(missing)
        if info.degraded:
            self._degraded.inc(1)


def as_retrieval_error(error: Exception) -> RetrievalError:
    """``error``, or INTERNAL for a fault of ours: its traceback is for the log, not for callers."""
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
