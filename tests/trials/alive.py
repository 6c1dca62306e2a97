"""A service that is up answers, and one that cannot ends: starts that must be refused, parts killed or frozen.

    python -m tests.trials.alive [--quick]

Each service is ``lookalike serve`` in a process of its own, over a made-up index of two shards.
"""

import argparse
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc

from lookalike.cluster import count_cpus
from lookalike.serve.app import free_port
from lookalike.serve.client import Client, StoredRow
from lookalike.serve.wire.errors import RetrievalError
from tests.serve.front.certificates import Authority
from tests.serve.scaling import publish_small
from tests.trials import Row, print_rows

VECTOR = np.arange(1, 65, dtype=np.float32)
ENDS_WITHIN_S = 30.0
FOUND_WITHIN_S = 25.0
"""Serve finds a silent replica within 18 s, and kills it; then another starts, which takes no longer than the service's
own start, of which it is a part."""


class ServiceProcess:
    """A running ``lookalike serve``."""

    def __init__(self, index: str, *settings: str) -> None:
        self.port = free_port()
        command = [sys.executable, "-m", "lookalike.cli", "serve", "--index", index, f"port={self.port}", *settings]
        self.begun, self.start_s = time.monotonic(), 0.0
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "RAY_ADDRESS": ""}
        )
        self._lines: queue.Queue[str] = queue.Queue()
        self._errors: list[str] = []
        for stream, take in ((self.process.stdout, self._lines.put), (self.process.stderr, self._errors.append)):
            threading.Thread(target=_read, args=(stream, take), daemon=True).start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def words(self) -> str:
        """What it wrote to stderr, its own lines alone."""
        return " ".join(line.strip() for line in self._errors if "lookalike" in line)

    def wait_ready(self) -> None:
        while not self._lines.get(timeout=180).startswith("serving "):
            pass
        self.start_s = time.monotonic() - self.begun

    def wait_end(self, within_s: float) -> tuple[int | None, float]:
        """Exit code, None if it goes on, and the seconds waited."""
        start = time.monotonic()
        try:
            code = self.process.wait(within_s)
        except subprocess.TimeoutExpired:
            code = None
        time.sleep(0.2)  # the last words
        return code, time.monotonic() - start

    def find(self, name: str) -> list[psutil.Process]:
        """Its processes whose command line holds ``name``."""
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if name in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def health(self, timeout_s: float = 3.0) -> str:
        """Name of the status that ``grpc.health.v1`` tells, or of the code of its failure."""
        with grpc.insecure_channel(self.address) as channel:
            try:
                answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=timeout_s)
            except grpc.RpcError as error:
                return str(error.code().name)
        return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))

    def close(self) -> None:
        """End it, and whatever is left of it."""
        left = psutil.Process(self.process.pid).children(recursive=True) if self.process.poll() is None else []
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
        for process in left:
            if process.is_running():
                process.kill()


def _read(stream: Any, take: Callable[[str], object]) -> None:
    for line in stream:
        take(line)


@contextmanager
def serving(index: str, *settings: str) -> Iterator[ServiceProcess]:
    """A service that answers."""
    service = ServiceProcess(index, *settings)
    try:
        service.wait_ready()
        yield service
    finally:
        service.close()


def wait_for(condition: Callable[[], bool], within_s: float) -> float:
    """Seconds until ``condition`` holds; infinite if it does not in time."""
    start = time.monotonic()
    while time.monotonic() - start < within_s:
        if condition():
            return time.monotonic() - start
        time.sleep(0.2)
    return float("inf")


