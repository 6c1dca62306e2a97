"""What keeps strangers out, checked before a service starts: settings that contradict each other, files that others
may write or read, certificates out of date, a Ray cluster without tokens.
"""

import os
import ssl
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray

from lookalike import storage
from lookalike.cluster import token_file
from lookalike.errors import UsageError
from lookalike.serve.front.tenants import read_tenants
from lookalike.serve.front.tls import LOOPBACK, check_files
from lookalike.serve.settings.config import ServeConfig
from lookalike.serve.settings.security import Tls
from lookalike.telemetry import fields, get_logger

log = get_logger(__name__)
SOON_S = 14 * 86_400
"""Time before its end from which a certificate is warned of, in seconds."""
OUT_OF_DATE = {9: "is not valid yet", 10: "has expired"}
"""X509_V_ERR_CERT_NOT_YET_VALID and X509_V_ERR_CERT_HAS_EXPIRED."""


def check_guard(config: ServeConfig) -> None:
    """Raise ``UsageError`` if the access settings contradict each other, or their files are missing or not safe."""
    if config.loopback_only and os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1":
        raise UsageError(
            "loopback_only=true cannot hold behind HAProxy, where every caller looks local; set "
            "serve.loopback_only=false and guard the port by network policy"
        )
    if config.tenants is not None:
        check_writers("tenants", config.tenants)
        read_tenants(config.tenants)
    if config.writes.state is not None and not config.loopback_only and config.tenants is None:
        raise UsageError(
            "writes.state lets whoever reaches the port write and switch indexes, and loopback_only=false "
            "admits every machine; set serve.tenants, so that it takes a token"
        )
    if config.tls.client_ca is not None and not config.loopback_only and config.tenants is None:
        raise UsageError(
            "tls.client_ca asks for certificates at the TLS port, and loopback_only=false admits every machine at the "
            "plain port, which asks for none; leave loopback_only true, or set serve.tenants"
        )
    check_files(config.tls)
    _check_tls(config.tls)
    guarded = config.tenants is not None or config.tls.client_ca is not None
    if config.tls.enabled and config.tls.host not in LOOPBACK and config.loopback_only and not guarded:
        raise UsageError(
            f"tls.host={config.tls.host} admits callers from other machines, who look local to "
            "loopback_only=true; set serve.tenants or tls.client_ca, or loopback_only=false to admit "
            "everyone"
        )


def check_writers(setting: str, uri: str) -> None:
    """Raise ``UsageError`` for a local file that every user of the machine may change or replace; warn of a group."""
    if not storage.is_local(uri) or not os.path.exists(path := storage.local_path(uri)):
        return  # a missing file has an error of its own
    mode, folder = os.stat(path).st_mode, os.stat(os.path.dirname(os.path.realpath(path))).st_mode
    if mode & stat.S_IWOTH or (folder & stat.S_IWOTH and not folder & stat.S_ISVTX):
        where = path if mode & stat.S_IWOTH else os.path.dirname(os.path.realpath(path))
        raise UsageError(
            f"{setting}={path}: every user of this machine may write {where} and so decide who may call; "
            f"run `chmod o-w {where}`"
        )
    if mode & stat.S_IWGRP:
        log.warning("a group may write %s", fields(setting=setting, path=path, mode=f"{mode & 0o777:04o}"))


def _check_tls(tls: Tls) -> None:
    if tls.certificate is None or tls.key is None:
        return
    for name, path in tls.model_dump(include={"certificate", "key", "client_ca"}, exclude_none=True).items():
        check_writers(f"tls.{name}", path)
    if os.stat(tls.key).st_mode & stat.S_IROTH:
        log.warning("every user of this machine may read the key %s", fields(path=tls.key, remedy="chmod o-r"))
    left_s = _seconds_left(tls.certificate, tls.key)
    if left_s < SOON_S:
        log.warning("the certificate ends soon %s", fields(path=tls.certificate, days=round(left_s / 86_400, 1)))


def _seconds_left(certificate: str, key: str) -> float:
    """Seconds for which a certificate is valid; ``UsageError`` if it is out of date.

    A handshake in memory tells: the client trusts the very certificates in the file, and minds their dates.
    """
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    server.load_cert_chain(certificate, key)
    client.check_hostname = False
    client.load_verify_locations(certificate)
    client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    ours = server.wrap_bio(to_server, to_client, server_side=True)
    theirs = client.wrap_bio(to_client, to_server)
    try:
        for side in (theirs, ours, theirs):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
    except ssl.SSLCertVerificationError as error:
        if error.verify_code in OUT_OF_DATE:
            raise UsageError(
                f"tls.certificate={certificate} {OUT_OF_DATE[error.verify_code]}, and clients refuse it; renew it, or "
                "set this machine's clock"
            ) from None
        log.warning("clients may refuse the certificate %s", fields(path=certificate, reason=error.verify_message))
        return float("inf")
    end = (theirs.getpeercert() or {}).get("notAfter")
    return float("inf") if end is None else ssl.cert_time_to_seconds(str(end)) - time.time()


def check_tokens(config: ServeConfig) -> None:
    """Raise ``UsageError`` where other machines may call, but the cluster lets anyone run code.

    ``ray.init`` turns Ray's tokens on by itself, ``ray start`` only where a token exists already.
    """
    mode = os.environ.get("RAY_AUTH_MODE", "").lower()
    if config.loopback_only or not ray.is_initialized() or mode == "token":
        return
    if not mode:
        raise UsageError(
            "this Ray cluster asks for no token, so whoever reaches its ports runs code as the service; export "
            "RAY_AUTH_MODE=token before `ray start` on every node (authOptions: {mode: token} in KubeRay), or "
            "RAY_AUTH_MODE=disabled if its ports are guarded otherwise"
        )
    log.warning("Ray asks for no token: whoever reaches its ports runs code as the service %s", fields(mode=mode))


@contextmanager
def private_files() -> Iterator[None]:
    """Let no other user read what this process and its children write in this block, nor Ray's token."""
    before = os.umask(0o077)
    try:
        path = token_file()
        if path.exists() and path.stat().st_mode & 0o077:
            _close(path)
        yield
    finally:
        os.umask(before)


def _close(path: Path) -> None:
    try:
        path.chmod(0o600)
    except OSError as error:
        raise UsageError(
            f"other users may read Ray's token {path}, and run code with it as this service ({error.strerror}); make "
            "it the service's own and run `chmod 600` on it"
        ) from None
    log.warning("other users could read Ray's token, and no longer can %s", fields(path=path))
