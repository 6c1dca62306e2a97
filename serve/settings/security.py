"""Settings of who may call: TLS, tenants, roles and quotas."""

from collections import Counter
from typing import Literal

from pydantic import Field, model_validator

from lookalike.config import Config

ROLES = ("read", "write", "admin")
"""Each may do what those before it may."""


Role = Literal["read", "write", "admin"]


class Quota(Config):
    """What a tenant may use of one ingress replica; None is no bound of its own."""

    requests_per_s: float | None = Field(default=None, gt=0, le=1e6)
    """Requests a second in the long run; each batch of a stream is one."""
    burst: int = Field(default=10, ge=1, le=1_000_000)
    """Requests that may come at once after a pause."""
    concurrent: int | None = Field(default=None, ge=1, le=1_000_000)
    """Requests under way at a time; a stream is one."""
    queries_per_s: float | None = Field(default=None, gt=0, le=1e9)
    """Queries, images, rows or ids a second in the long run, a second's worth at once; a batch counts each of its own.
    A batch larger than a second's worth is taken when nothing was used for a second, and waited for after."""
    max_k: int | None = Field(default=None, ge=1)
    """Hits a query may ask for, below limits.max_k."""
    max_batch: int | None = Field(default=None, ge=1)
    """Queries, images, rows or ids in one request, below limits.max_batch."""


class Tenant(Config):
    """One caller, who may have several tokens (while one takes over from another)."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")
    """Name in metrics and logs."""
    token_sha256: tuple[str, ...] = Field(min_length=1, max_length=8)
    """SHA-256 of each token that is accepted, as 64 hexadecimal digits."""
    role: Role = "read"
    """``read``: searches, Embed, Describe, Feedback. ``write``: Upsert, Delete, too. ``admin``: AdminService, too."""
    quota: Quota = Quota()

    @model_validator(mode="after")
    def _check_hashes(self) -> "Tenant":
        for digest in self.token_sha256:
            if len(digest) != 64 or set(digest) - set("0123456789abcdef"):
                raise ValueError(
                    f"tenant {self.name!r}: {len(digest)} characters are no SHA-256 in 64 lower-case "
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
            raise ValueError(f"tenants {', '.join(twice)} stand there twice; give each one entry")
        if len(set(digests)) < len(digests):
            raise ValueError("two entries have the same token; make each its own with `lookalike token`")
        return self


class Tls(Config):
    """TLS of ``lookalike serve``; a cluster has a proxy of its own (``deploy/kuberay/retrieval.yaml``)."""

    certificate: str | None = None
    """PEM file of the server's certificate and those between it and the root; None serves plain text."""
    key: str | None = None
    """PEM file of its key, without a passphrase."""
    client_ca: str | None = None
    """PEM file of the authorities whose client certificates are required (mTLS); None asks for none."""
    host: str = Field(default="127.0.0.1", min_length=1, pattern=r"^[A-Za-z0-9.:*-]+$")
    """Address that TLS is offered at; 0.0.0.0 is every interface."""
    port: int = Field(default=9443, ge=0, le=65_535)
    """Port that TLS is offered at; 0 takes a free one."""

    @model_validator(mode="after")
    def _check_pair(self) -> "Tls":
        if (self.certificate is None) != (self.key is None):
            raise ValueError("certificate and key belong together; give both, or neither")
        if self.client_ca is not None and self.certificate is None:
            raise ValueError("client_ca needs certificate and key of the server; give them, too")
        return self

    @property
    def enabled(self) -> bool:
        """Whether TLS is offered."""
        return self.certificate is not None