def try_starts(index: str, folder: Path, running: ServiceProcess) -> Iterator[Row]:
    """Starts that cannot succeed, each refused without Ray."""
    (folder / "foreign").mkdir()
    (folder / "foreign" / "writes.sqlite").write_bytes(b"not a database, but rather long for a name" * 9)
    cases = {
        "twelve replicas on few CPUs": ([f"num_replicas={6 * count_cpus()}"], "x 0.2"),
        "a second service on one folder": ([f"writes.state={folder / 'state'}"], "another service writes to"),
        "a foreign folder": ([f"writes.state={folder / 'foreign'}"], "is not a database of writes"),
        "no folder": ([f"writes.state={sys.executable}"], "cannot be used"),
        "a port in use": ([f"port={running.port}"], "cannot be used"),
    }
    started = [ServiceProcess(index, "encoder=none", *settings) for settings, _ in cases.values()]
    for (case, (_, words)), service in zip(cases.items(), started, strict=True):
        code, _ = service.wait_end(150)
        seconds = time.monotonic() - service.begun
        seen = f"exit code {code} after {seconds:.0f} s: {service.words[-300:]}"
        yield Row(case, "refused in seconds, with the reason", seen, code in (2, 3) and words in service.words)
        service.close()


def freeze_shard(service: ServiceProcess) -> Iterator[Row]:
    """SIGSTOP of the one replica of a shard: partial answers meanwhile, and another replica before long."""
    frozen = service.find(":shard-001")[0]
    frozen.send_signal(signal.SIGSTOP)
    begun = time.monotonic()
    with Client(service.address, timeout_s=30) as client:
        first = time_partial(client)
        later = sorted(time_partial(client) for _ in range(3))[1]  # now and then one tries the shard again
        ids = [f"img-{row:03d}" for row in range(60)]
        outcomes = {ask_by_id(client, image_id) for image_id in ids[:6]}
        promised = "partial answers within 2.5 s, the next within 1 s"
        yield Row("a shard is stopped", promised, f"{first:.2f} s, then {later:.2f} s", first < 2.5 and later < 1.0)
        promised = "a query by id is answered if its shard is there, else UNAVAILABLE"
        yield Row("a shard is stopped", promised, ", ".join(sorted(outcomes)), outcomes == {"OK", "UNAVAILABLE"})
        dark = wait_for(lambda: service.health() == "NOT_SERVING", 20)
        yield Row("a shard is stopped", "health NOT_SERVING within 20 s", f"{dark:.0f} s", dark < 20)

        wait_for(lambda: not frozen.is_running(), 60)
        found_s = time.monotonic() - begun
        promised = f"found and killed within {FOUND_WITHIN_S:g} s"
        yield Row("a shard is stopped", promised, f"{found_s:.0f} s", found_s < FOUND_WITHIN_S)

        def is_whole() -> bool:
            try:
                return client.search(vector=VECTOR, k=3, allow_partial=True).info.coverage == 1.0
            except RetrievalError:
                return False

        within_s = FOUND_WITHIN_S + service.start_s
        wait_for(is_whole, within_s)
        seconds = time.monotonic() - begun
        seen = f"{seconds:.0f} s, health {service.health()}, service {'ended' if service.process.poll() else 'goes on'}"
        kept = seconds < within_s and wait_for(lambda: service.health() == "SERVING", 5) < 5
        promised = f"replaced by itself within {within_s:.0f} s, {service.start_s:.0f} of them for the start"
        yield Row("a shard is stopped", promised, seen, kept)


def time_partial(client: Client) -> float:
    """Seconds that a partial answer takes."""
    start = time.monotonic()
    client.search(vector=VECTOR, k=3, allow_partial=True)
    return time.monotonic() - start


def ask_by_id(client: Client, image_id: str) -> str:
    """Name of the status of a search by id."""
    try:
        client.search(image_id=image_id, k=1, allow_partial=True, timeout_ms=1500)
    except RetrievalError as error:
        return error.code.name
    return "OK"


