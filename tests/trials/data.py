"""What data may name, and what it may cost: rows, servers, archives, tables, manifests and YAML of an attacker.

    python -m tests.trials.data [--quick]

Each row is one attack: what is promised of it, and what was seen. The hostile HTTP server listens on 127.0.0.1; the
recipe's setting admits it where the attack needs it.
"""

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lookalike.artifacts import MANIFEST, Artifact, Draft, FileEntry, Parent, write_manifest
from lookalike.cli import main as cli
from lookalike.data.sources.fetch_rules import FetchRules
from lookalike.data.sources.image_fetch import fetch_images
from lookalike.errors import UsageError
from lookalike.plain_yaml import parse_yaml
from lookalike.vision.images import ImageError
from tests.data.sources.bombs import BOMBS, lance_text
from tests.data.sources.hostile_http import HostileServer
from tests.trials import Row, print_rows

LOOPBACK = {"hosts": ["127.0.0.1"]}
ROOT = Path(__file__).parents[2]
EVIL = "\x1b[2J\nok  x\u202e"
MOST_MB = 700
"""Growth of a reader's memory with default bounds, whatever a file claims."""


def run(folder: Path, *, quick: bool = False) -> Iterator[Row]:
    """Every attack; ``quick`` makes the bombs an eighth as large."""
    yield from rows_name(folder / "rows")
    yield from servers(folder)
    yield from manifests(folder / "artifacts")
    yield from documents()
    yield from bombs(folder / "bombs", 128 if quick else 1024)


def rows_name(folder: Path) -> Iterator[Row]:
    """Names that rows may not use."""
    base = folder / "base"
    base.mkdir(parents=True)
    (folder / "secret.png").write_bytes(b"secret")
    (base / "link.png").symlink_to(folder / "secret.png")
    (base / "zero.png").symlink_to("/dev/zero")
    os.mkfifo(base / "fifo.png")
    files = ("/etc/hostname", "file:///etc/hostname", f"{base}/../secret.png", "link.png", "zero.png")
    stores = ("s3://other/a.png", "gs://other/a.png", "memory://other/a.png", "ftp://127.0.0.1/a.png")
    hosts = (
        "http://127.0.0.1:1/",
        "http://localhost/",
        "http://[::1]/",
        "http://169.254.169.254/latest/",
        "http://127.1/",
    )
    hosts += ("http://2130706433/", "http://10.0.0.1/", "http://[::ffff:127.0.0.1]/", "http://168.63.129.16/")
    allowed = {"outside_base", "scheme_not_allowed", "host_not_allowed", "bad_uri", "unreachable"}
    for what, names in (("files outside the base", files), ("other stores", stores), ("private hosts", hosts)):
        found = [fetch(name, str(base)) for name in names]
        kept = all(isinstance(image, str) and image in allowed for image in found)
        yield Row(what, "each refused with a reason", ", ".join(map(str, found)), kept)
    start = time.monotonic()
    found = [fetch("fifo.png", str(base)), fetch("zero.png", str(base), schemes=["file"])]
    kept = found == ["not_a_regular_file"] * 2 and time.monotonic() - start < 5
    yield Row("a FIFO, a link to /dev/zero", "never read, within 5 s", ", ".join(map(str, found)), kept)


def servers(folder: Path) -> Iterator[Row]:
    """Servers that do what they should not."""
    with HostileServer(b"image") as server:
        shut = fetch(f"{server.url}/image", str(folder))
        seen = f"{shut}, {server.requests.total()} requests"
        yield Row("loopback without the setting", "refused, not called", seen, seen == "host_not_allowed, 0 requests")
        found = fetch(f"{server.url}/image", str(folder), **LOOPBACK)
        yield Row("loopback with the setting", "fetched", str(found), found == b"image")
        for target in ("http://169.254.169.254/", "http://127.0.0.2/", "file:///etc/hostname", "/circle"):
            reason = fetch(f"{server.url}/redirect?{target}", str(folder), **LOOPBACK)
            kept = reason in ("host_not_allowed", "scheme_not_allowed", "too_many_redirects")
            yield Row(f"redirect to {target}", "judged again", str(reason), kept)
        image = fetch(f"{server.url}/endless", str(folder), 1_000_000, **LOOPBACK)
        sent = server.wait_for_silence()
        kept = len(image) == 1_000_001 and sent < 20_000_000
        yield Row("1 GB for a picture of 1 MB", "1 MB and one byte read, under 20 MB sent", f"{sent} bytes sent", kept)
        for path in ("drip", "drip_head", "silent"):
            start = time.monotonic()
            reason = fetch(f"{server.url}/{path}", str(folder), timeout_s=1, **LOOPBACK)
            seconds = time.monotonic() - start
            kept = reason == "fetch_too_slow" and seconds < 5
            yield Row(
                f"{path}: no end in sight", "left after fetch.timeout_s (1 s)", f"{reason}, {seconds:.1f} s", kept
            )


