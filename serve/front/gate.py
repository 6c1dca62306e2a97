"""The gate of the ingress: checks the token, role, size and quota of every request before any work is done."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from time import monotonic as now
from typing import Any

import grpc

from lookalike.serve.front.tenants import TenantAccount, Tenants
from lookalike.serve.proto import retrieval_pb2 as pb
from lookalike.serve.settings.config import RequestLimits, ServeConfig
from lookalike.serve.settings.security import ROLES, Quota
from lookalike.serve.wire.errors import RetrievalError, invalid
from lookalike.serve.wire.requests import DEFAULT_K, count_pixels

ADMIN_RPCS = frozenset(pb.DESCRIPTOR.services_by_name["AdminService"].methods_by_name)
WRITE_RPCS = frozenset({"Upsert", "Delete"})
COUNTED = {"SearchBatch": "queries", "Embed": "images", "Upsert": "rows", "Delete": "ids"}
"""RPC -> the request field whose items count as queries of a quota."""
RETRY_MS = 100
"""Pause suggested to a caller with too many requests under way, in milliseconds."""


class Gate:
    """The gate of one ingress replica; without ``tenants`` it asks for no token."""

    def __init__(self, config: ServeConfig) -> None:
        self._limits = config.limits
        self._tenants = None if config.tenants is None else Tenants(config.tenants)

    def identify(self, rpc: str, metadata: Sequence[tuple[str, Any]]) -> "Caller":
        """Return the caller of ``rpc``; raises UNAUTHENTICATED (no known token) or PERMISSION_DENIED (role too low)."""
        if self._tenants is None:
            return Caller(None, self._limits)
        account = self._tenants.find(read_bearer(metadata))
        if account is None:
            raise RetrievalError(
                grpc.StatusCode.UNAUTHENTICATED,
                "the token is unknown here; send a valid one as `authorization: Bearer TOKEN`",
            )
        needed, role = role_for(rpc), account.tenant.role
        if ROLES.index(role) < ROLES.index(needed):
            raise RetrievalError(
                grpc.StatusCode.PERMISSION_DENIED,
                f"{rpc} needs the role {needed!r}, tenant "
                f"{account.tenant.name!r} has {role!r}; ask for a token of that role",
            )
        return Caller(account, self._limits)


class Caller:
    """An admitted caller, whose requests must keep to size and quota."""

    def __init__(self, account: TenantAccount | None, limits: RequestLimits) -> None:
        self._account, self._limits = account, limits

    @property
    def name(self) -> str:
        """The tenant's name; empty without tenants."""
        return "" if self._account is None else self._account.tenant.name

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
        tenant, meter = self._account
        num_queries = _count(rpc, message)
        _check_bounds(rpc, message, num_queries, tenant.name, tenant.quota)
        num_pixels = 0 if tenant.quota.pixels_per_s is None else count_pixels(message, self._limits)
        if (refusal := meter.charge(tenant.quota, num_queries, now(), num_pixels)) is not None:
            raise _exhausted(tenant.name, refusal)

    @contextmanager
    def under_way(self) -> Iterator[None]:
        """Count a request as under way during the block; raises RESOURCE_EXHAUSTED beyond the quota."""
        if self._account is None:
            yield
            return
        tenant, meter = self._account
        allowed = tenant.quota.concurrent
        if allowed is not None and meter.under_way >= allowed:
            raise _exhausted(tenant.name, f"{allowed} requests under way; retry after {RETRY_MS} ms")
        meter.under_way += 1
        try:
            yield
        finally:
            meter.under_way -= 1


def role_for(rpc: str) -> str:
    """Return the lowest role that may call ``rpc``."""
    if rpc in ADMIN_RPCS:
        return "admin"
    return "write" if rpc in WRITE_RPCS else "read"


def read_bearer(metadata: Sequence[tuple[str, Any]]) -> str:
    """Return the token of a call; raises UNAUTHENTICATED unless exactly one header holds one."""
    headers = [value for key, value in metadata if key.lower() == "authorization"]
    scheme, _, token = str(headers[0]).partition(" ") if len(headers) == 1 else ("", "", "")
    if scheme.lower() != "bearer" or not token.strip():
        raise RetrievalError(
            grpc.StatusCode.UNAUTHENTICATED,
            "this service asks for a token; send one "
            "`authorization: Bearer TOKEN` (Client(token=...), lookalike search --token-file)",
        )
    return token.strip()


def _count(rpc: str, message: Any) -> int:
    if rpc in COUNTED:
        return len(getattr(message, COUNTED[rpc]))
    return 1 if rpc == "Search" else 0


def _check_bounds(rpc: str, message: Any, num_queries: int, name: str, quota: Quota) -> None:
    if quota.max_batch is not None and num_queries > quota.max_batch:
        raise invalid(
            f"{num_queries} {COUNTED[rpc]} in one request, tenant {name!r} may send {quota.max_batch}; send "
            "fewer at a time"
        )
    if quota.max_k is not None and rpc in ("Search", "SearchBatch"):
        k = message.options.k if message.options.HasField("k") else DEFAULT_K
        if k > quota.max_k:
            raise invalid(f"k={k} exceeds the {quota.max_k} of tenant {name!r}; ask for fewer")


def _exhausted(name: str, rule: str) -> RetrievalError:
    return RetrievalError(grpc.StatusCode.RESOURCE_EXHAUSTED, f"tenant {name!r} may have {rule}")
