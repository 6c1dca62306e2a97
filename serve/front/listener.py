"""The guard of Serve's gRPC listener: refuses calls by their metadata, before their messages are read.

The listener is Serve's proxy, in throughput mode each ingress replica. It calls ``add_services``, which puts the guard
around every method. A call without a valid token, of a role too low, or beyond its tenant's calls is refused unread;
messages of one tenant are read a few at a time, and their bytes are bounded until they are answered. The gate of the
ingress checks every call again: the guard saves what the gate would come too late for. Until the first ingress replica
has published ``ListenerSettings``, and without tenants, all callers count as one.
"""

import asyncio
import json
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, NamedTuple

import grpc
from grpc_health.v1 import health_pb2_grpc
from ray.experimental.internal_kv import (  # Ray has no public one
    _internal_kv_get,  # noqa: PLC2701
    _internal_kv_initialized,  # noqa: PLC2701
    _internal_kv_put,  # noqa: PLC2701
)
from ray.util import metrics

from lookalike.serve.front.log_limit import limit_serve_log
from lookalike.serve.front.memory import start_trimming
from lookalike.serve.front.tenants import CHECK_S, Tenants
from lookalike.serve.proto import retrieval_pb2_grpc
from lookalike.serve.wire.errors import RetrievalError, invalid
from lookalike.serve.wire.requests import check_local
from lookalike.telemetry import fields, get_logger

log = get_logger(__name__)
SERVICERS = ["lookalike.serve.front.deadline.pass_deadlines", "lookalike.serve.front.listener.add_services"]
"""The servicers of Serve's gRPC listener (``grpc_options.grpc_servicer_functions``)."""
OPEN_SERVICE = "grpc.health.v1.Health"
"""Needs no token."""
OPEN_BYTES = 4096
"""Largest message to a service that needs no token."""
OPEN_READ_S, READ_S = 2.0, 60.0
"""Seconds in which the message of a call must arrive: without a token, and with one."""
READS = 8
"""Messages of one tenant, and of all callers without one, that are read at a time."""
READ_BYTES_PER_S = 64 << 20
"""Bytes per second that are read of one tenant's messages, on average: reading takes the loop's time from others."""
RETRY_MS = 100
SUMMARY_S = 10.0
"""Pause between two log lines about refused calls, in seconds."""
KEY, NAMESPACE = "listener", "lookalike"
"""Where the settings lie in Ray's key-value store."""


class ListenerSettings(NamedTuple):
    """What the guard of a listener has to know of the service."""

    tenants: str | None = None
    """URI of the tenants file."""
    loopback_only: bool = False
    """Whether callers on other machines are refused."""
    max_calls: int = 10_000
    """Calls of one tenant under way in one listener."""
    max_bytes: int = 256 << 20
    """Bytes of one tenant's messages that are being answered."""

    def publish(self) -> None:
        """Tell all listeners of the cluster."""
        if _internal_kv_initialized():  # type: ignore[no-untyped-call]  # false in Serve's local testing mode
            _internal_kv_put(KEY, json.dumps(self._asdict()), namespace=NAMESPACE)

    @classmethod
    def look_up(cls) -> "ListenerSettings | None":
        """The settings last published; None before."""
        if not _internal_kv_initialized():  # type: ignore[no-untyped-call]
            return None
        value = _internal_kv_get(KEY, namespace=NAMESPACE)
        return None if value is None else cls(**json.loads(value))


def add_services(servicer: Any, server: Any) -> None:
    """Add the services of ``lookalike.v1`` and health to Serve's gRPC ``server``, with a guard around each method."""
    add_guarded(servicer, server, Guard(ListenerSettings.look_up).start())
    limit_serve_log()
    start_trimming()


def add_guarded(servicer: Any, server: Any, guard: "Guard") -> None:
    """Add the same services with ``guard``."""
    guarded = _GuardedServer(server, guard)
    retrieval_pb2_grpc.add_RetrievalServiceServicer_to_server(servicer, guarded)  # type: ignore[no-untyped-call]
    retrieval_pb2_grpc.add_AdminServiceServicer_to_server(servicer, guarded)  # type: ignore[no-untyped-call]
    health_pb2_grpc.add_HealthServicer_to_server(servicer, guarded)