def manifests(folder: Path) -> Iterator[Row]:
    """Artifacts of someone else, shown and verified."""
    with HostileServer(b"{}") as server:
        changes: dict[str, dict[str, Any]] = {
            "a file at ../../etc/hostname": {"files": [_entry("../../etc/hostname")]},
            "a file at /etc/hostname": {"files": [_entry("/etc/hostname")]},
            "a parent at a URL": {"parents": {"input": [_parent(f"{server.url}/a/b/c")]}},
            "a parent through a chained URL": {"parents": {"input": [_parent(f"simplecache::{server.url}/a/b/c")]}},
            "names that move the cursor": {"name": EVIL, "kind": EVIL, "config": {EVIL: EVIL}},
        }
        for what, change in changes.items():
            artifact = _publish(folder / str(abs(hash(what))))
            write_manifest(artifact.uri, artifact.manifest.model_copy(update=change))
            codes, text = _call(["show", artifact.uri], ["verify", artifact.uri])
            calls, raw = server.requests.total(), sum(text.count(letter) for letter in "\x1b\u202e")
            kept = calls == 0 and raw == 0 and ("hostname" not in what or codes == [3, 3]) and "\nok  x" not in text
            seen = f"exit {codes}, {calls} requests, {raw} raw controls"
            yield Row(what, "refused or shown, nothing called, no raw control", seen, kept)
    for what in ("a file that is a FIFO", "a manifest that is a FIFO"):
        artifact = _publish(folder / str(abs(hash(what))))
        path = Path(artifact.path("a.bin" if "file that" in what else MANIFEST))
        path.unlink()
        os.mkfifo(path)
        start = time.monotonic()
        codes, _ = _call(["show", artifact.uri], ["verify", artifact.uri])
        yield Row(what, "exit 3 at once", f"exit {codes}", codes == [3, 3] and time.monotonic() - start < 5)


def documents() -> Iterator[Row]:
    """YAML that multiplies, nests or never ends."""
    bomb = "\n".join(["a0: &a0 [x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 40))])
    merges = bomb.replace("[x]", "{x: 1}").replace("[", "{<<: [").replace("]", "]}")
    for what, text in (
        ("nested aliases", bomb),
        ("nested merges", merges),
        ("nested lists", "[" * 5000),
        ("itself", "&a [*a]"),
    ):
        start = time.monotonic()
        try:
            parse_yaml(text, "recipe.yaml")
            told = "read"
        except UsageError as error:
            told = str(error)
        seconds = time.monotonic() - start
        kept = "recipe.yaml" in told and "line" in told and seconds < 5
        yield Row(f"YAML of {what}", "refused with file and line within 5 s", f"{told[:120]} ({seconds:.1f} s)", kept)


def bombs(folder: Path, megabytes: int) -> Iterator[Row]:
    """Small files that unpack to ``megabytes``."""
    folder.mkdir()
    for name, write in {**BOMBS, "text.lance": lance_text}.items():
        path = folder / name
        kind, settings = write(path, megabytes // 4 if kind_is_slow(name) else megabytes)
        command = [sys.executable, "-m", "tests.data.sources.read_alone", str(path), kind, json.dumps(settings)]
        environment = {**os.environ, "PYTHONPATH": "platform", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
        found = json.loads(done.stdout) if done.returncode == 0 else {"error": done.stderr[-200:], "growth_mb": -1}
        kept = 0 <= found["growth_mb"] < MOST_MB
        seen = {key: found.get(key) for key in ("growth_mb", "records", "reasons", "error")}
        yield Row(
            f"{name} of {_bytes(path)} bytes", f"reading it takes under {MOST_MB} MB more", json.dumps(seen), kept
        )


def kind_is_slow(name: str) -> bool:
    """Whether to make a bomb smaller, because writing or passing over it takes long."""
    return name.startswith(("quote", "rows", "list", "header.tar", "texts"))


def fetch(uri: str, base: str, max_bytes: int = 1000, **rules: Any) -> bytes | str:
    """The bytes that a row's URI gives, or the reason why it gives none."""
    records: list[dict[str, Any]] = [{"image_uri": uri}]
    fetch_images(records, base, max_bytes, FetchRules.model_validate(rules))
    image = records[0]["image"]
    return image.reason if isinstance(image, ImageError) else image


def _publish(folder: Path) -> Artifact:
    draft = Draft(str(folder), "thing", "one", "f" * 20)
    Path(draft.uri).mkdir(parents=True)
    Path(draft.path("a.bin")).write_bytes(b"12345")
    return draft.publish(config={}, parents={}, stage_version=1, duration_s=0.0)


def _entry(path: str) -> FileEntry:
    return FileEntry.model_construct(path=path, size_bytes=5, rows=None, sha256="0" * 64)


def _parent(uri: str) -> Parent:
    return Parent.model_construct(uri=uri, kind="thing", digest="0" * 64)


def _call(*commands: list[str]) -> tuple[list[int], str]:
    """Exit codes of the commands, and all that they printed."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        codes = [cli(command) for command in commands]
    return codes, text.getvalue()


def _bytes(path: Path) -> int:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="bombs an eighth as large")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        sys.exit(not print_rows("data", run(Path(temporary), quick=options.quick)))
