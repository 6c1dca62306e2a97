"""The tenants of a service, with their bearer tokens, roles and quotas; read from a file, and again when it changes.

The file holds SHA-256 hashes instead of tokens, so reading it gives no access. ``lookalike token NAME`` makes both.
"""

import hashlib
import hmac
import threading
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import grpc
from pydantic import ValidationError

from lookalike import storage
from lookalike.errors import UsageError
from lookalike.plain_yaml import parse_yaml
from lookalike.serve.front.quota import Meter
from lookalike.serve.proto import retrieval_pb2 as pb
from lookalike.serve.settings.security import ROLES, Role, Tenant, TenantsFile
from lookalike.serve.wire.errors import RetrievalError
from lookalike.telemetry import fields, get_logger

log = get_logger(__name__)
MOST_BYTES = 8 << 20
"""Size of the file: some 40,000 tenants."""
CHECK_S = 2.0
"""Pause between two looks at the file, in seconds."""
TAG_DIGITS = 8
"""Digits of a request id that tell whose it is."""
ADMIN_RPCS = frozenset(pb.DESCRIPTOR.services_by_name["AdminService"].methods_by_name)
WRITE_RPCS = frozenset({"Upsert", "Delete"})


class TenantAccount(NamedTuple):
    """A tenant, the meter of what it used, and the hash of the token that it came with."""

    tenant: Tenant
    meter: Meter
    digest: str

    def sign(self, request_id: str) -> str:
        """Return ``request_id`` with a tag for its last digits, which only holders of the token's hash can make."""
        head = request_id[:-TAG_DIGITS]
        return head + _tag(self.digest, head)

    def owns(self, request_id: str) -> bool:
        """Whether ``request_id`` was signed for this tenant, with a token that is still valid."""
        head, tag = request_id[:-TAG_DIGITS], request_id[-TAG_DIGITS:]
        return any(hmac.compare_digest(tag, _tag(digest, head)) for digest in self.tenant.token_sha256)


def read_tenants(uri: str) -> tuple[Tenant, ...]:
    """Return the tenants in the YAML or JSON file at ``uri``; raises ``UsageError`` for an unusable file."""
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
    values = parse_yaml(content, f"tenants: {uri}", MOST_BYTES, secret=True)
    if not isinstance(values, dict):
        raise UsageError(f"tenants: {uri} holds a {type(values).__name__}; write `tenants:` and a list below it")
    try:
        return TenantsFile.model_validate(values).tenants
    except ValidationError as error:
        problems = [  # without the input, which may hold a token
            (".".join(map(str, problem["loc"])), problem["msg"].removeprefix("Value error, "))
            for problem in error.errors(include_input=False)
        ]
        raise UsageError(
            f"tenants: {uri}: " + "; ".join(f"{place}: {text}".removeprefix(": ") for place, text in problems)
        ) from None


class Tenants:
    """The tenants in the file's last valid version; a thread looks for changes."""

    def __init__(self, uri: str) -> None:
        self._uri, self._content = uri, _read(uri)
        self._owners = _by_digest(_parse(uri, self._content))
        self._meters: dict[str, Meter] = {}
        self._ended = threading.Event()
        threading.Thread(target=self._watch, name="lookalike-tenants", daemon=True).start()

    @property
    def num(self) -> int:
        """Number of tenants."""
        return len({owner.name for owner in self._owners.values()})

    def find(self, token: str) -> TenantAccount | None:
        """Return the tenant of ``token``. The time tells nothing of the token: its hash is looked up."""
        owner = self._owners.get(digest := hash_token(token))
        return None if owner is None else TenantAccount(owner, self._meters.setdefault(owner.name, Meter()), digest)

    def identify(self, rpc: str, metadata: Sequence[tuple[str, Any]]) -> TenantAccount:
        """Return the caller of ``rpc``; raises UNAUTHENTICATED (no known token) or PERMISSION_DENIED (role too low)."""
        account = self.find(read_bearer(metadata))
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
        return account

    def refresh(self) -> None:
        """Read the file again. A missing or broken file is logged and changes nothing."""
        try:
            content = _read(self._uri)
            if content != self._content:
                self._owners = _by_digest(_parse(self._uri, content))
                self._content = content
                log.info("tenants changed %s", fields(uri=self._uri, num=self.num))
        except Exception as error:  # noqa: BLE001  (whatever a store raises, the tenants stay as they were)
            log.error("tenants kept as they were %s", fields(error=error))

    def close(self) -> None:
        """Stop looking for changes."""
        self._ended.set()

    def _watch(self) -> None:
        while not self._ended.wait(CHECK_S):
            self.refresh()


def hash_token(token: str) -> str:
    """Return the SHA-256 of a token, in hexadecimal."""
    return hashlib.sha256(token.encode()).hexdigest()


def role_for(rpc: str) -> Role:
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


def _by_digest(tenants: Sequence[Tenant]) -> Mapping[str, Tenant]:
    return {digest: tenant for tenant in tenants for digest in tenant.token_sha256}


def _tag(digest: str, head: str) -> str:
    return hmac.digest(digest.encode(), head.encode(), "sha256").hex()[:TAG_DIGITS]