def compact_without_room(service: ServiceProcess) -> Iterator[Row]:
    """A compaction while replicas have reserved every CPU, and what status says meanwhile."""
    with Client(service.address, timeout_s=60) as client:
        client.upsert([StoredRow(f"new-{row}", VECTOR * (-1) ** row) for row in range(8)])
        steps: list[str] = []
        done = threading.Event()

        def follow() -> None:
            with Client(service.address, timeout_s=30) as other:
                while not done.wait(0.1):
                    steps.extend(f"{each.kind}: {each.step}" for each in other.status().activities)

        thread = threading.Thread(target=follow)
        thread.start()
        start = time.monotonic()
        served = client.compact(timeout_s=120)
        seconds = time.monotonic() - start
        done.set()
        thread.join()
        told = list(dict.fromkeys(steps))
        kept = served.includes_writes == 1 and any("builds an index" in step for step in told)
        yield Row("compaction, all CPUs reserved", "done, and seen in status", f"{seconds:.0f} s; {told}", kept)


def lose(
    index: str, name: str, number: signal.Signals, words: str, *settings: str, service: ServiceProcess | None = None
) -> Iterator[Row]:
    """End or freeze a part without which nothing works: the service says so and ends."""
    if service is None:
        with serving(index, "encoder=none", *settings) as fresh:
            yield from lose(index, name, number, words, service=fresh)
        return
    left = psutil.Process(service.process.pid).children(recursive=True)
    service.find(name)[0].send_signal(number)
    code, seconds = service.wait_end(ENDS_WITHIN_S + 10)
    alive = [process for process in left if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    for process in alive:
        process.kill()
    seen = f"exit code {code} after {seconds:.1f} s, health {service.health()}, {len(alive)} processes left; "
    kept = code == 1 and seconds < ENDS_WITHIN_S and words in service.words and not alive
    yield Row(f"{name}: {number.name}", "says so, ends with 1 in 30 s", seen + service.words[-300:], kept)


def recover(service: ServiceProcess, name: str, number: signal.Signals) -> Iterator[Row]:
    """End or freeze a part that Ray or Serve replaces: the service goes on and answers again."""
    service.find(name)[0].send_signal(number)
    time.sleep(1)
    seconds = 1 + wait_for(lambda: service.health() == "SERVING", 60)
    goes_on = service.process.poll() is None
    with Client(service.address, timeout_s=30) as client:
        found = len(client.search(vector=VECTOR, k=3).hits)
    seen = f"SERVING after {seconds:.0f} s, {found} hits, {'goes on' if goes_on else 'ended'}"
    yield Row(
        f"{name}: {number.name}", "answers again, and is not ended", seen, goes_on and seconds < 60 and found == 3
    )


def run(*, quick: bool) -> Iterator[Row]:
    """All rows; ``quick`` leaves out what needs a service each."""
    with tempfile.TemporaryDirectory() as root:
        folder, index = Path(root), publish_small(f"{root}/artifacts")
        cpus = f"cpus_per_replica={count_cpus() / 4}"  # ingress, two shards, writer: all there are
        settings = ["encoder=none", "placement=sharded", f"writes.state={folder / 'state'}", cpus]
        with serving(index, *settings) as service:
            yield from try_starts(index, folder, service)
            yield from freeze_shard(service)
            yield from compact_without_room(service)
            if not quick:
                yield from recover(service, ":ingress", signal.SIGKILL)
                yield from recover(service, "ServeController", signal.SIGKILL)
                yield from recover(service, "ProxyActor", signal.SIGKILL)
                yield from recover(service, "ProxyActor", signal.SIGSTOP)
            yield from lose(index, "raylet/raylet", signal.SIGKILL, "Ray's raylet has ended", service=service)
        if not quick:
            certificate, key = Authority(folder, "authority").issue("server")
            tls = [f"tls.certificate={certificate}", f"tls.key={key}", "tls.port=0"]
            yield from lose(index, "gcs_server", signal.SIGKILL, "Ray's GCS has ended")
            yield from lose(index, "raylet/raylet", signal.SIGSTOP, "stood still")
            yield from lose(index, "haproxy", signal.SIGKILL, "ended with code -9", *tls)
            yield from lose(index, "haproxy", signal.SIGSTOP, "stood still", *tls)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the soak test's part")
    sys.exit(not print_rows("alive", run(quick=parser.parse_args().quick)))


if __name__ == "__main__":
    main()
