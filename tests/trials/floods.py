"""One caller floods a service with connections, messages, streams or answers, while another tenant searches.

    python -m tests.trials.floods [--quick] [--seconds 20] [--placement sharded] [--cases "idle streams" ...]

The service has TLS and three tenants, in a Ray of its own. The attacker comes from 127.0.0.2, the tenant that must not
notice from 127.0.0.1. Each case is measured against the quiet time just before it.
"""

import argparse
import asyncio
import hashlib
import json
import os
import ssl
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import numpy as np
import psutil
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

from lookalike.cluster import ClusterConfig, ensure_ray
from lookalike.serve.app import MESSAGE_VARIABLE, free_port, start, stop
from lookalike.serve.client import Client, ClientTls
from lookalike.serve.front.tls import proxy
from lookalike.serve.proto import retrieval_pb2 as pb
from lookalike.serve.proto import retrieval_pb2_grpc as pb_grpc
from lookalike.serve.settings.config import ServeConfig
from lookalike.serve.settings.security import Tls
from lookalike.serve.settings.watching import AccessLogSettings
from lookalike.serve.wire.errors import MAX_MESSAGE_BYTES, RetrievalError
from tests.serve.front.certificates import Authority
from tests.serve.soak import publish_generations
from tests.trials import Row, print_rows

SOURCE = "127.0.0.2"
MESSAGE_BYTES = 60 << 20
VECTOR = np.arange(1, 65, dtype=np.float32)


class Size(NamedTuple):
    """How large the attacks are."""

    connections: int
    messages: int
    streams: int
    batches: int
    seconds: float
    back_s: float
    floor_ms: float
    """A 99th percentile below this is not told from the noise of the machine."""
    health_ms: float


FULL = Size(4200, 12, 430, 6, 20.0, 60.0, 150.0, 1000.0)
QUICK = Size(300, 2, 80, 2, 1.5, 30.0, 1000.0, 3000.0)


class Service(NamedTuple):
    """The running service, as callers see it."""

    host: str
    port: int
    authority: str
    tenants: Path

    @property
    def address(self) -> str:
        """Host and port of the TLS port."""
        return f"{self.host}:{self.port}"

    def client(self, token: str | None) -> Client:
        """A client with a token."""
        return Client(self.address, tls=ClientTls(self.authority), token=token, timeout_s=20)

    def channel(self) -> grpc.Channel:
        """A plain gRPC channel that sends messages of any size."""
        credentials = grpc.ssl_channel_credentials(Path(self.authority).read_bytes())
        return grpc.secure_channel(self.address, credentials, [("grpc.max_send_message_length", -1)])


@contextmanager
def serve(root: str, size: Size, placement: str) -> Iterator[Service]:
    """A service of 2 CPUs with the tenants ``a``, ``b`` and ``c``, whose tokens are their names."""
    (index, *_) = publish_generations(f"{root}/artifacts", np.random.default_rng(1))
    tenants = Path(root, "tenants.yaml")
    write_tenants(tenants, "abc")
    authority = Authority(Path(root), "authority")
    certificate, key = map(str, authority.issue("server"))
    bounds = {} if size is FULL else {"max_connections": 256, "source_connections": 64}
    tls = Tls(certificate=certificate, key=key, port=free_port(), **bounds)
    os.environ.setdefault(MESSAGE_VARIABLE, str(MAX_MESSAGE_BYTES))  # as ``start`` does where it starts Ray
    ensure_ray(ClusterConfig(num_cpus=2, object_store_mb=300, progress_bars=False))
    log = AccessLogSettings(folder=f"{root}/log")
    config = ServeConfig(
        index=index,
        encoder="none",
        placement=placement,
        port=0,
        tenants=str(tenants),
        cpus_per_replica=0.1,
        access_log=log,
    ).model_copy(update={"stream_idle_s": 2 * size.seconds})
    with ExitStack() as stack:
        plain = start(config)
        stack.callback(stop)
        running = stack.enter_context(proxy(tls, int(plain.rpartition(":")[2])))
        service = Service(tls.host, tls.port, str(authority.path), tenants)
        with service.client("b") as client:
            client.wait_ready()
            while client.search(vector=VECTOR).ids == []:
                time.sleep(0.1)
        time.sleep(3)  # the guard has looked up its settings
        running.check()
        yield service


def write_tenants(path: Path, names: Sequence[str]) -> None:
    """Write a tenants file with a reader for each name."""
    tenants = [{"name": name, "token_sha256": [hashlib.sha256(name.encode()).hexdigest()]} for name in names]
    path.write_text(yaml.safe_dump({"tenants": tenants}))


