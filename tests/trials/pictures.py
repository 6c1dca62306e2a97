"""Pictures that cost far more than their bytes, from one tenant, while another searches by vectors.

    python -m tests.trials.pictures [--num 200] [--placement fused]

The service runs in a Ray of its own; the pictures are of ten formats and kinds, all below the limit of bytes.
"""

import argparse
import io
import json
import os
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import grpc
import numpy as np
import psutil
import ray
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc
from PIL import Image

from lookalike.cluster import ClusterConfig, ensure_ray
from lookalike.serve.app import start, stop
from lookalike.serve.client import Client
from lookalike.serve.front.tenants import hash_token
from lookalike.serve.settings.config import ServeConfig
from lookalike.serve.wire.errors import RetrievalError
from tests.serve.conftest import draw, publish_embeddings, publish_encoder, publish_index
from tests.trials import Row, print_rows
from tests.vision.test_decoder import scans_of

SIDE = 7000
"""Side of most pictures: 49 million pixels, just below the limit."""
ATTACKERS, PER_REQUEST = 4, 6
QUIET_S, BACK_S = 5.0, 60.0
ANSWERS = {"OK", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED"}
INGRESS_MB = 300
"""Memory that the ingress may take for these requests."""


def saved(image: Image.Image, image_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def gif_of_a_large_frame() -> bytes:
    data = bytearray(saved(Image.new("P", (SIDE, SIDE)), "GIF"))
    data[6:10] = struct.pack("<HH", 1, 1)
    return bytes(data)


def png_of_texts() -> bytes:
    """A small picture with sixty texts of 8 MB, compressed."""
    body = b"Comment\0\0" + zlib.compress(bytes(8 << 20), 9)
    chunk = struct.pack(">I", len(body)) + b"zTXt" + body + struct.pack(">I", zlib.crc32(b"zTXt" + body))
    data = saved(Image.new("RGB", (64, 64)), "PNG")
    place = data.index(b"IDAT") - 4
    return data[:place] + chunk * 60 + data[place:]


def bmp_of_skips(width: int, height: int) -> bytes:
    """Run lengths that skip whole rows, which Pillow unpacks in Python."""
    body = b"\0\x02\xff\xff" * 50_000
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(body), 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", 1078 + len(body), 0, 0, 1078) + head + bytes(1024) + body


def tiff_of(tags: list[tuple[int, int]], body: bytes) -> bytes:
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(tags)) + entries + bytes(4) + body


def tiff_of_tiles() -> bytes:
    """8 x 8 pixels in a tile of 60,000 x 60,000."""
    tags = [
        (256, 8),
        (257, 8),
        (258, 8),
        (259, 8),
        (262, 1),
        (277, 1),
        (322, 60_000),
        (323, 60_000),
        (324, 140),
        (325, 99),
    ]
    return tiff_of(tags, bytes(300))


def png_claim() -> bytes:
    head = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 6, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head))


KINDS: dict[str, Callable[[], bytes]] = {
    "progressive jpeg, 400 scans": lambda: scans_of(SIDE, 400),
    "progressive jpeg, as many scans as are allowed": lambda: scans_of(SIDE, 14),
    "gif, a large frame on a small screen": gif_of_a_large_frame,
    "webp, lossless": lambda: saved(Image.new("RGBA", (SIDE, SIDE), (1, 2, 3, 4)), "WEBP", lossless=True, method=0),
    "png, transparent": lambda: saved(Image.new("RGBA", (SIDE, SIDE)), "PNG"),
    "png, compressed texts": png_of_texts,
    "png, 3.6 billion pixels": png_claim,
    "bmp, skips": lambda: bmp_of_skips(50_000, 990),
    "tiff, a tile larger than the picture": tiff_of_tiles,
    "tiff, deflate": lambda: saved(Image.new("RGB", (SIDE, SIDE)), "TIFF", compression="tiff_adobe_deflate"),
    "ppm, digits": lambda: b"P2 700 700 255\n" + b"7 " * (700 * 700),
    "noise that begins like a webp": lambda: b"RIFF\xff\xff\0\0WEBPVP8L" + np.random.default_rng(1).bytes(1 << 16),
}
"""What a tenant may send: each below 10 MB."""


