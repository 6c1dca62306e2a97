"""The guard of Serve's gRPC listener: refuses calls by their metadata, before their messages are read.

The listener is Serve's proxy, in throughput mode each ingress replica. It calls ``add_services``, which puts the guard
around every method. A call without a valid token, of a role too low, or beyond its tenant's calls is refused unread. A
message has a bound of its method and is parsed only if it keeps to it; the bytes of a caller's messages are bounded
from before they are read until they are answered. The gate of the ingress checks every call again: the guard saves what
the gate would come too late for. Until the first ingress replica has published ``ListenerSettings``, and without
tenants, callers count by their address.
"""

import asyncio
import json
import threading
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, NamedTuple

import grpc
from google.protobuf.descriptor import Descriptor  # type: ignore[import-untyped]
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from grpc_health.v1 import health_pb2_grpc
from ray.experimental.internal_kv import (  # Ray has no public one
    _internal_kv_get,  # noqa: PLC2701
    _internal_kv_initialized,  # noqa: PLC2701
    _internal_kv_put,  # noqa: PLC2701
)
from ray.util import metrics

from lookalike.serve.front.log_limit import limit_serve_log
from lookalike.serve.front.memory import start_trimming
from lookalike.serve.front.messages import MOST_PARTS, count_parts, message_bounds
from lookalike.serve.front.share import Share
from lookalike.serve.front.tenants import CHECK_S, Tenants
from lookalike.serve.proto import retrieval_pb2 as pb
from lookalike.serve.proto import retrieval_pb2_grpc
from lookalike.serve.settings.config import RequestLimits
from lookalike.serve.wire.bounds import SMALL_BYTES
from lookalike.serve.wire.errors import RetrievalError, invalid
from lookalike.serve.wire.requests import LOCAL_PEERS, check_local
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
MOST_SHARES = 1000
"""Callers that are remembered at a time; beyond them those with nothing under way are forgotten."""
MOST_ADDRESS = 64
"""Characters of an address that are looked at."""
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
    """Bytes of one tenant's messages that are being read or answered."""
    bytes_per_s: int = 32 << 20
    """Bytes per second of one tenant's large messages, on average: they take the loop's time from others."""
    max_message: Mapping[str, int] = message_bounds(RequestLimits())
    """Largest message of each method, in bytes."""

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
        self.shares: dict[str, Share] = {}
        """What each caller has under way."""
        self.refused = Counter[tuple[str, str]]()
        """Calls refused since the last line in the log, by method and status."""
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
        kind = _Kind.of(method, handler)

        async def answer(_: Any, context: grpc.aio.ServicerContext) -> Any:
            call = _Call(self, kind, context)
            try:
                return await handler.unary_unary(await call.read_one(), context)
            except RetrievalError as error:
                await call.refuse(error)
            finally:
                call.leave()

        async def answer_stream(_: Any, context: grpc.aio.ServicerContext) -> Any:
            call = _Call(self, kind, context)
            try:
                async for response in handler.unary_stream(await call.read_one(), context):
                    yield response
            except RetrievalError as error:
                await call.refuse(error)
            finally:
                call.leave()

        if handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler(answer_stream)
        return grpc.stream_unary_rpc_method_handler(answer)

    def stream(self, method: str, handler: grpc.RpcMethodHandler) -> grpc.RpcMethodHandler:
        """``handler`` of a method with a stream of requests, admitted once, at its start."""
        kind = _Kind.of(method, handler)

        async def answer(_: Any, context: grpc.aio.ServicerContext) -> Any:
            call = _Call(self, kind, context)
            try:
                call.enter()
                async for response in handler.stream_stream(call.read_all(), context):
                    call.answered()
                    yield response
                if call.failure is not None:
                    raise call.failure
            except RetrievalError as error:
                await call.refuse(error)
            finally:
                call.leave()

        return grpc.stream_stream_rpc_method_handler(answer)

    def identify(self, kind: "_Kind", context: grpc.aio.ServicerContext) -> str:
        """Return the tenant's name, empty without tenants; raises its status for a caller who may not call."""
        if self.settings.loopback_only:
            check_local(context.peer())
        if self._tenants is None or kind.is_open:
            return ""
        return self._tenants.identify(kind.rpc, context.invocation_metadata() or ()).tenant.name

    def share_of(self, tenant: str, kind: "_Kind", context: grpc.aio.ServicerContext) -> Share:
        """What this caller has under way; those without a tenant count by their address."""
        name = f"tenant {tenant!r}" if tenant else f"{_source(context)}{' (health)' if kind.is_open else ''}"
        if (share := self.shares.get(name)) is None:
            if len(self.shares) >= MOST_SHARES:
                self.shares = {name: each for name, each in self.shares.items() if not each.is_idle}
            share = self.shares[name] = Share(name)
        return share

    def count_refused(self, rpc: str, code: str, tenant: str) -> None:
        """Count a refused call for the metrics and the log."""
        self.refused[rpc, code] += 1
        self._requests.inc(1, {"method": rpc, "code": code, "tenant": tenant})


