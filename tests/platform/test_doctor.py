"""``lookalike doctor``: every fault that it knows is made here, and must be told with a remedy."""

import json
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lookalike.cli import main
from lookalike.commands import doctor as module
from lookalike.retrieval import native
from lookalike.serve.settings.config import ServeConfig

CheckOf = Callable[..., dict[str, Any]]


@pytest.fixture
def look(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> CheckOf:
    """``look(check, *flags)`` runs the command and returns the finding of that name."""
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_TMPDIR", "http_proxy", "https_proxy", "grpc_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))

    def run(check: str, *flags: str) -> dict[str, Any]:
        code = main(["doctor", "--json", *flags])
        findings = json.loads(capsys.readouterr().out)
        assert code == any(finding["state"] == "fail" for finding in findings)
        assert all(bool(finding["remedy"]) == (finding["state"] != "ok") for finding in findings)
        found: dict[str, Any] = next(each for each in findings if each["check"] == check)
        return found

    return run


def test_this_machine_can_run_what_is_tested(look: CheckOf, tmp_path: Path) -> None:
    for check in (*module.PACKAGES, "artifacts", "temporary files", "ray's token", "ray's address"):
        assert look(check, "--root", str(tmp_path / "not" / "yet" / "there"))["state"] == "ok"
    assert not (tmp_path / "not").exists()


def test_a_package_that_is_missing_or_does_not_fit(look: CheckOf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "polars", None)
    found = look("polars")
    assert (found["state"], found["remedy"]) == ("fail", "pip install 'lookalike[cpu]'")

    def unfit(name: str) -> SimpleNamespace:
        if name == "faiss":
            raise ImportError("libcudart.so.12: cannot open shared object file\nand more")
        return SimpleNamespace(__version__="1")

    monkeypatch.setattr(module.importlib, "import_module", unfit)
    found = look("faiss")
    assert found["state"] == "fail"
    assert found["seen"].endswith("libcudart.so.12: cannot open shared object file")
    assert "constraints.txt" in found["remedy"]


def test_a_missing_c_library_and_a_missing_extra(look: CheckOf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "AVAILABLE", False)
    assert look("C library")["state"] == "warn"
    monkeypatch.setitem(module.EXTRAS, "lance", (("no_such_module",), "Lance"))
    found = look("extra lance")
    assert (found["state"], found["remedy"]) == ("warn", "pip install 'lookalike[lance]' if you want that")


def test_a_driver_that_torch_does_not_see(look: CheckOf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert look("gpu")["state"] == "warn"  # who wants the CPU may have it


def test_a_folder_that_takes_no_files_or_has_no_space(
    look: CheckOf, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    found = look("artifacts", "--root", str(tmp_path / "file"))
    assert found["state"] == "fail"
    assert "Not a directory" in found["seen"]

    def locked(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    with monkeypatch.context() as patch:
        patch.setattr(module.fcntl, "flock", locked)
        assert "Operation not supported" in look("artifacts", "--root", str(tmp_path))["seen"]
    usage = shutil.disk_usage(tmp_path)._replace(free=1 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage)
    assert look("artifacts", "--root", str(tmp_path))["state"] == "warn"
    assert look("shared memory")["state"] == "warn"


def test_a_root_on_another_store(look: CheckOf) -> None:
    assert look("artifacts", "--root", "memory://bucket/run")["state"] == "ok"
    assert look("artifacts", "--root", "nosuch://bucket/run")["state"] == "fail"


def test_an_unusual_machine_ends_no_check(look: CheckOf, monkeypatch: pytest.MonkeyPatch) -> None:
    """Public reports of other doctors: no usable temporary folder, no home, a driver of another version, a lost folder
    (flutter 35981, 91963)."""

    def none() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found")

    def broken() -> int:
        raise RuntimeError("CUDA driver version is insufficient for CUDA runtime version")

    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH")
    monkeypatch.setattr(module.tempfile, "gettempdir", none)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", broken)
    monkeypatch.setattr(module.cluster, "count_cpus", broken)
    monkeypatch.setattr(Path, "home", none)
    for check in ("temporary files", "gpu", "capacity"):
        found = look(check)
        assert found["state"] == "warn"
        assert "cannot be looked at" in found["seen"]
    assert look("ray's token")["state"] in ("ok", "warn")


def test_a_containers_limit_of_memory_counts(look: CheckOf, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "limit").write_text(f"{3 << 30}\n")
    (tmp_path / "used").write_text(f"{1 << 30}\n")
    (tmp_path / "none").write_text("max\n")
    limits = ((tmp_path / "none", tmp_path / "used"), (tmp_path / "limit", tmp_path / "used"))
    monkeypatch.setattr(module, "MEMORY_LIMITS", limits)
    found = look("memory")
    assert found["state"] == "warn"
    assert found["seen"] == "2.0 GiB free of 3.0"


def test_a_port_that_is_taken(look: CheckOf) -> None:
    assert ServeConfig.model_fields["port"].default == module.SERVE_PORT
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        found = look("port", "--port", str(other.getsockname()[1]))
    assert found["state"] == "warn"
    assert "serve.port=N" in found["remedy"]
    with pytest.raises(SystemExit):
        main(["doctor", "--port", "70000"])


def test_what_ray_would_meet(look: CheckOf, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("secret")
    (tmp_path / "token").chmod(0o644)
    assert look("ray's token")["remedy"] == f"chmod 600 {tmp_path / 'token'}"
    (tmp_path / "token").chmod(0o600)
    monkeypatch.setenv("RAY_TMPDIR", "/" + "x" * 100)
    assert look("ray's folder")["state"] == "fail"
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{other.getsockname()[1]}")
        assert look("ray's address")["state"] == "ok"
        assert "RAY_AUTH_MODE=token" in look("ray's token")["remedy"]
    assert look("ray's address")["state"] == "fail"


def test_a_proxy_that_would_be_asked_for_loopback(look: CheckOf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://proxy.example:3128")
    assert look("proxy")["state"] == "warn"
    monkeypatch.setenv("no_proxy", "localhost, 127.0.0.1")
    with pytest.raises(StopIteration):
        look("proxy")


def test_the_plain_form_counts(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    main(["doctor", "--root", str(tmp_path)])
    *lines, last = capsys.readouterr().out.splitlines()
    findings = [line for line in lines if not line.lstrip().startswith("->")]
    assert last.startswith(f"{len(findings)} looked at, ")