class Probe:
    """Calls something again and again in a thread, and keeps the times that it took."""

    def __init__(self, call: Callable[[], object], pause_s: float) -> None:
        self.times_s, self.failures = list[float](), Counter[str]()
        self._call, self._pause_s, self._end = call, pause_s, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._end.wait(self._pause_s):
            begun = time.perf_counter()
            try:
                self._call()
            except (RetrievalError, grpc.RpcError) as error:
                self.failures[str(error)[:100]] += 1
            self.times_s.append(time.perf_counter() - begun)

    def stop(self) -> "Probe":
        self._end.set()
        self._thread.join()
        return self

    def p99_ms(self) -> float:
        return float(np.quantile(self.times_s, 0.99) * 1000)


class Memory:
    """Resident memory of the service's processes, in MB."""

    def __init__(self) -> None:
        own = psutil.Process().children(recursive=True)
        self.replicas = [each for each in own if "ServeReplica:lookalike" in " ".join(each.cmdline())]
        self.peak, self._end = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._end.wait(0.05):
            self.peak = max(self.peak, self.replica())

    def replica(self) -> float:
        """The largest replica."""
        return max(process.memory_info().rss for process in self.replicas) / 1e6

    def whole(self) -> float:
        """Replicas and their decoders."""
        alive = [*self.replicas, *(child for process in self.replicas for child in process.children())]
        return sum(process.memory_info().rss for process in alive if process.is_running()) / 1e6

    def stop(self) -> None:
        self._end.set()
        self._thread.join()


class Ends(NamedTuple):
    """How the attackers' requests ended."""

    codes: Counter[str]
    slowest_s: float