class _Kind(NamedTuple):
    """A method, as the guard sees it."""

    rpc: str
    is_open: bool
    """Whether it needs no token."""
    parse: Callable[[bytes], Any]
    descriptor: Descriptor | None
    """Type of its requests; None for services of others."""

    @classmethod
    def of(cls, method: str, handler: grpc.RpcMethodHandler) -> "_Kind":
        service, _, rpc = method.strip("/").rpartition("/")
        own = pb.DESCRIPTOR.services_by_name.get(service.rpartition(".")[2])
        descriptor = None if own is None else own.methods_by_name[rpc].input_type
        return cls(rpc, service == OPEN_SERVICE, handler.request_deserializer, descriptor)


class _Call:
    """One call in a listener."""

    def __init__(self, guard: Guard, kind: _Kind, context: grpc.aio.ServicerContext) -> None:
        self._guard, self._kind, self._context = guard, kind, context
        self._share: Share | None = None
        self._tenant, self._held = "", 0
        self._unanswered: deque[int] = deque()
        """Bytes of each batch of a stream that has no answer yet."""
        self.failure: RetrievalError | None = None
        """What ended the requests of a stream."""

    def enter(self) -> Share:
        """Count the call as under way; raises its status if the caller may not call."""
        self._tenant = self._guard.identify(self._kind, self._context)
        share = self._guard.share_of(self._tenant, self._kind, self._context)
        share.enter(self._guard.settings.max_calls)
        self._share = share
        return share

    def leave(self) -> None:
        """End the call."""
        if self._share is not None:
            self._share.leave(self._held)

    async def refuse(self, error: RetrievalError) -> None:
        """Give the caller the status of ``error``."""
        self._guard.count_refused(self._kind.rpc, error.code.name, self._tenant)
        await self._context.abort(error.code, error.message)

    async def read_one(self) -> Any:
        """The one message of a call; raises for one that is late, too large, or beside too many others."""
        share, most, max_bytes = self.enter(), self._most, self._guard.settings.max_bytes
        if share.is_watched and most > SMALL_BYTES:
            most = max_bytes  # beside no other
        await share.reserve(most, max_bytes)
        self._held = most
        seconds = OPEN_READ_S if self._kind.is_open else READ_S
        try:
            async with asyncio.timeout(seconds):
                await share.wait_if_watched()
                data = await self._context.read()
        except TimeoutError:
            raise RetrievalError(
                grpc.StatusCode.DEADLINE_EXCEEDED, f"the request did not arrive within {seconds:g} s; send it faster"
            ) from None
        if data is grpc.aio.EOF:
            raise invalid("the call ended without a request; send one")
        share.release(most - len(data))
        self._held = len(data)
        return await self._parse(share, data)

    async def read_all(self) -> AsyncIterator[Any]:
        """The batches of a stream; each waits until there is room for its bytes."""
        assert self._share is not None
        try:
            while (data := await self._context.read()) is not grpc.aio.EOF:
                await self._share.reserve(len(data), self._guard.settings.max_bytes)
                self._held += len(data)
                self._unanswered.append(len(data))
                yield await self._parse(self._share, data)
        except RetrievalError as error:
            self.failure = error  # Serve would hide it
            raise

    def answered(self) -> None:
        """Give back the bytes of the oldest batch of a stream, which has its answer."""
        if self._unanswered and self._share is not None:
            size = self._unanswered.popleft()
            self._held -= size
            self._share.release(size)

    @property
    def _most(self) -> int:
        return OPEN_BYTES if self._kind.is_open else self._guard.settings.max_message.get(self._kind.rpc, SMALL_BYTES)

    async def _parse(self, share: Share, data: bytes) -> Any:
        """The message in ``data``; others get their turn between the steps that hold up the loop for a large one."""
        try:
            self._check_size(len(data))
            if len(data) > SMALL_BYTES:
                await share.pay(len(data), self._guard.settings.bytes_per_s)
                await self._check_parts(data)
            return self._kind.parse(data)
        except DecodeError as error:
            share.watch(len(data), self._guard.settings.bytes_per_s)
            raise invalid(
                f"the bytes are no request of {self._kind.rpc} ({error}); send what its contract says"
            ) from None
        except RetrievalError:
            share.watch(len(data), self._guard.settings.bytes_per_s)
            raise

    def _check_size(self, size: int) -> None:
        if size > (most := self._most):
            raise invalid(
                f"the request has {size} bytes, the limit is {most} for {self._kind.rpc}; send less at once, or raise "
                "the limits of the service (max_image_bytes, max_request_bytes)"
            )

    async def _check_parts(self, data: bytes) -> None:
        if self._kind.descriptor is None:
            return
        if await asyncio.to_thread(count_parts, data, self._kind.descriptor) > MOST_PARTS:
            raise invalid(f"the request has more than {MOST_PARTS} fields; send fewer items at once")


def _source(context: grpc.aio.ServicerContext) -> str:
    """The caller's address, which proxies on this machine tell."""
    peer = str(context.peer()).rpartition(":")[0]
    if peer.startswith(LOCAL_PEERS):
        for key, value in context.invocation_metadata() or ():
            if key == "x-forwarded-for":
                return f"source {str(value)[:MOST_ADDRESS]}"
    return f"source {peer}"


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
