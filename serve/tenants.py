"""Who may ask what, and how much: bearer tokens, roles and quotas of tenants, from a file that is read again on change.

The file holds SHA-256 hashes, never tokens, so reading it gives no access. ``lookalike token NAME`` makes both.
"""

import argparse
import hashlib
import hmac
import os
import secrets
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import yaml
from pydantic import Field, ValidationError, model_validator

from lookalike import storage
from lookalike.config import Config
from lookalike.errors import UsageError
from lookalike.telemetry import fields, get_logger

log = get_logger(__name__)
CHECK_S = 2.0
"""How often the file is looked at, in seconds."""
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


class Bucket:
    """A token bucket that may be overdrawn by one take, so that what is larger than the bucket passes when it is full.

    Rate and size come with each take: a quota can change while what was used is remembered.
    """

    def __init__(self) -> None:
        self._used, self._time = 0.0, 0.0

    def wait_s(self, amount: float, *, rate: float, size: float, now: float) -> float:
        """Seconds until ``amount`` can be taken; 0 when it can be now."""
        self._used = max(0.0, self._used - (now - self._time) * rate)
        self._time = now
        return max(0.0, self._used + min(amount, size) - size) / rate

    def take(self, amount: float) -> None:
        """Take what ``wait_s`` has said is there."""
        self._used += amount


class Meter:
    """What one tenant uses of this replica."""

    def __init__(self) -> None:
        self.requests, self.queries, self.under_way = Bucket(), Bucket(), 0

    def charge(self, quota: Quota, num_queries: int, now: float) -> str | None:
        """Count a request of ``num_queries``, or say which quota it exceeds and when to try again."""
        waits = {}
        if quota.requests_per_s is not None:
            wait = self.requests.wait_s(1, rate=quota.requests_per_s, size=quota.burst, now=now)
            waits[f"{quota.requests_per_s:g} requests a second (burst {quota.burst})"] = wait
        if quota.queries_per_s is not None:
            size = max(1.0, quota.queries_per_s)
            wait = self.queries.wait_s(num_queries, rate=quota.queries_per_s, size=size, now=now)
            waits[f"{quota.queries_per_s:g} queries a second"] = wait
        rule, wait = max(waits.items(), key=lambda one: one[1], default=("", 0.0))
        if wait > 0:
            return f"{rule}; retry after {max(1, round(wait * 1000))} ms"
        if quota.requests_per_s is not None:  # else what was used would wait for a quota that may come
            self.requests.take(1)
        if quota.queries_per_s is not None:
            self.queries.take(num_queries)
        return None


class Known(NamedTuple):
    """A tenant whose token was shown, and its meter."""

    tenant: Tenant
    meter: Meter


def read_tenants(uri: str) -> tuple[Tenant, ...]:
    """The tenants in the YAML or JSON file at ``uri``; raises ``UsageError`` for one that cannot be used."""
    return _parse(uri, _read(uri))


def _read(uri: str) -> bytes:
    try:
        return storage.read_bytes(uri)
    except OSError as error:
        raise UsageError(
            f"tenants: {uri} cannot be read ({error.strerror or error}); give the path of a file with the "
            "entries that `lookalike token` prints, or leave serve.tenants out to ask for no tokens"
        ) from None


def _parse(uri: str, content: bytes) -> tuple[Tenant, ...]:
    try:
        values = yaml.safe_load(content)
    except (yaml.YAMLError, UnicodeDecodeError, ValueError) as error:
        place = str(getattr(error, "problem_mark", "")).strip()  # never the text itself: it may hold a token
        raise UsageError(f"tenants: {uri} is neither YAML nor JSON {place}; write `tenants:` and a list") from None
    if not isinstance(values, dict):
        raise UsageError(f"tenants: {uri} holds a {type(values).__name__}; write `tenants:` and a list below it")
    try:
        return TenantsFile.model_validate(values).tenants
    except ValidationError as error:  # its inputs stay unsaid, too
        problems = [
            (".".join(map(str, one["loc"])), one["msg"].removeprefix("Value error, "))
            for one in error.errors(include_input=False)
        ]
        raise UsageError(
            f"tenants: {uri}: " + "; ".join(f"{place}: {text}".removeprefix(": ") for place, text in problems)
        ) from None


class Tenants:
    """The tenants of a service, as the file last said; a thread of its own looks whether it changed."""

    def __init__(self, uri: str) -> None:
        self._uri, self._content = uri, _read(uri)
        self._tenants: Sequence[Tenant] = _parse(uri, self._content)
        self._meters: dict[str, Meter] = {}
        self._ended = threading.Event()
        threading.Thread(target=self._watch, name="lookalike-tenants", daemon=True).start()

    def find(self, token: str) -> Known | None:
        """The tenant of ``token``; how long it takes does not tell how much of a token is right."""
        digest, found = hash_token(token), None
        for tenant in self._tenants:
            for known in tenant.token_sha256:
                if hmac.compare_digest(digest, known):
                    found = tenant
        return None if found is None else Known(found, self._meters.setdefault(found.name, Meter()))

    def refresh(self) -> None:
        """Read the file again; one that is gone or broken changes nothing and is logged."""
        try:
            content = _read(self._uri)
            if content != self._content:
                self._tenants = _parse(self._uri, content)
                self._content = content
                log.info("tenants changed %s", fields(uri=self._uri, num=len(self._tenants)))
        except Exception as error:  # noqa: BLE001  (whatever a store raises: those known before stay known)
            log.error("tenants kept as they were %s", fields(error=error))

    def close(self) -> None:
        """End the thread."""
        self._ended.set()

    def _watch(self) -> None:
        while not self._ended.wait(CHECK_S):
            self.refresh()


def hash_token(token: str) -> str:
    """SHA-256 of a token, in hexadecimal."""
    return hashlib.sha256(token.encode()).hexdigest()


def now() -> float:
    """The clock of quotas, in seconds."""
    return time.monotonic()


def token(args: Sequence[str]) -> int:
    """Make a token: the entry for the tenants file to stdout, the token itself to stderr or a file, never again."""
    parser = argparse.ArgumentParser(
        prog="lookalike token",
        description="Make a bearer token for a tenant. The entry "
        "goes to stdout: `lookalike token NAME >> tenants.yaml` adds it to a file that "
        "begins with the line `tenants:`.",
    )
    parser.add_argument("name", help="the tenant's name")
    parser.add_argument("--role", choices=ROLES, default="read", help="default: %(default)s")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the token to this new file, for its owner")
    options = parser.parse_args(args)
    fresh = secrets.token_urlsafe(32)
    try:
        entry = Tenant(name=options.name, role=options.role, token_sha256=(hash_token(fresh),))
    except ValidationError:
        raise UsageError(
            f"{options.name!r} is no name of a tenant; take up to 63 letters, digits, dots, dashes and underscores"
        ) from None
    if options.out is None:
        sys.stderr.write(f"the token, shown this once: {fresh}\n")
    else:
        _write_secret(options.out, fresh)
    values = entry.model_dump(mode="json", exclude={"quota"})
    print(yaml.safe_dump([values], sort_keys=False, default_flow_style=None, width=200), end="")
    return 0


def _write_secret(path: Path, text: str) -> None:
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(f"{text}\n")
    except OSError as error:
        raise UsageError(f"--out {path} cannot be written ({error.strerror or error}); name a new file") from None
