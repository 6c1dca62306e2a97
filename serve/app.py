"""The Serve application: ``build`` turns a configuration into deployments, ``start`` and ``stop`` run it here.

A Serve config file names it as ``import_path: lookalike.serve.app:build``, with the fields of ``ServeConfig`` as
``args:``.
"""

import logging
import os
import re
import socket
from typing import Any

import ray
from ray import serve
from ray.serve.config import AutoscalingConfig, gRPCOptions
from ray.serve.schema import LoggingConfig

from lookalike.cluster import ensure_ray
from lookalike.errors import LookalikeError, UsageError
from lookalike.serve.experiment.assignment import own_generations, read_arms
from lookalike.serve.front.ingress import SERVICERS, Ingress
from lookalike.serve.front.overload import IMAGE_SHARE
from lookalike.serve.front.tenants import read_tenants
from lookalike.serve.front.tls import LOOPBACK, check_files
from lookalike.serve.generations.generation import Generation, read_generation
from lookalike.serve.generations.writer import Writer
from lookalike.serve.search.workers import RerankWorker, ShardWorker
from lookalike.serve.settings.config import ServeConfig
from lookalike.serve.settings.load import ReplicaSettings
from lookalike.serve.settings.security import Tls
from lookalike.telemetry import fields, get_logger

log = get_logger(__name__)
APP_NAME = "lookalike"
UNADMITTED = 100
"""Calls that an ingress replica takes beyond slots and queue: refusals, administration."""
DRAIN_S = 5.0
"""Seconds that a replaced index is kept beyond the request timeout."""


def build(config: ServeConfig) -> serve.Application:
    """The application of ``config``, its artifacts found and checked against each other.

    Raises ``ArtifactError`` for one that is missing or damaged and ``UsageError`` when plan, encoder and index do not
    belong together.
    """
    check_guard(config)
    if config.tls.enabled:
        raise UsageError(
            "tls is for `lookalike serve`, a Serve application cannot open it; leave it out and put a "
            "proxy before the gRPC port, as deploy/kuberay/retrieval.yaml does"
        )
    generation = read_service(config)
    arms = read_arms(config, generation)
    shared: dict[str, Any] = {
        "max_ongoing_requests": config.max_ongoing_requests,
        "max_queued_requests": config.max_queued_requests or 1,  # Serve refuses a queue of size 0
        "max_surge_percent": 100,  # an update starts the new replica first: no request is lost
        "ray_actor_options": {"num_cpus": config.cpus_per_replica},
        "logging_config": LoggingConfig(enable_access_log=False),
    }
    num_groups, kinds, cpus = generation.meta.num_hash_shards, config.deployments, config.cpus_per_replica
    writer, generations = None, [generation, *own_generations(arms, generation)]
    if config.writes.state is not None:
        writer, generations = _writer(shared).bind(config, generation), []  # replicas learn them from the writer

    def deployment(name: str, **options: Any) -> dict[str, Any]:
        followed = {"role": name, "drain_s": config.timeout_s + DRAIN_S}
        return {"name": name, **shared, **options, **({"user_config": followed} if writer is not None else {})}

    front = replica_options(kinds.ingress, config.num_replicas, cpus)
    ingress = serve.deployment(**deployment("ingress", **front, **ingress_bounds(config)))(Ingress)
    if config.placement == "fused":
        return ingress.bind(config, generation, None, writer, arms)
    parts = replica_options(kinds.shards, config.shard_replicas, cpus)
    shards = [
        serve.deployment(**deployment(f"shard-{group:03d}", **parts))(ShardWorker).bind(
            group, num_groups, generations, writer
        )
        for group in range(num_groups)
    ]
    reranker, encoder = None, None
    if config.placement == "staged":
        options = deployment("rerank", **replica_options(kinds.rerank, config.shard_replicas, cpus))
        reranker = serve.deployment(**options)(RerankWorker).bind(generations, writer)
    if any(each.encoder is not None for each in (generation, *generations)):
        from lookalike.serve.search.encoding import BatchingEncoder  # imports torch

        own = config.encoder_replicas
        options = deployment("encoder", **replica_options(kinds.encoder, own.num_replicas, cpus, own.num_gpus))
        encoder = serve.deployment(**options)(BatchingEncoder).bind(config, generations, writer)
    return ingress.bind(config, generation, (shards, reranker, encoder), writer, arms)


def replica_options(
    settings: ReplicaSettings, num_replicas: int, num_cpus: float, num_gpus: float = 0.0
) -> dict[str, Any]:
    """Deployment options: number of replicas, and the resources of each; ``settings`` override the other arguments.

    With autoscaling, ``num_replicas`` is where it starts, moved into its bounds.
    """
    actor: dict[str, Any] = {"num_cpus": num_cpus if settings.num_cpus is None else settings.num_cpus}
    if num_gpus:
        actor["num_gpus"] = num_gpus
    if settings.memory_mb is not None:
        actor["memory"] = settings.memory_mb << 20
    scaling = settings.autoscaling
    if scaling is None:
        return {"num_replicas": num_replicas, "ray_actor_options": actor}
    serve_scaling = AutoscalingConfig(
        **scaling.model_dump(exclude={"look_back_s"}),
        look_back_period_s=scaling.look_back_s,
        initial_replicas=min(max(num_replicas, scaling.min_replicas), scaling.max_replicas),
    )
    return {"autoscaling_config": serve_scaling, "ray_actor_options": actor}


