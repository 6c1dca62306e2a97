"""The only place that starts or joins Ray."""

import logging
import os
import signal
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple

from lookalike.config import Config, runtime
from lookalike.telemetry import fields, get_logger

log = get_logger(__name__)


ENVIRONMENT = {
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",  # a silent replica would get 20 s to say goodbye
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "3",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "5",
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(65 << 20),  # requests of 64 MiB go on to other replicas
    "RAY_health_check_period_ms": "1000",  # a lost node is known after 5 failed checks: 5 s, not 15
    "RAY_kill_worker_timeout_milliseconds": "1000",  # a frozen replica would keep its CPUs for 5 s after its end
}
"""Environment of the Ray that is started here, unless it is set; ``deploy/kuberay/retrieval.yaml`` sets those for Serve
and nodes."""


class ClusterConfig(Config):
    """Settings of a local Ray. If ``RAY_ADDRESS`` is set, as in a submitted job, that cluster is joined instead."""

    num_cpus: int | None = runtime(None, ge=1)
    """CPUs of the local Ray; None takes all that this process may use."""
    object_store_mb: int = runtime(512, ge=80)
    """Size of the local object store in MiB."""
    progress_bars: bool = runtime(True)
    """Ray Data's own progress bars."""


LOOPBACK_VARIABLE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""Whether the Ray that is started here takes this machine's address ("1"), so that other machines may join it."""
CPU_QUOTAS = ("/sys/fs/cgroup/cpu.max", "/sys/fs/cgroup/cpu/cpu.cfs_quota_us")
"""Where a container's share of the CPUs stands: "QUOTA PERIOD", or the quota alone for a period of 0.1 s."""


def set_environment() -> None:
    """Set ``ENVIRONMENT`` for Ray's processes that are started from here."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def count_cpus() -> int:
    """Whole CPUs that this process may use: those of its affinity, or of its container's quota if that is less."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for path in map(Path, CPU_QUOTAS):
        quota, *period = path.read_text().split() if path.exists() else ["max"]
        if quota.isdigit():
            cpus = min(cpus, int(quota) // int(period[0] if period else 100_000))
    return max(1, cpus)


def is_joined() -> bool:
    """Whether ``ensure_ray`` joins a cluster that others have started, as in a submitted job."""
    return bool(os.environ.get("RAY_ADDRESS"))


_is_background: ContextVar[bool] = ContextVar("is_background", default=False)


@contextmanager
def background() -> Iterator[None]:
    """Work in this block takes CPUs that others leave free, and reserves none: it never waits for room."""
    token = _is_background.set(True)
    try:
        yield
    finally:
        _is_background.reset(token)


def background_processes() -> int | None:
    """Number of processes that work here may use, this one included; None outside of ``background``."""
    import ray

    if not _is_background.get():
        return None
    free = ray.available_resources() if ray.is_initialized() else {}  # type: ignore[no-untyped-call]
    return max(1, int(free.get("CPU", 0.0)))


class Part(NamedTuple):
    """A process without which nothing works, and which nobody starts again."""

    name: str
    has_ended: bool
    is_stopped: bool
    """Whether it stands still, as after SIGSTOP."""


def look_at(name: str, process: Any) -> Part:
    """The state of ``process``, a ``Popen``."""
    has_ended, letter = process.poll() is not None, ""
    with suppress(OSError):
        letter = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]
    return Part(name, has_ended, letter in ("T", "t"))


def ray_parts() -> list[Part]:
    """The raylet and the GCS of the Ray that this process has started."""
    node = _own_node()
    processes = {} if node is None else node.all_processes
    names = {"raylet": "Ray's raylet", "gcs_server": "Ray's GCS"}
    return [look_at(names[kind], each.process) for kind in names for each in processes.get(kind, [])]


