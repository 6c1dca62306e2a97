"""A client's credentials: bearer token and TLS certificates. Needs only grpcio."""

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from lookalike.arguments import check_text, show
from lookalike.errors import ArgumentError, UsageError

TOKEN_VARIABLE = "LOOKALIKE_TOKEN"
PathLike = str | Path


@dataclass(frozen=True)
class ClientTls:
    """TLS settings of a client; each path names a PEM file."""

    ca: PathLike | None = None
    """Authorities that may have signed the service's certificate; None takes the public ones that come with gRPC."""
    certificate: PathLike | None = None
    """The client's certificate, if the service asks for one (mTLS)."""
    key: PathLike | None = None
    """The key of ``certificate``."""
    server_name: str = ""
    """Name in the service's certificate, if it differs from the host in the address."""

    def credentials(self) -> grpc.ChannelCredentials:
        """Return the credentials of a secure channel; raises ``UsageError`` for a file that cannot be read."""
        if (self.certificate is None) != (self.key is None):
            raise UsageError("the client's certificate and its key belong together; give both, or neither")
        return grpc.ssl_channel_credentials(_read(self.ca), _read(self.key), _read(self.certificate))

    def options(self) -> list[tuple[str, Any]]:
        return [("grpc.ssl_target_name_override", self.server_name)] if self.server_name else []


def _read(path: PathLike | None) -> bytes | None:
    if path is None:
        return None
    try:
        return Path(path).read_bytes()
    except (OSError, TypeError, ValueError) as error:
        if "-----BEGIN" in str(path):
            raise UsageError("the content of a PEM file was given; give its path") from None
        reason = getattr(error, "strerror", None) or type(error).__name__
        name = path if isinstance(path, (str, Path)) else show(path)
        raise UsageError(f"{name} cannot be read ({reason}); give the path of a PEM file") from None


def open_channel(grpc_module: Any, address: str, tls: ClientTls | None, options: Sequence[tuple[str, Any]]) -> Any:
    """Open a channel of ``grpc`` or ``grpc.aio``, encrypted if ``tls`` is given."""
    if tls is not None and not isinstance(tls, ClientTls):
        raise ArgumentError(f"tls is {show(tls)}; give a ClientTls, or leave it out for plain text")
    if tls is None:
        return grpc_module.insecure_channel(address, options=options)
    return grpc_module.secure_channel(address, tls.credentials(), options=[*options, *tls.options()])


def call_metadata(application: str, token: str | None) -> tuple[tuple[str, str], ...]:
    """Return the metadata of every call; raises ``UsageError`` for a name or token that does not fit into a header."""
    if not check_text("application", application).isascii() or not application.isprintable():
        raise UsageError(
            f"application={show(application)} holds more than printable ASCII, which a header cannot carry; give the "
            "name of the Serve application"
        )
    pairs = [("application", application)] if application else []
    if token is not None:
        if not isinstance(token, str):
            raise ArgumentError(f"the token is {show(token)}; give a str")
        if not token or not token.isascii() or not token.isprintable() or " " in token:
            raise UsageError(
                f"the token ({len(token)} characters) is empty or holds more than visible ASCII; give the "
                "one that `lookalike token` printed"
            )
        pairs.append(("authorization", f"Bearer {token}"))
    return tuple(pairs)


def read_token(path: Path | None) -> str | None:
    """Return the token from the file at ``path`` or, without a path, from the environment; None if there is none."""
    if path is None:
        return os.environ.get(TOKEN_VARIABLE, "").strip() or None
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--token-file {path} cannot be read ({error}); give a file that holds the token") from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the access flags of a command that calls the service."""
    group = parser.add_argument_group("access")
    token_help = f"file that holds the token (default: the environment's {TOKEN_VARIABLE})"
    group.add_argument("--token-file", type=Path, metavar="FILE", help=token_help)
    group.add_argument("--tls", action="store_true", help="TLS by the public certificate authorities")
    group.add_argument("--tls-ca", metavar="FILE", help="TLS by the certificate authorities in this PEM file")
    group.add_argument("--tls-cert", metavar="FILE", help="this client's certificate, where the service asks for one")
    group.add_argument("--tls-key", metavar="FILE", help="its key")


def read_tls(options: argparse.Namespace) -> ClientTls | None:
    """Return the TLS settings that the flags of ``add_arguments`` ask for."""
    paths = options.tls_ca, options.tls_cert, options.tls_key
    return ClientTls(*paths) if options.tls or any(paths) else None
