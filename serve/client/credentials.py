"""What a client shows to the service: a bearer token, and certificates of TLS. Needs grpcio, nothing else."""

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from lookalike.errors import UsageError

TOKEN_VARIABLE = "LOOKALIKE_TOKEN"
Paths = str | Path


@dataclass(frozen=True)
class ClientTls:
    """TLS towards the service; every field is the path of a PEM file or left out."""

    ca: Paths | None = None
    """Certificates of the authorities that the service's is signed by; None takes the public ones that gRPC brings."""
    certificate: Paths | None = None
    """The client's own certificate, where the service asks for one (mTLS)."""
    key: Paths | None = None
    """Its key."""
    server_name: str = ""
    """Name in the service's certificate, when it is not the one it is called by."""

    def credentials(self) -> grpc.ChannelCredentials:
        """For a secure channel; raises ``UsageError`` for what cannot be read."""
        if (self.certificate is None) != (self.key is None):
            raise UsageError("the client's certificate and its key belong together; give both, or neither")
        return grpc.ssl_channel_credentials(_read(self.ca), _read(self.key), _read(self.certificate))

    def options(self) -> list[tuple[str, Any]]:
        """Options of the channel."""
        return [("grpc.ssl_target_name_override", self.server_name)] if self.server_name else []


def _read(path: Paths | None) -> bytes | None:
    if path is None:
        return None
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror or error}); give the path of a PEM file") from None


def open_channel(grpc_module: Any, address: str, tls: ClientTls | None, options: Sequence[tuple[str, Any]]) -> Any:
    """A channel of ``grpc`` or ``grpc.aio``."""
    if tls is None:
        return grpc_module.insecure_channel(address, options=options)
    return grpc_module.secure_channel(address, tls.credentials(), options=[*options, *tls.options()])


def call_metadata(application: str, token: str | None) -> tuple[tuple[str, str], ...]:
    """The metadata of each call; raises ``UsageError`` for a token that no header can hold."""
    pairs = [("application", application)] if application else []
    if token is not None:
        if not token or not token.isascii() or not token.isprintable() or " " in token:
            raise UsageError(
                f"the token ({len(token)} characters) is empty or holds more than visible ASCII; give the "
                "one that `lookalike token` printed"
            )
        pairs.append(("authorization", f"Bearer {token}"))
    return tuple(pairs)


def read_token(path: Path | None) -> str | None:
    """The token in the file at ``path``, or in the environment; None without either."""
    if path is None:
        return os.environ.get(TOKEN_VARIABLE, "").strip() or None
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--token-file {path} cannot be read ({error}); give a file that holds the token") from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of a command that asks a service."""
    group = parser.add_argument_group("access")
    group.add_argument(
        "--token-file",
        type=Path,
        metavar="FILE",
        help=f"file that holds the token (default: the environment's {TOKEN_VARIABLE})",
    )
    group.add_argument("--tls", action="store_true", help="TLS by the public certificate authorities")
    group.add_argument("--tls-ca", metavar="FILE", help="TLS by the certificate authorities in this PEM file")
    group.add_argument("--tls-cert", metavar="FILE", help="this client's certificate, where the service asks for one")
    group.add_argument("--tls-key", metavar="FILE", help="its key")


def read_tls(options: argparse.Namespace) -> ClientTls | None:
    """TLS as the flags ask for it."""
    paths = options.tls_ca, options.tls_cert, options.tls_key
    return ClientTls(*paths) if options.tls or any(paths) else None
