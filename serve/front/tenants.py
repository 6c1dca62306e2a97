"""Who may ask what, and how much: bearer tokens, roles and quotas of tenants, from a file that is read again on change.

The file holds SHA-256 hashes, never tokens, so reading it gives no access. ``lookalike token NAME`` makes both.
"""

import hashlib
import hmac
import threading
from collections.abc import Sequence
from typing import NamedTuple

import yaml
from pydantic import ValidationError

from lookalike import storage
from lookalike.errors import UsageError
from lookalike.serve.front.quota import Meter
from lookalike.serve.settings.security import Tenant, TenantsFile
from lookalike.telemetry import fields, get_logger

log = get_logger(__name__)
CHECK_S = 2.0
"""How often the file is looked at, in seconds."""


class TenantAccount(NamedTuple):
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

    def find(self, token: str) -> TenantAccount | None:
        """The tenant of ``token``; how long it takes does not tell how much of a token is right."""
        digest, found = hash_token(token), None
        for tenant in self._tenants:
            for known in tenant.token_sha256:
                if hmac.compare_digest(digest, known):
                    found = tenant
        return None if found is None else TenantAccount(found, self._meters.setdefault(found.name, Meter()))

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
