"""TLS and mTLS: HAProxy as it is configured and run, in front of a gRPC server; certificates made on the spot."""

import asyncio
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from lookalike.errors import LookalikeError, UsageError
from lookalike.serve.app import build, free_port
from lookalike.serve.client import AsyncClient, Client, ClientTls
from lookalike.serve.commands.serve import emit_config, is_setting
from lookalike.serve.front.guard import check_guard
from lookalike.serve.front.tls import check_files, proxy, render
from lookalike.serve.proto import retrieval_pb2 as pb
from lookalike.serve.proto import retrieval_pb2_grpc as pb_grpc
from lookalike.serve.settings.config import ServeConfig
from lookalike.serve.settings.security import Tls
from lookalike.serve.wire.errors import RetrievalError
from tests.serve.front.certificates import Authority

VECTOR = np.ones(8, np.float32)


class Echo(pb_grpc.RetrievalServiceServicer):
    """Answers with the metadata that arrives."""

    def Search(self, request: pb.SearchRequest, context: grpc.ServicerContext) -> pb.SearchResponse:
        metadata = {key: str(value) for key, value in context.invocation_metadata()}
        return pb.SearchResponse(hits=[pb.Hit(id="hit", metadata=metadata)])

    def SearchStream(self, requests: Iterator[pb.SearchStreamRequest], context: grpc.ServicerContext) -> Any:
        for request in requests:
            yield pb.SearchStreamResponse(tag=request.tag, batch=pb.SearchBatchResponse())


def unavailable() -> Any:
    return pytest.raises(RetrievalError, match=r"^(UNAVAILABLE|DEADLINE_EXCEEDED)")


@pytest.fixture(scope="module")
def backend() -> Iterator[int]:
    server = grpc.server(ThreadPoolExecutor(4))
    pb_grpc.add_RetrievalServiceServicer_to_server(Echo(), server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield port
    server.stop(None).wait()


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("certificates"), "authority")


@pytest.fixture(scope="module")
def tls(authority: Authority) -> Tls:
    certificate, key = authority.issue("server")
    return Tls(certificate=str(certificate), key=str(key), port=free_port())


def test_calls_go_through_with_their_metadata(backend: int, tls: Tls, authority: Authority) -> None:
    encrypted = ClientTls(ca=authority.path)
    with proxy(tls, backend) as running, Client(running.address, tls=encrypted, token="abc") as client:
        (hit,) = client.search(vector=VECTOR).hits
        assert hit.metadata["authorization"] == "Bearer abc"
        assert hit.metadata["x-forwarded-for"] == "127.0.0.1"
        assert len(list(client.search_stream([[VECTOR]] * 20))) == 20
        running.check()

        async def ask() -> str:
            async with AsyncClient(running.address, tls=encrypted, token="xyz") as asking:
                return (await asking.search(vector=VECTOR)).hits[0].metadata["authorization"]

        assert asyncio.run(ask()) == "Bearer xyz"


def test_plain_text_and_strange_authorities_are_refused(backend: int, tls: Tls, tmp_path: Path) -> None:
    with proxy(tls, backend) as running:
        for credentials in (None, ClientTls(ca=Authority(tmp_path, "other").path)):
            with Client(running.address, tls=credentials, timeout_s=3) as client, unavailable():
                client.search(vector=VECTOR)


@pytest.mark.parametrize(("version", "spoken"), [(ssl.TLSVersion.TLSv1_1, False), (ssl.TLSVersion.TLSv1_2, True)])
def test_old_tls_is_not_spoken(backend: int, tls: Tls, version: ssl.TLSVersion, spoken: bool) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.minimum_version = context.maximum_version = version
    context.set_ciphers("DEFAULT:@SECLEVEL=0")
    context.set_alpn_protocols(["h2"])
    with proxy(tls, backend), socket.create_connection((tls.host, tls.port), timeout=5) as plain:
        try:
            with context.wrap_socket(plain) as wrapped:
                assert (spoken, wrapped.selected_alpn_protocol()) == (True, "h2")
        except ssl.SSLError:
            assert not spoken


def test_mtls_asks_for_a_certificate_of_its_authority(
    backend: int, tls: Tls, authority: Authority, tmp_path: Path
) -> None:
    mutual = tls.model_copy(update={"client_ca": str(authority.path)})
    certificate, key = authority.issue("client")
    strange = Authority(tmp_path, "strange").issue("stranger")
    with proxy(mutual, backend) as running:
        with Client(running.address, tls=ClientTls(authority.path, certificate, key)) as client:
            assert client.search(vector=VECTOR).ids == ["hit"]
        for credentials in (ClientTls(authority.path), ClientTls(authority.path, *strange)):
            with Client(running.address, tls=credentials, timeout_s=3) as client, unavailable():
                client.search(vector=VECTOR)


def test_a_proxy_that_dies_is_noticed_and_one_that_lives_ends_with_the_block(backend: int, tls: Tls) -> None:
    with proxy(tls, backend) as running:
        running.check()
        running.process.kill()
        running.process.wait()
        with pytest.raises(LookalikeError, match="ended with code -9"):
            running.check()
    with proxy(tls, backend) as running:
        pass
    assert running.process.returncode is not None
    free_port(tls.port)