class Guard:
    """The guard of one listener; ``look_up`` returns the settings, or None while there are none."""

    def __init__(self, look_up: Callable[[], ListenerSettings | None]) -> None:
        self._look_up, self.settings = look_up, ListenerSettings()
        self._tenants: Tenants | None = None
        self.calls, self.sizes = Counter[str](), Counter[str]()
        """Calls under way and bytes of their messages, by tenant."""
        self.refused = Counter[tuple[str, str]]()
        """Calls refused since the last line in the log, by method and status."""
        self._reads: dict[str, asyncio.Semaphore] = {}
        self._paid: dict[str, float] = {}
        """Time of the loop's clock until which the messages read so far take up a tenant's share."""
        self._requests = metrics.Counter(
            "lookalike_requests_total", "Requests by status.", ("method", "code", "tenant")
        )

    def start(self) -> "Guard":
        """Follow the settings in a thread, which also writes what was refused to the log."""
        threading.Thread(target=self._follow, name="lookalike-guard", daemon=True).start()
        return self

    def refresh(self) -> None:
        """Look up the settings again."""
        try:
            settings = self._look_up()
            if settings is None or settings == self.settings:
                return
            tenants = None if settings.tenants is None else Tenants(settings.tenants)
        except Exception as error:  # noqa: BLE001  (no news: what holds goes on; the gate checks every call anyway)
            log.error("guard kept as it was %s", fields(error=error))
            return
        if self._tenants is not None:
            self._tenants.close()
        self.settings, self._tenants = settings, tenants

    def _follow(self) -> None:
        pause, waited_s = threading.Event(), 0.0
        while True:
            self.refresh()
            pause.wait(CHECK_S)
            waited_s += CHECK_S
            if waited_s >= SUMMARY_S and self.refused:
                refused, self.refused, waited_s = self.refused, Counter(), 0.0
                for (method, code), num in refused.items():
                    log.warning("refused %s", fields(method=method, code=code, calls=num, seconds=SUMMARY_S))

    def unary(self, method: str, handler: grpc.RpcMethodHandler) -> grpc.RpcMethodHandler:
        """``handler`` of a method with one request, as one that reads the request itself."""

        async def answer(requests: AsyncIterator[Any], context: grpc.aio.ServicerContext) -> Any:
            async with self._admitted(method, context) as tenant:
                with self._held(tenant, request := await self._read(method, tenant, requests)):
                    return await handler.unary_unary(request, context)

        async def answer_stream(requests: AsyncIterator[Any], context: grpc.aio.ServicerContext) -> Any:
            async with self._admitted(method, context) as tenant:
                request = await self._read(method, tenant, requests)
                async for response in handler.unary_stream(request, context):
                    yield response

        made = {"request_deserializer": handler.request_deserializer, "response_serializer": None}
        if handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler(answer_stream, **made)
        return grpc.stream_unary_rpc_method_handler(answer, **made)

    def stream(self, method: str, handler: grpc.RpcMethodHandler) -> grpc.RpcMethodHandler:
        """``handler`` of a method with a stream of requests, admitted once, at its start."""

        async def answer(requests: AsyncIterator[Any], context: grpc.aio.ServicerContext) -> Any:
            async with self._admitted(method, context):
                async for response in handler.stream_stream(requests, context):
                    yield response

        return handler._replace(stream_stream=answer)

    @asynccontextmanager
    async def _admitted(self, method: str, context: grpc.aio.ServicerContext) -> AsyncIterator[str]:
        """Count a call as under way during the block, which gets the tenant's name; refuse it with its status."""
        tenant, rpc = "", method.rpartition("/")[2]
        try:
            if self.settings.loopback_only:
                check_local(context.peer())
            if self._tenants is not None and not _is_open(method):
                tenant = self._tenants.identify(rpc, context.invocation_metadata() or ()).tenant.name
            with self._counted(tenant, _is_open(method)):
                yield tenant
        except RetrievalError as error:
            self.refused[rpc, error.code.name] += 1
            self._requests.inc(1, {"method": rpc, "code": error.code.name, "tenant": tenant})
            await context.abort(error.code, error.message)

    @contextmanager
    def _counted(self, tenant: str, is_open: bool) -> Iterator[None]:
        key, allowed = "" if is_open else f"tenant {tenant}", self.settings.max_calls
        if self.calls[key] >= allowed:
            raise RetrievalError(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"{allowed} calls of {tenant or 'all callers'} are under way; retry after {RETRY_MS} ms",
            )
        self.calls[key] += 1
        try:
            yield
        finally:
            self.calls[key] -= 1

    async def _read(self, method: str, tenant: str, requests: AsyncIterator[Any]) -> Any:
        """The one message of a call; raises for one that is late, or too large for a method without tokens."""
        is_open, clock = _is_open(method), asyncio.get_running_loop().time
        seconds, key = OPEN_READ_S if is_open else READ_S, "" if is_open else f"tenant {tenant}"
        try:
            async with self._reads.setdefault(key, asyncio.Semaphore(READS)), asyncio.timeout(seconds):
                if (wait_s := self._paid.get(key, 0.0) - clock()) > 0:
                    await asyncio.sleep(wait_s)
                request = await anext(aiter(requests))
        except TimeoutError:
            raise RetrievalError(
                grpc.StatusCode.DEADLINE_EXCEEDED, f"the request did not arrive within {seconds:g} s; send it faster"
            ) from None
        except StopAsyncIteration:
            raise invalid("the call ended without a request; send one") from None
        self._paid[key] = max(clock(), self._paid.get(key, 0.0)) + request.ByteSize() / READ_BYTES_PER_S
        if is_open and request.ByteSize() > OPEN_BYTES:
            raise invalid(f"the request has {request.ByteSize()} bytes; this method takes {OPEN_BYTES}")
        return request

    @contextmanager
    def _held(self, tenant: str, request: Any) -> Iterator[None]:
        """Count the bytes of ``request`` during the block; raises RESOURCE_EXHAUSTED beside too many others."""
        size, held = request.ByteSize(), self.sizes[tenant]
        if held and held + size > self.settings.max_bytes:
            raise RetrievalError(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"{held} bytes of requests of {tenant or 'all callers'} are under way, at most "
                f"{self.settings.max_bytes} may be; retry after {RETRY_MS} ms",
            )
        self.sizes[tenant] += size
        try:
            yield
        finally:
            self.sizes[tenant] -= size


