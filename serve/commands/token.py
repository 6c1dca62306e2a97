"""``lookalike token``: make a bearer token of a tenant."""

import os
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml
from pydantic import ValidationError

from lookalike.errors import UsageError
from lookalike.flags import Parser
from lookalike.serve.front.tenants import hash_token
from lookalike.serve.settings.security import ROLES, Tenant


def token(args: Sequence[str]) -> int:
    """Make a token: its tenants entry goes to stdout, the token itself once to stderr or a file."""
    parser = Parser(
        prog="lookalike token",
        description="Make a bearer token for a tenant. Its entry goes to stdout: "
        "`lookalike token NAME >> tenants.yaml` adds it to a file that begins with the line `tenants:`.",
    )
    parser.add_argument("name", help="the tenant's name")
    parser.add_argument("--role", choices=ROLES, default="read", help="default: %(default)s")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the token to this new file, for its owner only")
    options = parser.parse_args(args)
    fresh = secrets.token_urlsafe(32)
    try:
        entry = Tenant(name=options.name, role=options.role, token_sha256=(hash_token(fresh),))
    except ValidationError:
        raise UsageError(
            f"{options.name!r} cannot name a tenant; take up to 63 letters, digits, dots, dashes and underscores"
        ) from None
    if options.out is None:
        sys.stderr.write(f"the token, shown only once: {fresh}\n")
    else:
        _write_secret(options.out, fresh)
    entries = [entry.model_dump(mode="json", exclude={"quota"})]
    print(yaml.safe_dump(entries, sort_keys=False, default_flow_style=None, width=200), end="")
    return 0


def _write_secret(path: Path, text: str) -> None:
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(f"{text}\n")
    except OSError as error:
        raise UsageError(f"--out {path} cannot be written ({error.strerror or error}); name a new file") from None
