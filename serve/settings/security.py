"""Access settings: TLS, tenants, roles and quotas."""

from collections import Counter
from typing import Literal, get_args

from pydantic import Field, model_validator

from lookalike.config import Config

Role = Literal["read", "write", "admin"]
ROLES: tuple[Role, ...] = get_args(Role)
"""Lowest first; each role includes the ones before it."""


class Quota(Config):
    """A tenant's bounds in one ingress replica; None is no bound, but where a default is named."""

    requests_per_s: float | None = Field(default=None, gt=0, le=1e6)
    """Average requests per second; each batch of a stream counts as one."""
    burst: int = Field(default=10, ge=1, le=1_000_000)
    """Requests that may come at once after a pause."""
    concurrent: int | None = Field(default=None, ge=1, le=1_000_000)
    """Requests under way at a time; a stream counts as one. None: with several tenants half of the replica's slots and
    queue."""
    streams: int | None = Field(default=None, ge=1, le=1_000_000)
    """Streams open at a time. None: half of ``max_streams``."""
    queries_per_s: float | None = Field(default=None, gt=0, le=1e9)
    """Average queries, images, rows or ids per second; a batch counts each of its items, a query once for each
    hundred hits that it asks for, and one second's worth may come at once. A larger batch passes after a second without
    use, and the next request waits until it is paid off."""
    pixels_per_s: float | None = Field(default=None, gt=0, le=1e12)
    """Average pixels of images per second, as their headers say, charged before any is decoded. One second's worth may
    come at once; more passes after a second without use, as for queries."""
    max_k: int | None = Field(default=None, ge=1)
    """Hits a query may ask for, if lower than limits.max_k."""
    max_batch: int | None = Field(default=None, ge=1)
    """Queries, images, rows or ids in one request, if lower than limits.max_batch."""


class Tenant(Config):
    """One caller, with several tokens while one replaces another."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")
    """Name in metrics and logs."""
    token_sha256: tuple[str, ...] = Field(min_length=1, max_length=8)
    """SHA-256 of each accepted token, as 64 hexadecimal digits."""
    role: Role = "read"
    """``read``: searches, Embed, Describe, Feedback. ``write``: also Upsert, Delete. ``admin``: also AdminService."""
    quota: Quota = Quota()

    @model_validator(mode="after")
    def _check_hashes(self) -> "Tenant":
        for digest in self.token_sha256:
            if len(digest) != 64 or set(digest) - set("0123456789abcdef"):
                raise ValueError(
                    f"tenant {self.name!r}: {len(digest)} characters are not a SHA-256 in 64 lower-case "
                    "hexadecimal digits; write the line that `lookalike token` prints"
                )
        return self


class TenantsFile(Config):
    """The content of ``ServeConfig.tenants``."""

    tenants: tuple[Tenant, ...] = Field(min_length=1, max_length=1000)
    """All who may call."""

    @model_validator(mode="after")
    def _check_unique(self) -> "TenantsFile":
        names = [tenant.name for tenant in self.tenants]
        digests = [digest for tenant in self.tenants for digest in tenant.token_sha256]
        if twice := [name for name, num in Counter(names).items() if num > 1]:
            raise ValueError(f"tenants {', '.join(twice)} are listed twice; give each one entry")
        if len(set(digests)) < len(digests):
            raise ValueError("two entries have the same token; make one for each with `lookalike token`")
        return self


class Tls(Config):
    """TLS of ``lookalike serve``; in a cluster ``deploy/kuberay/retrieval.yaml`` adds a proxy."""

    certificate: str | None = None
    """PEM file with the server's certificate and its intermediate certificates; None serves plain text."""
    key: str | None = None
    """PEM file with the certificate's key, without a passphrase."""
    client_ca: str | None = None
    """PEM file with the authorities of client certificates, which are then required (mTLS); None asks for none."""
    host: str = Field(default="127.0.0.1", min_length=1, pattern=r"^[A-Za-z0-9.:*-]+$")
    """Address of the TLS port; 0.0.0.0 is every interface."""
    port: int = Field(default=9443, ge=0, le=65_535)
    """TLS port; 0 takes a free one."""
    max_connections: int = Field(default=4096, ge=1, le=1_000_000)
    """Connections at a time; further ones wait until one ends."""
    source_connections: int = Field(default=1024, ge=1, le=1_000_000)
    """Connections of one address at a time; further ones are closed at once. Raise it if callers share an address."""
    source_connections_per_s: int = Field(default=200, ge=1, le=1_000_000)
    """New connections of one address in a second; further ones are closed at once."""
    source_calls_per_s: int = Field(default=2000, ge=1, le=10_000_000)
    """Calls of one address in a second, those that it takes back included; further ones are RESOURCE_EXHAUSTED."""

    @model_validator(mode="after")
    def _check_pair(self) -> "Tls":
        if (self.certificate is None) != (self.key is None):
            raise ValueError("certificate and key belong together; give both, or neither")
        if self.client_ca is not None and self.certificate is None:
            raise ValueError("client_ca needs certificate and key of the server; give both as well")
        return self

    @property
    def enabled(self) -> bool:
        """Whether TLS is offered."""
        return self.certificate is not None
