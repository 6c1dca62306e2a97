"""The only place that starts or joins Ray."""

import logging
import os

from lookalike.config import Config, runtime
from lookalike.telemetry import fields, get_logger

log = get_logger(__name__)


class ClusterConfig(Config):
    """Settings of a local Ray. If ``RAY_ADDRESS`` is set, as in a submitted job, that cluster is joined instead."""

    num_cpus: int = runtime(2, ge=1)
    """CPUs of the local Ray."""
    object_store_mb: int = runtime(512, ge=80)
    """Size of the local object store in MiB."""
    progress_bars: bool = runtime(True)
    """Ray Data's own progress bars."""


def ensure_ray(config: ClusterConfig | None = None) -> None:
    """Join the cluster of ``RAY_ADDRESS``, keep a running session, or start a local one."""
    import ray

    if ray.is_initialized():
        return
    config = config or ClusterConfig()
    os.environ.setdefault("RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=False, logging_level=logging.WARNING)
    else:
        _start_local(config)
    configure_data(config)
    resources = ray.cluster_resources()  # type: ignore[no-untyped-call]
    nodes = ray.nodes()  # type: ignore[no-untyped-call]
    log.info("ray %s", fields(cpus=resources.get("CPU", 0.0), nodes=len(nodes)))


def _start_local(config: ClusterConfig) -> None:
    import ray

    for last in (False, True):  # on a busy machine a start may exceed Ray's own limit of half a minute
        try:
            ray.init(
                address="local",
                num_cpus=config.num_cpus,
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
    context.default_hash_shuffle_parallelism = max(2, config.num_cpus)
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.train").setLevel(logging.WARNING)