def test_a_proxy_that_cannot_start_is_noticed(backend: int, tls: Tls, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no certificate")
    with proxy(tls.model_copy(update={"certificate": str(tmp_path / "text")}), backend) as running:
        running.process.wait(10)
        with pytest.raises(LookalikeError, match="ended with code 1; its reason stands above"):
            running.check()
    with proxy(tls, backend), pytest.raises(UsageError, match="cannot be used"), proxy(tls, backend):
        pytest.fail("two proxies on one port")


KILLED = """
import os, signal, sys
from lookalike.serve.front.tls import proxy
from lookalike.serve.settings.security import Tls
with proxy(Tls.model_validate_json(sys.argv[1]), int(sys.argv[2])):
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child of its parent's death")
def test_a_killed_service_takes_the_proxy_along(backend: int, tls: Tls) -> None:
    command = [sys.executable, "-c", KILLED, tls.model_dump_json(), str(backend)]
    done = subprocess.run(command, capture_output=True, check=False, timeout=60)  # until both have closed its pipes
    assert done.returncode == -signal.SIGKILL, done.stderr
    free_port(tls.port)


def test_without_a_service_the_proxy_says_unavailable(tls: Tls, authority: Authority) -> None:
    encrypted = ClientTls(authority.path)
    with proxy(tls, free_port()) as running, Client(running.address, tls=encrypted) as client, unavailable():
        client.search(vector=VECTOR)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ({"certificate": "missing"}, "tls.certificate=.*missing cannot be read"),
        ({"key": "missing"}, "tls.key=.*missing cannot be read"),
        ({"client_ca": "missing"}, "tls.client_ca=.*missing cannot be read"),
        ({"key": "other.key"}, "not a PEM certificate and its key"),
        ({"certificate": "text"}, "not a PEM certificate and its key"),
        ({"key": "locked.key", "certificate": "locked.crt"}, "encrypted with a passphrase"),
        ({"client_ca": "text"}, "holds no PEM certificates"),
    ],
)
def test_files_that_cannot_be_used_are_explained(tmp_path: Path, names: dict[str, str], words: str) -> None:
    made = Authority(tmp_path, "authority")
    for name, passphrase in (("server", None), ("other", None), ("locked", b"secret")):
        made.issue(name, passphrase)
    (tmp_path / "text").write_text("no certificate")
    files = {"certificate": "server.crt", "key": "server.key", "client_ca": "authority.pem"}
    check_files(Tls(**{name: str(tmp_path / file) for name, file in files.items()}))
    broken = Tls(**{name: str(tmp_path / file) for name, file in {**files, **names}.items()})
    with pytest.raises(UsageError, match=words):
        check_files(broken)
    with pytest.raises(UsageError, match=words):  # and so before anything is looked for or started
        check_guard(ServeConfig(index="/no/index", tls=broken))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"certificate": "a"}, "belong together"),
        ({"key": "a"}, "belong together"),
        ({"client_ca": "a"}, "needs certificate and key"),
        ({"host": "a b"}, "pattern"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Tls(**settings)


def test_strangers_are_not_let_in_by_the_proxy_that_looks_local(tls: Tls, authority: Authority) -> None:
    wide = tls.model_copy(update={"host": "0.0.0.0"})
    with pytest.raises(UsageError, match=r"tls.host=0.0.0.0 admits callers from other machines.*tls.client_ca"):
        check_guard(ServeConfig(index="x", tls=wide))
    check_guard(ServeConfig(index="x", tls=wide, loopback_only=False))
    check_guard(ServeConfig(index="x", tls=wide.model_copy(update={"client_ca": str(authority.path)})))


def test_a_serve_application_refuses_tls_and_the_emitted_config_has_none(tls: Tls) -> None:
    config = ServeConfig(index="x", tls=tls)
    with pytest.raises(UsageError, match="tls is for `lookalike serve`"):
        build(config)
    assert "tls" not in emit_config(config)
    assert is_setting("tls.certificate")


def test_the_configuration_says_no_more_than_it_should() -> None:
    lines = render("/f", bind="127.0.0.1:1", backend="127.0.0.1:2", mutual=False).splitlines()
    assert "    bind 127.0.0.1:1 ssl crt /f/tls.crt alpn h2" in lines
    mutual = render("/f", bind="127.0.0.1:1", backend="127.0.0.1:2", mutual=True).splitlines()
    assert [line for line in mutual if line not in lines] == [
        "    bind 127.0.0.1:1 ssl crt /f/tls.crt alpn h2 ca-file /f/ca.crt verify required"
    ]


def test_the_program_of_the_manifest_runs_it(backend: int, tls: Tls, authority: Authority, tmp_path: Path) -> None:
    (tmp_path / "tls.crt").symlink_to(str(tls.certificate))
    (tmp_path / "tls.key").symlink_to(str(tls.key))
    address = f"127.0.0.1:{free_port()}"
    config = tmp_path / "haproxy.cfg"
    config.write_text(render(str(tmp_path), bind=address, backend=f"127.0.0.1:{backend}", mutual=False))
    with subprocess.Popen([sys.executable, "-m", "lookalike.serve.front.tls", str(config)]) as process:
        try:
            with Client(address, tls=ClientTls(authority.path)) as client:
                client.wait_ready()
                assert client.search(vector=VECTOR).ids == ["hit"]
        finally:
            process.terminate()


def test_a_client_explains_what_it_cannot_use(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"/no/ca\.pem cannot be read"):
        Client(tls=ClientTls(ca="/no/ca.pem"))
    with pytest.raises(UsageError, match="belong together"):
        Client(tls=ClientTls(certificate="a"))
    for token in ("", "a b", "a\nb", "é"):
        with pytest.raises(UsageError, match="is empty or holds more"):
            Client(token=token)
