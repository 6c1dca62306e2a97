"""Which doors a running service has open: its ports, its files, its token.

    python -m tests.trials.doors

Starts ``lookalike serve`` on a small index, and tries what another user or machine could.
"""

import os
import re
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import numpy as np
import psutil

from lookalike.serve.client import Client, RetrievalError
from tests.serve.soak import publish_generations
from tests.trials import Row, print_rows

START_S = 240.0
ON_LOOPBACK = ("127.0.0.1", "[::ffff:127.0.0.1]", "[::1]")
HANDLE = "/ray.serve.ASGIService/HandleRequest"
"""A call between replicas."""


def run() -> Iterator[Row]:
    """Yield a row per promise."""
    with tempfile.TemporaryDirectory() as folder:
        token = Path(folder, "auth_token")
        token.write_text("0" * 64)
        token.chmod(0o644)
        index = next(iter(publish_generations(f"{folder}/artifacts", np.random.default_rng(1))))
        with service(index, folder, token) as (process, port):
            open_doors = listeners(process)
            anywhere = [(number, name) for host, number, name in open_doors if host not in ON_LOOPBACK]
            inside = [number for number, name in anywhere if "ServeReplica" in name]
            others = sorted({name for number, name in anywhere if number not in (*inside, port)})
            seen = f"{len(open_doors)} open, elsewhere {others}"
            yield Row("ports", "Ray's own ports are on loopback", seen, bool(open_doors) and not others)
            codes = sorted({code_of(f"127.0.0.1:{number}") for number in inside})
            yield Row("replicas", "they ask each other for Ray's token", str(codes), codes in ([], ["UNAUTHENTICATED"]))
            yield from from_elsewhere(port, open_doors)
            mode = stat.S_IMODE(token.stat().st_mode)
            yield Row("token", "only the service's user reads Ray's token", f"{mode:04o}", mode == 0o600)
            state = [path for path in Path(folder, "state").rglob("*") if path.lstat().st_mode & 0o077]
            yield Row("files", "nobody else reads the writes", f"{len(state)} files readable", not state)


@contextmanager
def service(index: str, folder: str, token: Path) -> Iterator[tuple["subprocess.Popen[str]", int]]:
    """A running service and its port."""
    settings = ["encoder=none", "port=0", "cpus_per_replica=0.1", f"writes.state={folder}/state"]
    command = [sys.executable, "-m", "lookalike.cli", "serve", "--index", index, *settings]
    environment = {**os.environ, "RAY_AUTH_TOKEN_PATH": str(token)}
    environment.pop("RAY_ADDRESS", None)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()  # printed once it answers
            found = re.search(r" at 127\.0\.0\.1:(\d+)", line)
            assert found is not None, f"the service did not start: {line!r}"
            yield process, int(found[1])
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


def listeners(process: "subprocess.Popen[str]") -> list[tuple[str, int, str]]:
    """(host, port, command) of everything that the service's processes listen at, as ``ss -ltnp`` tells."""
    root = psutil.Process(process.pid)
    names = {each.pid: " ".join(each.cmdline())[:60] for each in (root, *root.children(recursive=True))}
    text = subprocess.run(["ss", "-ltnpH"], capture_output=True, text=True, check=True).stdout
    found = []
    for line in text.splitlines():
        owner = re.search(r"pid=(\d+)", line)
        if owner is not None and int(owner[1]) in names:
            host, _, number = line.split()[3].rpartition(":")
            found.append((host, int(number), names[int(owner[1])]))
    return found


def code_of(address: str) -> str:
    """The status of a call between replicas that brings no token."""
    with grpc.insecure_channel(address) as channel:
        try:
            channel.unary_unary(HANDLE)(b"", timeout=20)
        except grpc.RpcError as error:
            return str(error.code().name)
        return "OK"


def from_elsewhere(port: int, open_doors: list[tuple[str, int, str]]) -> Iterator[Row]:
    """What a caller meets that does not come over loopback."""
    addresses = [
        each.address
        for one in psutil.net_if_addrs().values()
        for each in one
        if each.family == socket.AF_INET and not each.address.startswith("127.")
    ]
    if not addresses:
        return  # a machine without a network
    with Client(f"{addresses[0]}:{port}", timeout_s=20) as client:
        seen = "answered"
        try:
            client.describe()
        except RetrievalError as error:
            seen = error.code.name
    yield Row("gRPC", "a caller from elsewhere is refused", seen, seen == "PERMISSION_DENIED")
    reached = []
    for host, number, name in open_doors:
        with socket.socket() as door:
            door.settimeout(5)
            if host in ON_LOOPBACK and door.connect_ex((addresses[0], number)) == 0:
                reached.append(name)
    yield Row("Ray", "nobody elsewhere connects to Ray", f"reached: {reached}", not reached)


if __name__ == "__main__":
    began = time.monotonic()
    kept = print_rows("doors", run())
    print(f"{time.monotonic() - began:.0f} s", file=sys.stderr)
    sys.exit(not kept)