class Attackers:
    """``attack`` in a process of its own, so that neither service nor probes wait for it: it makes its pictures first.

    It has the lowest priority: those it stands for have machines of their own.
    """

    def __init__(self, address: str, num: int) -> None:
        command = [sys.executable, "-m", "tests.trials.pictures", "--attack", address, "--num", str(num)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"

    def attack(self) -> Ends:
        """Let it begin, and return how it ended."""
        said, _ = self._process.communicate("go\n")
        codes, slowest_s = json.loads(said)
        return Ends(Counter(codes), slowest_s)


def attack(address: str, num: int) -> Ends:
    """Once stdin says so, send ``num`` pictures in requests of some, one client beside the other."""
    made = [make() for make in KINDS.values()]
    pictures = [made[number % len(made)] for number in np.random.default_rng(3).permutation(num)]
    clients = [Client(address, token="hostile" * 4, timeout_s=60) for _ in range(ATTACKERS)]
    requests = [pictures[i : i + PER_REQUEST] for i in range(0, len(pictures), PER_REQUEST)]
    codes, times, lock = Counter[str](), [0.0], threading.Lock()
    os.nice(19)
    print("ready", flush=True)
    sys.stdin.readline()

    def send(client: Client) -> None:
        while True:
            with lock:
                if not requests:
                    return
                images = requests.pop()
            begun, code = time.perf_counter(), "OK"
            try:
                client.embed(images)
            except RetrievalError as error:
                code = error.code.name
            with lock:
                codes[code] += 1
                times.append(time.perf_counter() - begun)

    threads = [threading.Thread(target=send, args=[client]) for client in clients]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for client in clients:
        client.close()
    return Ends(codes, max(times))


def publish_world(root: str) -> str:
    """URI of an index with its encoder."""
    from lookalike.vision.encoder import Encoder

    artifact = publish_encoder(root, "encoder", seed=0)
    images = {f"img-{number:03d}": draw(number) for number in range(60)}
    vectors = dict(zip(images, Encoder.load(artifact).encode(list(images.values())), strict=True))
    embeddings = publish_embeddings(root, artifact, vectors)
    return publish_index(root, embeddings, vectors, artifact.manifest.fingerprint).uri


def run(num: int = 200, placement: str = "fused") -> Iterator[Row]:
    """A row for each promise."""
    with tempfile.TemporaryDirectory() as root:
        tenants = Path(root, "tenants.yaml")
        names = ("hostile", "other")
        entries = [{"name": name, "role": "read", "token_sha256": [hash_token(name * 4)]} for name in names]
        tenants.write_text(yaml.safe_dump({"tenants": entries}))
        ensure_ray(ClusterConfig(num_cpus=2, object_store_mb=200, progress_bars=False))
        try:
            config = ServeConfig(
                index=publish_world(root), tenants=str(tenants), port=0, placement=placement, cpus_per_replica=0.1
            )
            address = start(config)
            yield from _watch(address, num)
        finally:
            stop()
            ray.shutdown()


def watch_quiet(client: Client, vector: np.ndarray) -> float:
    """The 99th percentile of searches alone, in ms."""
    searches = Probe(lambda: client.search(vector=vector), 0.01)
    time.sleep(QUIET_S)
    return searches.stop().p99_ms()


def _watch(address: str, num: int) -> Iterator[Row]:
    other = Client(address, token="other" * 4, timeout_s=30)
    health = health_pb2_grpc.HealthStub(grpc.insecure_channel(address))
    vector, good = np.ones(64, np.float32), draw(3)
    attackers = Attackers(address, num)
    other.search(image=good)
    for _ in range(50):
        other.search(vector=vector)
    memory = Memory()
    before_mb, whole_mb = memory.replica(), memory.whole()
    quiet = [watch_quiet(other, vector)]
    searches = Probe(lambda: other.search(vector=vector), 0.01)
    images = Probe(lambda: other.search(image=good), 0.2)
    checks = Probe(lambda: health.Check(health_pb2.HealthCheckRequest(), timeout=5), 0.1)
    ends = attackers.attack()
    for probe in (searches, images, checks):
        probe.stop()
    memory.stop()
    quiet.append(watch_quiet(other, vector))  # the larger counts: other work comes and goes on the machine
    quiet_ms = max(quiet)
    codes = dict(ends.codes)
    yield Row("answers", f"each request ends as one of {', '.join(sorted(ANSWERS))}", str(codes), set(codes) <= ANSWERS)
    yield Row("deadline", "no request takes 15 s (timeout_s: 10)", f"{ends.slowest_s:.1f} s", ends.slowest_s < 15)
    loud_ms, bound_ms = searches.p99_ms(), 3 * max(quiet_ms, 5)
    yield Row(
        "other tenant's vector searches",
        "p99 at most 3 times its quiet value, none fails",
        f"{quiet[0]:.1f} ms before, {quiet[1]:.1f} ms after, {loud_ms:.1f} ms beside the pictures "
        f"({len(searches.times_s)} searches, {dict(searches.failures)} failed)",
        loud_ms <= bound_ms and not searches.failures,
    )
    slowest_s = max(images.times_s)
    yield Row(
        "other tenant's image searches",
        "none fails, none takes 10 s",
        f"p50 {np.median(images.times_s):.2f} s, slowest {slowest_s:.2f} s, {dict(images.failures)} failed",
        slowest_s < 10 and not images.failures,
    )
    slow_s = max(checks.times_s)
    yield Row("health", "answers within 1 s", f"{slow_s:.2f} s at most", slow_s < 1 and not checks.failures)
    grown_mb = memory.peak - before_mb
    yield Row("memory of a replica", f"grows by less than {INGRESS_MB} MB", f"{grown_mb:.0f} MB", grown_mb < INGRESS_MB)
    until = time.monotonic() + BACK_S
    while memory.whole() > 1.3 * whole_mb and time.monotonic() < until:
        time.sleep(0.5)
    after_mb, waited_s = memory.whole(), BACK_S - (until - time.monotonic())
    yield Row(
        "memory afterwards",
        "within 60 s at most 1.3 times that before, decoders included",
        f"{whole_mb:.0f} MB before, {after_mb:.0f} MB after {max(0, waited_s):.1f} s",
        after_mb <= 1.3 * whole_mb,
    )
    other.close()


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num", type=int, default=200)
    parser.add_argument("--placement", default="fused")
    parser.add_argument("--quick", action="store_const", const=24, dest="num")
    parser.add_argument("--attack", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.attack:
        print(json.dumps(attack(given.attack, given.num)))
        return 0
    return 0 if print_rows("pictures", run(given.num, given.placement)) else 1


if __name__ == "__main__":
    sys.exit(main())