def ingress_bounds(config: ServeConfig) -> dict[str, int]:
    """Serve's own bound for the ingress, above that of ``overload.py``, which tells callers when to come back."""
    bound = config.max_ongoing_requests + config.max_queued_requests
    bound += bound // IMAGE_SHARE + UNADMITTED
    return {"max_ongoing_requests": 100_000 if config.max_queued_requests < 0 else bound}


def _writer(shared: dict[str, Any]) -> serve.Deployment:
    """One replica, never two: the old one leaves before a new one comes. Every follower has a call waiting there."""
    alone = {"num_replicas": 1, "max_surge_percent": 0, "max_ongoing_requests": 10_000}
    alone |= {"health_check_period_s": 5, "health_check_timeout_s": 10}  # often: a writer that hangs holds up writes
    return serve.deployment(name="writer", **{**shared, **alone})(Writer)


def check_guard(config: ServeConfig) -> None:
    """Raise ``UsageError`` if the access settings contradict each other or their files are missing."""
    if config.loopback_only and os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1":
        raise UsageError(
            "loopback_only=true cannot hold behind HAProxy, where every caller looks local; set "
            "serve.loopback_only=false and guard the port by network policy"
        )
    if config.tenants is not None:
        read_tenants(config.tenants)
    if config.writes.state is not None and not config.loopback_only and config.tenants is None:
        raise UsageError(
            "writes.state lets whoever reaches the port write and switch indexes, and loopback_only=false "
            "admits every machine; set serve.tenants, so that it takes a token"
        )
    check_files(config.tls)
    guarded = config.tenants is not None or config.tls.client_ca is not None
    if config.tls.enabled and config.tls.host not in LOOPBACK and config.loopback_only and not guarded:
        raise UsageError(
            f"tls.host={config.tls.host} admits callers from other machines, who look local to "
            "loopback_only=true; set serve.tenants or tls.client_ca, or loopback_only=false to admit "
            "everyone"
        )


def read_service(config: ServeConfig) -> Generation:
    """The generation that ``config`` names; raises as ``build`` does."""
    return read_generation(config.index, config.plan, config.encoder)


def start(config: ServeConfig) -> str:
    """Serve ``config`` from this machine's Ray (started when there is none) and return ``host:port`` once it answers.

    Port 0 takes a free one. Raises ``UsageError`` for a port in use, or when Serve runs already.
    """
    port = free_port(config.port)
    application = build(config.model_copy(update={"tls": Tls()}))
    ensure_ray()
    _check_no_serve()
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(
        proxy_location="HeadOnly",
        http_options={"host": "127.0.0.1", "port": free_port()},
        grpc_options=gRPCOptions(port=port, grpc_servicer_functions=SERVICERS),
        logging_config=LoggingConfig(log_level="WARNING", enable_access_log=False),
    )
    try:
        serve.run(application, name=APP_NAME, route_prefix="/")  # without a prefix Serve routes no gRPC either
    except RuntimeError as error:  # Serve's own, which names deployments alone
        reasons = read_failures() or str(error)
        stop()
        raise LookalikeError(f"the service does not start: {reasons}") from None
    except BaseException:  # also Ctrl-C while replicas start
        stop()
        raise
    log.info("serving %s", fields(address=f"127.0.0.1:{port}", placement=config.placement, index=config.index))
    return f"127.0.0.1:{port}"


def read_failures() -> str:
    """Errors that made replicas fail to start, as Serve reports them."""
    application = serve.status().applications.get(APP_NAME)
    deployments = {} if application is None else application.deployments
    errors = {
        name: [line for line in status.message.splitlines() if re.match(r"[\w.]*(Error|Exception): ", line)]
        for name, status in deployments.items()
    }
    return "; ".join(f"{name}: {lines[-1]}" for name, lines in errors.items() if lines)


def _check_no_serve() -> None:
    """Raise ``UsageError`` if Serve runs already: its ports are fixed, and ours would be ignored silently."""
    try:
        ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
    except ValueError:
        return
    raise UsageError(
        "Ray Serve runs already in this cluster; stop it (`serve shutdown`), or deploy beside it with "
        "`lookalike serve --emit-config` and `serve deploy`"
    )


def stop() -> None:
    """End what ``start`` started; Ray itself stays."""
    serve.shutdown()  # type: ignore[no-untyped-call]


def free_port(port: int = 0) -> int:
    """``port`` if nothing listens on it, a free port for 0; raises ``UsageError`` if it is taken."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise UsageError(
                f"port {port} cannot be used ({error.strerror}); set port to another, or to 0 (in a recipe: serve.port)"
            ) from None
        return int(probe.getsockname()[1])