class Watch:
    """Searches of tenant ``b`` and health checks on new connections, each some times a second, while it is open."""

    def __init__(self, service: Service) -> None:
        self.search_ms: list[float] = []
        self.health_ms: list[float] = []
        self.errors: list[str] = []
        self._service, self._ended = service, threading.Event()
        self._threads = [threading.Thread(target=self._search), threading.Thread(target=self._check)]

    def __enter__(self) -> "Watch":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()

    def _search(self) -> None:
        with self._service.client("b") as client:
            client.search(vector=VECTOR)
            while not self._ended.wait(0.03):
                self._time(self.search_ms, lambda: client.search(vector=VECTOR, k=10))

    def _check(self) -> None:
        while not self._ended.wait(0.3):
            with self._service.channel() as channel:
                stub = health_pb2_grpc.HealthStub(channel)  # type: ignore[no-untyped-call]
                self._time(self.health_ms, lambda stub=stub: stub.Check(health_pb2.HealthCheckRequest(), timeout=10))

    def _time(self, times: list[float], call: Callable[[], Any]) -> None:
        begun = time.perf_counter()
        try:
            call()
        except (RetrievalError, grpc.RpcError) as error:
            self.errors.append(str(error)[:120])
        times.append(1000 * (time.perf_counter() - begun))

    @property
    def p99_ms(self) -> float:
        """99th percentile of the searches."""
        return float(np.percentile(self.search_ms, 99)) if self.search_ms else float("inf")


def resident_mb() -> dict[str, float]:
    """Resident memory of the proxy, the ingress and HAProxy, in MB; without Ray's object store, whose pages, of a size
    that is set, every process counts that has touched them, and without files that processes share.
    """
    found: dict[str, float] = {}
    for process in psutil.Process().children(recursive=True):
        try:
            name = " ".join(process.cmdline()[:1])
            for part in ("ProxyActor", "ingress", "haproxy"):
                if part in name:
                    memory = process.memory_info()
                    found[part] = found.get(part, 0.0) + (memory.rss - memory.shared) / 1e6
        except psutil.Error:
            continue
    return found


def measure(case: str, service: Service, size: Size) -> Iterator[Row]:
    """Rows of one attack, made by another process."""
    with Watch(service) as quiet:
        time.sleep(size.seconds / 2)
    before = resident_mb()
    with attacker(case, service, size) as process, Watch(service) as under:
        said = process.stdout.readline().strip() if process.stdout is not None else ""
        peak = resident_mb()
    allowed = max(3 * quiet.p99_ms, size.floor_ms)
    seen = f"{under.p99_ms:.0f} ms, quiet {quiet.p99_ms:.0f}; {len(under.errors)} errors {under.errors[:1]}; {said}"
    promised = f"p99 of another tenant at most {allowed:.0f} ms, no error"
    yield Row(case, promised, seen, under.p99_ms <= allowed and not under.errors)
    worst = max(under.health_ms, default=float("inf"))
    median = statistics.median(under.health_ms) if under.health_ms else float("inf")
    seen = f"median {median:.0f} ms, worst {worst:.0f} ms"
    yield Row(case, f"health within {size.health_ms:g} ms", seen, worst < size.health_ms)
    back_s, after = wait_for_memory(before, size.back_s)
    parts = ", ".join(f"{name} {before[name]:.0f}, {peak.get(name, 0):.0f}, {after[name]:.0f}" for name in before)
    kept = all(after[name] <= max(1.3 * before[name], before[name] + 30) for name in before)
    yield Row(case, f"memory back to 1.3 times within {size.back_s:g} s", f"{back_s:.0f} s; MB {parts}", kept)


@contextmanager
def attacker(case: str, service: Service, size: Size) -> Iterator["subprocess.Popen[str]"]:
    """A process that attacks from the begin of the block, and at the end writes what became of it."""
    given = json.dumps([case, [service.host, service.port, service.authority, str(service.tenants)], size])
    command = [sys.executable, "-m", "tests.trials.floods", "--attack", given]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield process
        finally:
            process.kill()


def attack(given: str) -> None:
    """Be the attacker."""
    case, (host, port, authority, tenants), numbers = json.loads(given)
    size = Size(*numbers)
    made = ATTACKS[case](Service(host, port, authority, Path(tenants)), size)
    print("begun", flush=True)
    print(made(time.monotonic() + size.seconds), flush=True)


def wait_for_memory(before: dict[str, float], seconds: float) -> tuple[float, dict[str, float]]:
    """Seconds until memory is back, at most ``seconds``, and what it is then."""
    begun = time.monotonic()
    while True:
        now = resident_mb()
        waited = time.monotonic() - begun
        if waited > seconds or all(now.get(name, 0) <= 1.3 * before[name] for name in before):
            return waited, {name: now.get(name, 0.0) for name in before}
        time.sleep(0.5)


