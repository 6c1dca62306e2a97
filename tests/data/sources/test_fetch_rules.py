"""A row names what its recipe allows: files below its base, its bucket, public hosts; within bytes, seconds, hops."""

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from pydantic import ValidationError

from lookalike.data.sources.fetch_rules import FetchRules, HostCheck, is_public
from lookalike.data.sources.image_fetch import fetch_images
from lookalike.errors import UsageError
from lookalike.vision.images import ImageError
from tests.data.sources.hostile_http import HostileServer

IMAGE = b"bytes of an image"
LOOPBACK = {"hosts": ["127.0.0.1", "localhost"]}


@pytest.fixture(scope="module")
def server() -> Iterator[HostileServer]:
    with HostileServer(IMAGE) as running:
        yield running


def fetch(uri: Any, base: str, max_bytes: int = 1000, **rules: Any) -> bytes | str:
    """The bytes that a row's URI gives, or the name of the reason why it gives none."""
    records: list[dict[str, Any]] = [{"image_uri": uri}]
    fetch_images(records, base, max_bytes, FetchRules.model_validate(rules))
    image = records[0]["image"]
    return image.reason.partition(" ")[0] if isinstance(image, ImageError) else image


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A folder with an image, and a file outside it."""
    folder = tmp_path / "base"
    (folder / "in").mkdir(parents=True)
    (folder / "in" / "a.png").write_bytes(IMAGE)
    (tmp_path / "secret.png").write_bytes(b"secret")
    return folder


def test_files_below_the_base_are_read_by_any_name(base: Path) -> None:
    (base / "link.png").symlink_to("in/a.png")
    (base / "a::b.png").write_bytes(IMAGE)
    names = ["in/a.png", "./in/a.png", f"{base}/in/a.png", f"file://{base}/in/../in/a.png", "link.png", "a::b.png"]
    assert [fetch(name, str(base)) for name in names] == [IMAGE] * len(names)
    link = base.parent / "link"
    link.symlink_to(base)
    assert fetch("in/a.png", str(link)) == fetch(f"{link}/in/a.png", str(base)) == IMAGE


@pytest.mark.parametrize(
    "name",
    [
        *(
            "/etc/hostname",
            "file:///etc/hostname",
            "local:///etc/hostname",
            "FILE:///etc/hostname",
            "{base}/../secret.png",
        ),
        *("file://{base}/../secret.png", "out.png", "folder/secret.png", "{base}x/a.png", "/proc/self/environ"),
    ],
)
def test_files_elsewhere_are_refused(base: Path, name: str) -> None:
    (base / "out.png").symlink_to(base.parent / "secret.png")
    (base / "folder").symlink_to(base.parent)
    beside = base.parent / "basex"
    beside.mkdir()
    (beside / "a.png").write_bytes(b"secret")
    assert fetch(name.format(base=base), str(base)) == "outside_base"


def test_roots_and_schemes_allow_more_files(base: Path) -> None:
    outside = f"{base.parent}/secret.png"
    assert fetch(outside, str(base), roots=[str(base.parent)]) == b"secret"
    assert fetch(outside, str(base), roots=[f"file://{base.parent}"]) == b"secret"
    assert fetch(outside, str(base), schemes=["file"]) == b"secret"
    assert fetch(outside, "memory://bucket", roots=[str(base.parent)]) == b"secret"
    assert fetch(outside, "memory://bucket") == "outside_base"


@pytest.mark.timeout(20)
def test_what_is_no_file_is_never_read(base: Path) -> None:
    os.mkfifo(base / "fifo.png")
    (base / "zero.png").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(base / "s.png"))
        found = [fetch(name, str(base), schemes=["file"]) for name in ("fifo.png", "zero.png", "s.png", "in")]
    assert found == ["not_a_regular_file"] * 3 + ["not_found"]


@pytest.mark.parametrize(
    "name", ["../base/in/a.png", "a\0b", "zz://a/b", "simplecache::http://127.0.0.1/x", "", "memory://bucket/../x"]
)
def test_what_names_no_image_is_a_bad_uri(base: Path, name: str) -> None:
    records: list[dict[str, Any]] = [{"image_uri": name}]
    fetch_images(records, str(base), 1000)
    image = records[0].get("image")
    assert name == "" if image is None else image.reason == "bad_uri"


def test_a_row_names_objects_of_the_bucket_of_its_base() -> None:
    store = fsspec.filesystem("memory")
    for path in ("/bucket/base/a", "/bucket/other/a", "/elsewhere/a"):
        store.pipe_file(path, IMAGE)
    base = "memory://bucket/base"
    assert fetch("a", base) == fetch("memory://bucket/other/a", base) == IMAGE
    assert fetch("memory://elsewhere/a", base) == "outside_base"
    assert fetch("memory://bucket/other/a", "/tmp") == "scheme_not_allowed"
    assert fetch("s3://bucket/a", base) == fetch("ftp://127.0.0.1/a", base) == "scheme_not_allowed"
    assert fetch("memory://elsewhere/a", base, roots=["memory://elsewhere"]) == IMAGE
    assert fetch("memory://elsewhere/a", base, roots=["memory://else"]) == "outside_base"
    assert fetch("memory://elsewhere/a", base, schemes=["memory"]) == IMAGE


PRIVATE = [
    *("127.0.0.1", "127.8.9.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.100.100.200"),
    *(
        "168.63.129.16",
        "192.0.0.192",
        "0.0.0.0",
        "224.0.0.1",
        "239.1.2.3",
        "240.0.0.1",
        "255.255.255.255",
        "198.18.0.1",
    ),
    *("::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1", "fd00:ec2::254", "ff02::1", "::ffff:127.0.0.1", "::127.0.0.1"),
    *("2002:7f00:1::", "64:ff9b::7f00:1", "64:ff9b:1::1", "2001:db8::1", "fec0::1", "2001:0:7f00:1::1"),
]


@pytest.mark.parametrize("address", PRIVATE)
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(address)
    assert HostCheck("/base", FetchRules()).allowed("name.example", [address]) == []


@pytest.mark.parametrize(
    "address", ["1.1.1.1", "93.184.215.14", "2606:4700::1111", "64:ff9b::101:101", "::ffff:1.1.1.1"]
)
def test_public_addresses(address: str) -> None:
    assert is_public(address)
    assert HostCheck("/base", FetchRules()).allowed("name.example", ["10.0.0.1", address]) == [address]
    assert HostCheck("/base", FetchRules(hosts=["other.example"])).allowed("name.example", [address]) == []


def test_hosts_are_names_addresses_and_networks() -> None:
    check = HostCheck("/base", FetchRules(hosts=["Shop.intern", "*.cdn.intern", "10.0.0.0/8", "fd00::/8"]))
    for host in ("shop.intern", "SHOP.intern.", "cdn.intern", "a.b.cdn.intern"):
        assert check.allowed(host, ["192.168.0.1"]) == ["192.168.0.1"]
    for host in ("ashop.intern", "shop.intern.evil", "acdn.intern", "public"):
        assert check.allowed(host, ["192.168.0.1", "10.1.1.1", "1.1.1.1", "fd00::1"]) == ["10.1.1.1", "fd00::1"]
    for wrong in ("10.0.0.0/99", "http://a", ""):
        with pytest.raises((ValidationError, UsageError)):
            FetchRules(hosts=[wrong])


HOSTS = [
    *("127.0.0.1", "localhost", "127.1", "2130706433", "0x7f000001", "0177.0.0.1", "127.0.0.1.", "[::1]", "0.0.0.0"),
    *(
        "[::ffff:127.0.0.1]",
        "127.0.0.1%2f",
        "user:pw@127.0.0.1",
        "LOCALHOST",
        "\u2460\u2461\u2466.0.0.1",
        "[::]",
        "①②⑦.⓪.⓪.①",
    ),
]


@pytest.mark.parametrize("host", HOSTS)
def test_loopback_is_refused_however_it_is_written(server: HostileServer, host: str) -> None:
    before = server.requests.total()
    assert fetch(f"http://{host}:{server.port}/image", "/base") in ("host_not_allowed", "bad_uri", "unreachable")
    assert server.requests.total() == before


def test_a_name_is_judged_by_the_address_it_has(server: HostileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if it has another one when it is asked again: the judged address is the one connected to."""
    real, answers = socket.getaddrinfo, iter(["93.184.215.14", "127.0.0.1", "127.0.0.1", "127.0.0.1"])
    asked: list[str] = []

    def rebind(host: Any, *args: Any, **kwargs: Any) -> Any:
        if host != "rebind.example":
            return real(host, *args, **kwargs)
        asked.append(next(answers))
        return real(asked[-1], *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", rebind)
    reason = fetch(f"http://rebind.example:{server.port}/image", "/base", timeout_s=2)
    assert reason in ("fetch_too_slow", "unreachable", "host_not_allowed")
    assert server.requests["/image"] == 0
    assert asked[0] == "93.184.215.14"


def test_a_setting_allows_a_private_host(server: HostileServer) -> None:
    for rules in (LOOPBACK, {"hosts": ["127.0.0.0/8"]}, {"roots": [server.url]}):
        assert fetch(f"{server.url}/image", "/base", **rules) == IMAGE
    assert fetch(f"{server.url}/image", "/base", roots=[f"{server.url}/pictures"]) == "host_not_allowed"
    assert fetch(f"{server.url}/image/../gone", "/base", roots=[f"{server.url}/image"]) == "bad_uri"
    assert fetch(f"{server.url}/image", "/base", schemes=["https"], **LOOPBACK) == "scheme_not_allowed"


def test_a_base_that_is_an_address_is_allowed(server: HostileServer) -> None:
    assert fetch("image", f"{server.url}/") == IMAGE
    assert fetch("/etc/hostname", server.url) == "outside_base"
    assert fetch(f"http://127.0.0.1:{server.port + 1}/image", server.url) == "host_not_allowed"


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("http://127.0.0.2:{port}/image", "host_not_allowed"),
        ("http://169.254.169.254/latest/meta-data/", "host_not_allowed"),
        ("http://[::1]:{port}/image", "host_not_allowed"),
        ("//0.0.0.0:{port}/image", "host_not_allowed"),
        ("file:///etc/hostname", "scheme_not_allowed"),
        ("ftp://127.0.0.1/x", "scheme_not_allowed"),
        ("", "too_many_redirects"),
        ("http://[", "bad_uri"),
        ("/image", IMAGE),
    ],
)
def test_each_redirect_is_judged_again(server: HostileServer, target: str, reason: str | bytes) -> None:
    found = fetch(f"{server.url}/redirect?{target.format(port=server.port)}", "/base", hosts=["127.0.0.1"])
    assert found == reason


