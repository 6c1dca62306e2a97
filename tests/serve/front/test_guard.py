"""What is refused or warned of before a service starts."""

import datetime
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from lookalike.cluster import warn_of_token
from lookalike.errors import UsageError
from lookalike.serve.front.guard import check_guard, check_tokens, private_files
from lookalike.serve.settings.config import ServeConfig
from lookalike.serve.settings.security import Tls
from tests.serve.front import certificates
from tests.serve.front.certificates import Authority

TENANTS = "tenants:\n- {name: a, token_sha256: ['" + "0" * 64 + "'], role: write}\n"
NOW = datetime.datetime.now()
DAY = datetime.timedelta(days=1)


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.LogCaptureFixture]:
    monkeypatch.setattr(logging.getLogger("lookalike"), "propagate", True)
    with caplog.at_level(logging.WARNING):
        yield caplog


def tls_of(folder: Path, start: datetime.datetime, days: int, monkeypatch: pytest.MonkeyPatch) -> Tls:
    monkeypatch.setattr(certificates, "START", start)
    monkeypatch.setattr(certificates, "DAYS", datetime.timedelta(days=days))
    authority = Authority(folder, "authority")
    certificate, key = authority.issue("server")
    key.chmod(0o600)
    return Tls(certificate=str(certificate), key=str(key), client_ca=str(authority.path))


@pytest.mark.parametrize(
    ("start", "days", "words"),
    [(NOW - 30 * DAY, 29, "has expired"), (NOW + 2 * DAY, 30, "is not valid yet"), (NOW - DAY, 400, None)],
)
def test_a_certificate_out_of_date_is_refused(
    start: datetime.datetime, days: int, words: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ServeConfig(index="x", tls=tls_of(tmp_path, start, days, monkeypatch))
    if words is None:
        check_guard(config)
        return
    with pytest.raises(UsageError, match=rf"server\.crt {words}"):
        check_guard(config)


def test_what_is_not_wrong_yet_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings: pytest.LogCaptureFixture
) -> None:
    tls = tls_of(tmp_path, NOW - DAY, 4, monkeypatch)
    check_guard(ServeConfig(index="x", tls=tls))
    assert "the certificate ends soon" in warnings.text
    assert "days=3" in warnings.text or "days=2.9" in warnings.text
    assert tls.key is not None
    Path(tls.key).chmod(0o644)
    tenants = tmp_path / "tenants.yaml"
    tenants.write_text(TENANTS)
    tenants.chmod(0o660)
    check_guard(ServeConfig(index="x", tls=tls, tenants=str(tenants)))
    assert "may read the key" in warnings.text
    assert "a group may write" in warnings.text


def test_certificates_of_clients_do_not_guard_the_plain_port(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tls = tls_of(tmp_path, NOW - DAY, 400, monkeypatch)
    with pytest.raises(UsageError, match="plain port, which asks for none"):
        check_guard(ServeConfig(index="x", tls=tls, loopback_only=False))
    tenants = tmp_path / "tenants.yaml"
    tenants.write_text(TENANTS)
    check_guard(ServeConfig(index="x", tls=tls, loopback_only=False, tenants=str(tenants)))


def test_files_that_everybody_may_change_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tenants, tls = tmp_path / "tenants.yaml", tls_of(tmp_path, NOW - DAY, 400, monkeypatch)
    tenants.write_text(TENANTS)
    config = ServeConfig(index="x", tls=tls, tenants=str(tenants))
    check_guard(config)
    assert tls.certificate is not None
    for path in (tenants, Path(tls.certificate)):
        path.chmod(0o666)
        with pytest.raises(UsageError, match=f"every user of this machine may write {path}.*chmod o-w"):
            check_guard(config)
        path.chmod(0o600)
    tmp_path.chmod(0o777)  # who writes the folder replaces the file
    with pytest.raises(UsageError, match=f"may write {tmp_path} "):
        check_guard(config)
    tmp_path.chmod(0o1777)  # as /tmp
    check_guard(config)


@pytest.mark.parametrize(("mode", "passes"), [("", False), ("token", True), ("TOKEN", True), ("disabled", True)])
def test_a_cluster_without_tokens_is_refused(mode: str, passes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setenv("RAY_AUTH_MODE", mode)
    check_tokens(ServeConfig(index="x"))  # nobody calls from elsewhere
    if passes:
        check_tokens(ServeConfig(index="x", loopback_only=False))
        return
    with pytest.raises(UsageError, match="RAY_AUTH_MODE=token before `ray start`"):
        check_tokens(ServeConfig(index="x", loopback_only=False))


def test_nobody_else_reads_what_a_service_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings: pytest.LogCaptureFixture
) -> None:
    token = tmp_path / "auth_token"
    token.write_text("t")
    token.chmod(0o644)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    warn_of_token()
    assert f"chmod 600 {token}" in warnings.text
    assert token.stat().st_mode & 0o777 == 0o644  # other verbs only say so
    before = os.umask(0o022)
    try:
        with private_files():
            (tmp_path / "log").write_text("")
        (tmp_path / "later").write_text("")
    finally:
        os.umask(before)
    modes = [path.stat().st_mode & 0o777 for path in (token, tmp_path / "log", tmp_path / "later")]
    assert modes == [0o600, 0o600, 0o644]