def _is_open(method: str) -> bool:
    return method.startswith(f"/{OPEN_SERVICE}/")


class _GuardedServer:
    """What the generated ``add_..._to_server`` functions see as the server."""

    def __init__(self, server: Any, guard: Guard) -> None:
        self._server, self._guard = server, guard

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        """Nothing: the same methods come by name."""

    def add_registered_method_handlers(self, service: str, handlers: dict[str, grpc.RpcMethodHandler]) -> None:
        self._server.add_generic_rpc_handlers((_GuardedService(service, handlers, self._guard),))


class _GuardedService(grpc.ServiceRpcHandler):  # type: ignore[misc]  # grpc's stubs know no classes
    """Finds the guarded handler of a method. Serve replaces ``_method_handlers`` by its own before."""

    def __init__(self, service: str, handlers: dict[str, grpc.RpcMethodHandler], guard: Guard) -> None:
        self._service, self._guard = service, guard
        self._method_handlers = {f"/{service}/{name}": handler for name, handler in handlers.items()}
        self._guarded: dict[str, grpc.RpcMethodHandler] = {}

    def service_name(self) -> str:
        return self._service

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        method = handler_call_details.method
        if method not in self._method_handlers:
            return None
        if method not in self._guarded:
            handler = self._method_handlers[method]
            guarded = self._guard.stream if handler.request_streaming else self._guard.unary
            self._guarded[method] = guarded(method, handler)
        return self._guarded[method]
