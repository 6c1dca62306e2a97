"""The gate of the ingress: checks the token, role, size and quota of every request before any work is done."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from time import monotonic as now
from typing import Any

import grpc

from lookalike.serve.front.listener import ListenerSettings
from lookalike.serve.front.messages import message_bounds
from lookalike.serve.front.tenants import TenantAccount, Tenants
from lookalike.serve.settings.config import RequestLimits, ServeConfig
from lookalike.serve.settings.security import Quota
from lookalike.serve.wire.errors import RetrievalError, invalid
from lookalike.serve.wire.requests import DEFAULT_K, REQUEST_ID, count_pixels

COUNTED = {"SearchBatch": "queries", "Embed": "images", "Upsert": "rows", "Delete": "ids"}
"""RPC -> the request field whose items count as queries of a quota."""
HITS_PER_QUERY = 100
"""A query for more hits counts as several in a quota."""
MOST_CALLS, MOST_MESSAGES = 100_000, 4
"""Calls under way where queues have no bound; the largest messages that one tenant may have under way."""
RETRY_MS = 100
"""Pause suggested to a caller with too many requests under way, in milliseconds."""


class Gate:
    """The gate of one ingress replica; without ``tenants`` it asks for no token."""

    def __init__(self, config: ServeConfig) -> None:
        self._limits, self._share = config.limits, tenant_share(config)
        self._tenants = None if config.tenants is None else Tenants(config.tenants)

    def identify(self, rpc: str, metadata: Sequence[tuple[str, Any]]) -> "Caller":
        """Return the caller of ``rpc``; raises UNAUTHENTICATED (no known token) or PERMISSION_DENIED (role too low)."""
        if self._tenants is None:
            return Caller(None, self._limits)
        share = None if self._tenants.num == 1 else self._share
        return Caller(self._tenants.identify(rpc, metadata), self._limits, share)


class Caller:
    """An admitted caller, whose requests must keep to size and quota."""

    def __init__(self, account: TenantAccount | None, limits: RequestLimits, share: int | None = None) -> None:
        self._account, self._limits, self._share = account, limits, share

    @property
    def name(self) -> str:
        """The tenant's name; empty without tenants."""
        return "" if self._account is None else self._account.tenant.name

    @property
    def max_streams(self) -> int | None:
        """The quota's bound of open streams."""
        return None if self._account is None else self._account.tenant.quota.streams

    def sign(self, request_id: str) -> str:
        """Return ``request_id`` so that feedback on its answer is taken from this tenant alone."""
        return request_id if self._account is None else self._account.sign(request_id)

    @contextmanager
    def request(self, rpc: str, message: Any) -> Iterator[None]:
        """Check one request and count it as under way during the block.

        Raises INVALID_ARGUMENT for its size, RESOURCE_EXHAUSTED for the quota.
        """
        with self.under_way():
            self.check(rpc, message)
            yield

    def check(self, rpc: str, message: Any) -> None:
        """Check and count one request as ``request`` does; for a batch of a stream, which is under way already."""
        if (size := message.ByteSize()) > (most := self._limits.max_request_bytes):
            raise invalid(
                f"the request has {size} bytes, the limit is {most}; send less at once, or raise "
                "limits.max_request_bytes of the service"
            )
        if self._account is None:
            return
        if rpc == "SearchStream":
            rpc, message = "SearchBatch", message.batch
        tenant, meter, _ = self._account
        if rpc == "Feedback":
            self._check_own(message.request_id)
        _check_bounds(rpc, message, _num_items(rpc, message), tenant.name, tenant.quota)
        num_pixels = 0 if tenant.quota.pixels_per_s is None else count_pixels(message, self._limits)
        if (refusal := meter.charge(tenant.quota, _count(rpc, message), now(), num_pixels)) is not None:
            raise _exhausted(tenant.name, refusal)

    def _check_own(self, request_id: str) -> None:
        assert self._account is not None
        if REQUEST_ID.fullmatch(request_id) and not self._account.owns(request_id):
            raise RetrievalError(
                grpc.StatusCode.PERMISSION_DENIED,
                f"request_id={request_id!r} names no answer that tenant {self.name!r} was given with a token that is "
                "still valid; send SearchInfo.request_id of its own answers",
            )

    @contextmanager
    def under_way(self) -> Iterator[None]:
        """Count a request as under way during the block; raises RESOURCE_EXHAUSTED beyond the quota."""
        if self._account is None:
            yield
            return
        tenant, meter, _ = self._account
        allowed = self._share if tenant.quota.concurrent is None else tenant.quota.concurrent
        if allowed is not None and meter.under_way >= allowed:
            raise _exhausted(tenant.name, f"{allowed} requests under way; retry after {RETRY_MS} ms")
        meter.under_way += 1
        try:
            yield
        finally:
            meter.under_way -= 1


def tenant_share(config: ServeConfig) -> int | None:
    """Requests that one of several tenants may have under way in a replica: half of its slots and its queue."""
    if config.max_queued_requests < 0:
        return None
    return max(1, (config.max_ongoing_requests + config.max_queued_requests) // 2)


def listener_settings(config: ServeConfig) -> ListenerSettings:
    """What the guard of a listener, which may stand before all ingress replicas, needs of ``config``."""
    scaling = config.deployments.ingress.autoscaling
    num_replicas = config.num_replicas if scaling is None else scaling.max_replicas
    share = tenant_share(config)
    return ListenerSettings(
        tenants=config.tenants,
        loopback_only=config.loopback_only,
        max_calls=MOST_CALLS if share is None else 2 * num_replicas * (share + config.max_streams),
        max_bytes=MOST_MESSAGES * config.limits.max_request_bytes,
        bytes_per_s=config.caller_bytes_per_s,
        max_message=message_bounds(config.limits),
    )


def _count(rpc: str, message: Any) -> int:
    """Queries, images, rows or ids; a query counts once for each ``HITS_PER_QUERY`` hits that it asks for."""
    if rpc in ("Search", "SearchBatch"):
        return _num_items(rpc, message) * max(1, -(-_k(message) // HITS_PER_QUERY))
    return _num_items(rpc, message)


def _num_items(rpc: str, message: Any) -> int:
    if rpc in COUNTED:
        return len(getattr(message, COUNTED[rpc]))
    return 1 if rpc == "Search" else 0


def _k(message: Any) -> int:
    return int(message.options.k) if message.options.HasField("k") else DEFAULT_K


def _check_bounds(rpc: str, message: Any, num_queries: int, name: str, quota: Quota) -> None:
    if quota.max_batch is not None and num_queries > quota.max_batch:
        raise invalid(
            f"{num_queries} {COUNTED[rpc]} in one request, tenant {name!r} may send {quota.max_batch}; send "
            "fewer at a time"
        )
    if quota.max_k is not None and rpc in ("Search", "SearchBatch") and (k := _k(message)) > quota.max_k:
        raise invalid(f"k={k} exceeds the {quota.max_k} of tenant {name!r}; ask for fewer")


def _exhausted(name: str, rule: str) -> RetrievalError:
    return RetrievalError(grpc.StatusCode.RESOURCE_EXHAUSTED, f"tenant {name!r} may have {rule}")
