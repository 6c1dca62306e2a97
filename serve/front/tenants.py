"""The tenants of a service, with their bearer tokens, roles and quotas; read from a file, and again when it changes.

The file holds SHA-256 hashes instead of tokens, so reading it gives no access. ``lookalike token NAME`` makes both.
"""

import hashlib
import hmac
import threading
from collections.abc import Sequence
from typing import NamedTuple

from pydantic import ValidationError

from lookalike import storage
from lookalike.errors import UsageError
from lookalike.plain_yaml import parse_yaml
from lookalike.serve.front.quota import Meter
from lookalike.serve.settings.security import Tenant, TenantsFile
from lookalike.telemetry import fields, get_logger

log = get_logger(__name__)
MOST_BYTES = 8 << 20
"""Size of the file: some 40,000 tenants."""
CHECK_S = 2.0
"""Pause between two looks at the file, in seconds."""


class TenantAccount(NamedTuple):
    """A tenant and the meter of what it used."""

    tenant: Tenant
    meter: Meter


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
        self._tenants: Sequence[Tenant] = _parse(uri, self._content)
        self._meters: dict[str, Meter] = {}
        self._ended = threading.Event()
        threading.Thread(target=self._watch, name="lookalike-tenants", daemon=True).start()

    def find(self, token: str) -> TenantAccount | None:
        """Return the tenant of ``token``, in a time that does not tell how much of the token is right."""
        digest, owner = hash_token(token), None
        for tenant in self._tenants:
            for valid in tenant.token_sha256:
                if hmac.compare_digest(digest, valid):
                    owner = tenant
        return None if owner is None else TenantAccount(owner, self._meters.setdefault(owner.name, Meter()))

    def refresh(self) -> None:
        """Read the file again. A missing or broken file is logged and changes nothing."""
        try:
            content = _read(self._uri)
            if content != self._content:
                self._tenants = _parse(self._uri, content)
                self._content = content
                log.info("tenants changed %s", fields(uri=self._uri, num=len(self._tenants)))
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