def test_redirects_are_counted(server: HostileServer) -> None:
    before = server.requests["/circle"]
    assert fetch(f"{server.url}/circle", "/base", **LOOPBACK) == "too_many_redirects"
    assert server.requests["/circle"] - before == 6
    assert fetch(f"{server.url}/redirect?/image", "/base", max_redirects=0, **LOOPBACK) == "too_many_redirects"


def test_reading_stops_at_the_bound_whatever_the_server_sends(server: HostileServer) -> None:
    found = fetch(f"{server.url}/endless", "/base", 100_000, **LOOPBACK)
    assert found == bytes(100_001)
    assert server.wait_for_silence() < 20_000_000  # what the buffers of two sockets hold
    assert fetch(f"{server.url}/packed", "/base", **LOOPBACK) == IMAGE  # not unpacked: decoding it as an image fails


@pytest.mark.timeout(20)
@pytest.mark.parametrize("path", ["drip", "drip_head", "silent"])
def test_a_server_that_never_ends_is_left(server: HostileServer, path: str) -> None:
    start = time.monotonic()
    assert fetch(f"{server.url}/{path}", "/base", timeout_s=0.5, **LOOPBACK) == "fetch_too_slow"
    assert time.monotonic() - start < 5


def test_failures_are_tried_again_and_told_apart(server: HostileServer) -> None:
    assert fetch(f"{server.url}/flaky", "/base", **LOOPBACK) == IMAGE
    assert fetch(f"{server.url}/gone", "/base", **LOOPBACK) == "not_found"
    assert fetch(f"{server.url}/broken", "/base", **LOOPBACK) == "unreachable"
    assert server.requests["/broken"] == 3
    assert fetch(f"{server.url}/headers_flood", "/base", **LOOPBACK) == "unreachable"