def flood_connections(service: Service, size: Size, *, encrypted: bool) -> Callable[[float], str]:
    """Open quiet connections, and again what was closed, until the end."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])

    async def attack(end: float) -> str:
        opened = refused = 0

        async def hold() -> None:
            nonlocal opened, refused
            while time.monotonic() < end:
                writer = None
                try:
                    reader, writer = await asyncio.open_connection(
                        service.host, service.port, local_addr=(SOURCE, 0), ssl=context if encrypted else None
                    )
                    opened += 1
                    async with asyncio.timeout_at(asyncio.get_running_loop().time() + end - time.monotonic()):
                        await reader.read()
                except (OSError, ssl.SSLError, TimeoutError, asyncio.IncompleteReadError):
                    refused += 1
                finally:
                    if writer is not None:
                        writer.close()
                await asyncio.sleep(1)

        await asyncio.gather(*(hold() for _ in range(size.connections)))
        return f"{opened} connections opened, {refused} refused"

    return lambda end: asyncio.run(attack(end))


def one_image() -> Any:
    """A search by an image larger than any may be."""
    return pb.SearchRequest(query=pb.Query(image=bytes(MESSAGE_BYTES)))


def six_images() -> Any:
    """The largest batch of images that the limits admit."""
    return pb.SearchBatchRequest(queries=[pb.Query(image=bytes(MESSAGE_BYTES // 6 - 500_000))] * 6)


def empty_queries() -> Any:
    """As many queries as find room in a message."""
    return pb.SearchBatchRequest(queries=[pb.Query()] * (MESSAGE_BYTES // 2))


def flood_messages(
    service: Service, size: Size, token: str | None, compression: grpc.Compression, make: Callable[[], Any] = one_image
) -> Callable[[float], str]:
    """Send the largest messages from several threads until the end."""
    request = make()
    content, rpc = request.SerializeToString(), request.DESCRIPTOR.name.removesuffix("Request")
    metadata = [] if token is None else [("authorization", f"Bearer {token}")]

    def attack(end: float) -> str:
        codes: list[str] = []

        def send() -> None:
            with service.channel() as channel:
                call = channel.unary_unary(f"/lookalike.v1.RetrievalService/{rpc}")
                while time.monotonic() < end:
                    try:
                        call(content, metadata=metadata, compression=compression, timeout=20)
                    except grpc.RpcError as error:
                        codes.append(error.code().name)  # type: ignore[attr-defined]
                    time.sleep(0.2)

        run_threads(send, size.messages)
        return ", ".join(f"{codes.count(code)} {code}" for code in sorted(set(codes)))

    return attack


def flood_streams(service: Service, size: Size) -> Callable[[float], str]:
    """Hold idle streams of tenant ``a`` until the end."""

    def attack(end: float) -> str:
        async def hold(stub: Any) -> str:
            call = stub.SearchStream(metadata=[("authorization", "Bearer a")])
            try:
                async with asyncio.timeout(max(0.1, end - time.monotonic())):
                    await call.read()
                return str((await call.code()).name)
            except TimeoutError:
                call.cancel()
                return "open"
            except grpc.RpcError as error:
                return str(error.code().name)  # type: ignore[attr-defined]

        async def run() -> list[str]:
            credentials = grpc.ssl_channel_credentials(Path(service.authority).read_bytes())
            channels = [
                grpc.aio.secure_channel(service.address, credentials, [("grpc.use_local_subchannel_pool", 1)])
                for _ in range(max(1, size.streams // 50))
            ]
            stubs = [pb_grpc.RetrievalServiceStub(channel) for channel in channels]  # type: ignore[no-untyped-call]
            ends = await asyncio.gather(*(hold(stubs[number % len(stubs)]) for number in range(size.streams)))
            for channel in channels:
                await channel.close()
            return ends

        ends = asyncio.run(run())
        return ", ".join(f"{ends.count(code)} {code}" for code in sorted(set(ends)))

    return attack


def flood_answers(service: Service, size: Size, **options: Any) -> Callable[[float], str]:
    """Ask for the largest batches as tenant ``a`` until the end."""

    def attack(end: float) -> str:
        codes: list[str] = []

        def ask() -> None:
            with service.client("a") as client:
                while time.monotonic() < end:
                    try:
                        client.search_batch([VECTOR] * 256, **options)
                        codes.append("OK")
                    except RetrievalError as error:
                        codes.append(error.code.name)
                        time.sleep(0.1)

        run_threads(ask, size.batches)
        return ", ".join(f"{codes.count(code)} {code}" for code in sorted(set(codes)))

    return attack


def run_threads(work: Callable[[], None], num: int) -> None:
    """Run ``work`` in threads, to their end."""
    threads = [threading.Thread(target=work) for _ in range(num)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def revoke(service: Service) -> Row:
    """Open a stream, take its token away, and see how long it stays open."""
    ended = threading.Event()

    def batches() -> Iterator[Any]:
        yield [VECTOR]
        ended.wait(20)

    with service.client("c") as client:
        answers = client.search_stream(batches())
        next(answers)
        write_tenants(service.tenants, "ab")
        begun, code = time.monotonic(), "OK"
        try:
            for _ in answers:
                pass
        except RetrievalError as error:
            code = error.code.name
        seconds = time.monotonic() - begun
        ended.set()
    return Row(
        "stream of a revoked token",
        "UNAUTHENTICATED within 5 s",
        f"{code} after {seconds:.1f} s",
        code == "UNAUTHENTICATED" and seconds < 5,
    )


def give_feedback(service: Service) -> Row:
    """Feedback on one's own answer, and on another tenant's."""
    codes = []
    with service.client("b") as own, service.client("a") as other:
        request_id = own.search(vector=VECTOR).info.request_id
        for client in (own, other):
            try:
                client.feedback(request_id, "click")
                codes.append("OK")
            except RetrievalError as error:
                codes.append(error.code.name)
    wanted = ["OK", "PERMISSION_DENIED"]
    return Row("feedback on one's own and another's answer", ", ".join(wanted), ", ".join(codes), codes == wanted)


def count_log_bytes(service: Service, num: int) -> Row:
    """Make refused calls with and without a token, and see what the logs of this Ray grow by."""
    import ray

    folder = Path(ray._private.worker.global_worker.node.get_session_dir_path(), "logs")  # noqa: SLF001
    before = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    with service.channel() as channel:
        stub = pb_grpc.RetrievalServiceStub(channel)  # type: ignore[no-untyped-call]
        for number in range(num):
            metadata = [("authorization", f"Bearer {'a' if number % 2 else 'unknown'}")]
            try:
                stub.Search(pb.SearchRequest(), metadata=metadata, timeout=10)
            except grpc.RpcError:
                continue
    time.sleep(2)
    grown = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) - before
    return Row("logs of refused calls", "less than 300 bytes a call", f"{grown / num:.0f} bytes", grown < 300 * num)


PLAIN, GZIP = grpc.Compression.NoCompression, grpc.Compression.Gzip
ATTACKS: dict[str, Callable[[Service, Size], Callable[[float], str]]] = {
    "quiet TCP connections": lambda service, size: flood_connections(service, size, encrypted=False),
    "quiet TLS connections": lambda service, size: flood_connections(service, size, encrypted=True),
    "messages without a token": lambda service, size: flood_messages(service, size, None, PLAIN),
    "messages without a token, gzip": lambda service, size: flood_messages(service, size, None, GZIP),
    "messages with a token": lambda service, size: flood_messages(service, size, "a", PLAIN),
    "messages with a token, gzip": lambda service, size: flood_messages(service, size, "a", GZIP),
    "batches of images with a token": lambda service, size: flood_messages(service, size, "a", PLAIN, six_images),
    "batches of nothing with a token": lambda service, size: flood_messages(service, size, "a", GZIP, empty_queries),
    "idle streams": flood_streams,
    "answers of 256 x k=250": lambda service, size: flood_answers(service, size, k=250),
    "answers of 256 x k=1000": lambda service, size: flood_answers(service, size, k=1000),
}


def run(size: Size, placement: str = "fused", cases: Sequence[str] = ()) -> Iterator[Row]:
    """Rows of the attacks named by ``cases``, or of all."""
    with tempfile.TemporaryDirectory() as root, serve(root, size, placement) as service:
        for case in cases or ATTACKS:
            yield from measure(case, service, size)
        if cases:
            return
        yield count_log_bytes(service, 40 * size.messages)
        yield give_feedback(service)
        yield revoke(service)


def main() -> int:
    """Print the rows; 0 if every promise was kept."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seconds", type=float, help="length of each attack")
    parser.add_argument("--placement", default="fused", choices=["fused", "sharded", "staged"])
    parser.add_argument("--cases", nargs="+", default=[], choices=list(ATTACKS), metavar="CASE")
    parser.add_argument("--attack", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.attack is not None:
        attack(options.attack)
        return 0
    size = QUICK if options.quick else FULL
    if options.seconds is not None:
        size = size._replace(seconds=options.seconds)
    return 0 if print_rows("floods", run(size, options.placement, options.cases)) else 1


if __name__ == "__main__":
    sys.exit(main())
