"""``lookalike serve`` with TLS, client certificates and tokens, asked by ``lookalike search``."""

import json
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

from lookalike.cli import main
from lookalike.serve.app import MESSAGE_VARIABLE, free_port
from lookalike.serve.client import Client, ClientTls
from lookalike.serve.client.credentials import TOKEN_VARIABLE
from lookalike.serve.wire.errors import RetrievalError
from tests.serve.front.certificates import Authority

if TYPE_CHECKING:
    from tests.serve.conftest import World

pytestmark = pytest.mark.ray
STEPS = 600


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Signal handlers as they were."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def add_tenant(path: Path, name: str, token: Path, capsys: pytest.CaptureFixture[str], role: str = "read") -> None:
    capsys.readouterr()
    assert main(["token", name, "--role", role, "--out", str(token)]) == 0
    path.write_text((path.read_text() if path.exists() else "tenants:\n") + capsys.readouterr().out)


def test_a_service_for_those_with_certificate_and_token(
    ray_session: None,
    world: "World",
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    monkeypatch.setenv(MESSAGE_VARIABLE, str(64 << 20))  # which the command sets, and the test's end takes back
    authority, port = Authority(tmp_path, "authority"), free_port()
    server, client = authority.issue("server"), authority.issue("client")
    tenants, token, later = tmp_path / "tenants.yaml", tmp_path / "token", tmp_path / "later"
    add_tenant(tenants, "shop", token, capsys)
    access = ["--tls-ca", str(authority.path), "--tls-cert", str(client[0]), "--tls-key", str(client[1])]
    ask = ["search", "--id", "img-003", "-k", "1", "--json", "--timeout", "60", "--address", f"127.0.0.1:{port}"]
    outcomes: dict[str, object] = {}

    def visit() -> None:
        """What callers meet, from start to the death of the proxy."""
        tls = ClientTls(authority.path, *client)
        try:
            with Client(f"127.0.0.1:{port}", tls=tls) as waiting:
                waiting.wait_ready(300)
            capsys.readouterr()
            outcomes["all"] = main([*ask, *access, "--token-file", str(token)])
            outcomes["found"] = json.loads(capsys.readouterr().out)["hits"][0]["id"]
            outcomes["no token"] = main([*ask, *access])
            outcomes["its words"] = capsys.readouterr().err
            outcomes["no certificate"] = main([*ask, *access[:2], "--token-file", str(token)])
            outcomes["plain text"] = main([*ask, "--token-file", str(token)])
            admin = ["admin", "status", "--address", f"127.0.0.1:{port}", *access, "--token-file", str(token)]
            outcomes["admin"] = main(admin)
            outcomes["admin's words"] = capsys.readouterr().err.splitlines()[-1]
            tenants.unlink()
            add_tenant(tenants, "other", later, capsys)
            outcomes["rotated"] = wait_for_change(port, tls, later.read_text().strip(), token.read_text().strip())
        finally:
            for child in psutil.Process().children():
                if child.name() == "haproxy":
                    child.kill()

    visitor = threading.Thread(target=visit)
    visitor.start()
    served = main(
        [
            "serve",
            "--index",
            world.index,
            "port=0",
            f"tls.port={port}",
            f"tls.certificate={server[0]}",
            f"tls.key={server[1]}",
            f"tls.client_ca={authority.path}",
            f"tenants={tenants}",
            "cpus_per_replica=0.1",
            f"access_log.folder={tmp_path / 'log'}",
        ]
    )
    visitor.join()
    assert (outcomes["all"], outcomes["found"]) == (0, "img-003")
    assert (outcomes["no token"], outcomes["no certificate"], outcomes["plain text"], outcomes["admin"]) == (2, 1, 1, 2)
    assert "UNAUTHENTICATED: this service asks for a token" in str(outcomes["its words"])
    assert "Status needs the role 'admin', tenant 'shop' has 'read'" in str(outcomes["admin's words"])
    assert outcomes["rotated"]
    assert served == 1  # the proxy's death was noticed
    text = "".join(path.read_text() for path in (tmp_path / "log").glob("*.jsonl"))
    lines = [json.loads(line) for line in text.splitlines()]
    assert {line.get("tenant") for line in lines if line["code"] == "OK"} == {"shop", "other"}
    assert not [line for line in lines if line["code"] == "OK" and not line.get("tenant")]  # nobody without a token
    assert not [secret for secret in (token, later) if secret.read_text().strip() in text]


def wait_for_change(port: int, tls: ClientTls, fresh: str, old: str) -> bool:
    """Whether ``fresh`` is admitted before long, and ``old`` is not after it."""
    pause = threading.Event()
    for _ in range(STEPS):
        try:
            with Client(f"127.0.0.1:{port}", tls=tls, token=fresh) as client:
                client.describe()
            break
        except RetrievalError:
            pause.wait(0.1)
    with Client(f"127.0.0.1:{port}", tls=tls, token=old) as client, pytest.raises(RetrievalError, match="UNAUTHENTI"):
        client.describe()
    return True