def kill_ray() -> None:
    """Kill the Ray that this process has started, with its workers, which outlive a lost raylet. Asks Ray nothing."""
    node = _own_node()
    if node is None:
        return
    logs, parents = node.get_logs_dir_path(), dict[int, int]()
    doomed = {os.getpid()}
    for process in map(int, filter(str.isdigit, os.listdir("/proc"))):
        with suppress(OSError):
            parents[process] = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
            if _writes_below(process, logs):
                doomed.add(process)
    while more := {process for process, parent in parents.items() if parent in doomed} - doomed:
        doomed |= more
    for process in doomed - {os.getpid()}:
        with suppress(OSError):
            os.kill(process, signal.SIGKILL)


def _writes_below(process: int, folder: str) -> bool:
    """Whether ``process`` has a file below ``folder`` open for writing: Ray's agents write to pipes and to logs."""
    for number in os.listdir(f"/proc/{process}/fd"):
        path = f"/proc/{process}/fd/{number}"
        with suppress(OSError):  # closed meanwhile
            if os.readlink(path).startswith(folder) and os.lstat(path).st_mode & stat.S_IWUSR:
                return True
    return False


def _own_node() -> Any:
    """The Ray that this process has started; None if it has joined one, or none runs."""
    import ray

    node = ray._private.worker._global_node  # noqa: SLF001  # nothing public names Ray's processes
    return node if node is not None and node.head else None


def _keep_on_loopback() -> None:
    """Have the Ray that starts here listen on 127.0.0.1 alone, unless the user has set otherwise.

    By its name the variable is for other systems; on all of them it decides whether Ray takes the machine's address.
    """
    import ray

    is_open = os.environ.setdefault(LOOPBACK_VARIABLE, "0").lower() in ("1", "true")  # for Ray's processes
    constants = ray._private.ray_constants  # noqa: SLF001  # this process may have read the variable when it imported Ray
    constants.ENABLE_RAY_CLUSTER = is_open


def token_file() -> Path:
    """Ray's token on this machine; who reads it runs code in the clusters that accept it."""
    default = os.path.expanduser("~/.ray/auth_token")  # as Ray does it; a user of a container may have no home
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or default)


def warn_of_token() -> None:
    """Warn if other users may read Ray's token, which Ray writes with the process's umask."""
    path = token_file()
    if path.exists() and path.stat().st_mode & 0o077:
        log.warning("other users may read Ray's token and run code with it %s", fields(remedy=f"chmod 600 {path}"))


def ensure_ray(config: ClusterConfig | None = None) -> None:
    """Join the cluster of ``RAY_ADDRESS``, keep a running session, or start a local one."""
    import ray

    if ray.is_initialized():
        return
    config = config or ClusterConfig()
    set_environment()
    if is_joined():
        ray.init(log_to_driver=False, logging_level=logging.WARNING)
    else:
        _start_local(config)
    warn_of_token()
    configure_data(config)
    resources = ray.cluster_resources()  # type: ignore[no-untyped-call]
    nodes = ray.nodes()  # type: ignore[no-untyped-call]
    log.info("ray %s", fields(cpus=resources.get("CPU", 0.0), nodes=len(nodes)))


def _start_local(config: ClusterConfig) -> None:
    import ray

    _keep_on_loopback()
    for last in (False, True):  # on a busy machine a start may exceed Ray's own limit of half a minute
        try:
            ray.init(
                address="local",
                num_cpus=config.num_cpus or count_cpus(),
                object_store_memory=config.object_store_mb << 20,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.WARNING,
            )
            return
        except Exception as error:  # Ray raises plain Exception here
            if last:
                raise
            log.warning("ray did not start, trying again %s", fields(error=str(error)[:200]))
            ray.shutdown()


def configure_data(config: ClusterConfig) -> None:
    """Ray Data defaults for this session: keep the block order; be quiet unless ``progress_bars`` is set."""
    from ray.data import DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = config.progress_bars
    context.execution_options.preserve_order = True
    context.default_hash_shuffle_parallelism = max(2, config.num_cpus or count_cpus())
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.train").setLevel(logging.WARNING)
