"""The Serve application: ``build`` turns a configuration into deployments, ``start`` and ``stop`` run it here.

A Serve config file names it as ``import_path: lookalike.serve.app:build``, with the fields of ``ServeConfig`` as
``args:``.
"""

import logging
import os
import re
import socket
import time
from collections.abc import Sequence
from typing import Any

import ray
from ray import serve
from ray.serve.config import AutoscalingConfig, gRPCOptions
from ray.serve.schema import LoggingConfig

from lookalike import storage
from lookalike.cluster import count_cpus, ensure_ray, is_joined
from lookalike.errors import LookalikeError, UsageError
from lookalike.serve.experiment.assignment import own_generations, read_arms
from lookalike.serve.front.guard import check_guard, check_tokens
from lookalike.serve.front.ingress import Ingress
from lookalike.serve.front.listener import SERVICERS
from lookalike.serve.front.overload import IMAGE_SHARE
from lookalike.serve.generations.adoption import adopt
from lookalike.serve.generations.database import Database
from lookalike.serve.generations.generation import Generation, read_generation
from lookalike.serve.generations.writer import Writer
from lookalike.serve.search.workers import RerankWorker, ShardWorker
from lookalike.serve.settings.config import ServeConfig
from lookalike.serve.settings.demand import Demand, check_largest, check_room, list_demands
from lookalike.serve.settings.load import ReplicaSettings
from lookalike.serve.wire.errors import MAX_MESSAGE_BYTES
from lookalike.telemetry import fields, get_logger

log = get_logger(__name__)
APP_NAME = "lookalike"
MESSAGE_VARIABLE = "RAY_SERVE_GRPC_MAX_MESSAGE_SIZE"
"""Ray's largest gRPC message in bytes, which its processes read when they start; 2 GiB by default."""
REPLICA_VARIABLE = "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH"
"""The same between replicas; 4 MiB by default."""
ROOM_BYTES = 1 << 20
"""What a request gains on its way from one replica to the next, at most."""
UNADMITTED = 100
"""Calls that an ingress replica takes beyond slots and queue: refusals, administration."""
DRAIN_S = 5.0
"""Seconds that a replaced index is kept beyond the request timeout."""
HEALTH_CHECKS = {"health_check_period_s": 3.0, "health_check_timeout_s": 5.0}
"""Serve replaces a replica that has missed three checks in a row: after at most 18 s of silence."""
WAIT_FOR_STATE_S = 5.0
"""Seconds that a service which ends may still hold the folder of the next."""
WAIT_FOR_ROOM_S = 10.0
"""Seconds that resources of replicas which have ended may still count as taken."""


def build(config: ServeConfig) -> serve.Application:
    """The application of ``config``, its artifacts found and checked against each other.

    Raises ``ArtifactError`` for one that is missing or damaged and ``UsageError`` when plan, encoder and index do not
    belong together.
    """
    if config.tls.enabled:
        raise UsageError(
            "tls is for `lookalike serve`, a Serve application cannot open it; leave it out and put a "
            "proxy before the gRPC port, as deploy/kuberay/retrieval.yaml does"
        )
    check_guard(config)
    check_tokens(config)
    return _assemble(config, read_service(config))


def _assemble(config: ServeConfig, generation: Generation) -> serve.Application:
    arms = read_arms(config, generation)
    shared: dict[str, Any] = {
        "max_ongoing_requests": config.max_ongoing_requests,
        "max_queued_requests": config.max_queued_requests or 1,  # Serve refuses a queue of size 0
        "max_surge_percent": 100,  # an update starts the new replica first: no request is lost
        "ray_actor_options": {"num_cpus": config.cpus_per_replica},
        "logging_config": LoggingConfig(enable_access_log=False),
        **HEALTH_CHECKS,
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
    bound += bound // IMAGE_SHARE + config.max_streams + UNADMITTED
    return {"max_ongoing_requests": 100_000 if config.max_queued_requests < 0 else bound}


def _writer(shared: dict[str, Any]) -> serve.Deployment:
    """One replica, never two: the old one leaves before a new one comes. Every follower has a call waiting there."""
    alone = {"num_replicas": 1, "max_surge_percent": 0, "max_ongoing_requests": 10_000}
    return serve.deployment(name="writer", **{**shared, **alone})(Writer)


def read_service(config: ServeConfig) -> Generation:
    """The generation that ``config`` names; raises as ``build`` does."""
    return read_generation(config.index, config.plan, config.encoder)


def start(config: ServeConfig) -> str:
    """Serve ``config`` from this machine's Ray (started when there is none) and return ``host:port`` once it answers.

    Port 0 takes a free one. Raises ``UsageError`` for a port in use, a folder of writes that cannot be used, replicas
    that find no room, or when Serve runs already; before Ray starts if that can be known.
    """
    port = free_port(config.port)
    check_guard(config)
    generation = read_service(config)
    application, demands = _assemble(config, generation), check_start(config, generation)
    allow_messages(config)
    ensure_ray()
    check_tokens(config)
    _check_no_serve()
    _check_cluster(demands)
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


def allow_messages(config: ServeConfig) -> None:
    """Have the Ray that starts here take messages as large as ``config`` allows."""
    message_bytes = max(config.limits.max_request_bytes, MAX_MESSAGE_BYTES)
    os.environ.setdefault(MESSAGE_VARIABLE, str(message_bytes))
    os.environ.setdefault(REPLICA_VARIABLE, str(message_bytes + ROOM_BYTES))


def check_start(config: ServeConfig, generation: Generation) -> list[Demand]:
    """The resources that the service needs; raises what can be known before Ray has started to keep it from running."""
    demands = list_demands(config, generation.meta.num_hash_shards, has_encoder=generation.encoder is not None)
    if not is_joined() and not ray.is_initialized():
        check_room(demands, {"CPU": float(count_cpus())}, "this machine", ["CPU"])
    folder = config.writes.state and storage.local_path(config.writes.state)
    if folder and (not is_joined() or os.path.exists(folder)):  # of a cluster it may be a folder of other machines
        _check_state(config, generation, folder)
    return demands


def _check_state(config: ServeConfig, generation: Generation, folder: str) -> None:
    """Open the folder of writes as the writer will; raises as the writer would, without its Ray."""
    try:
        database = Database(folder, wait_s=WAIT_FOR_STATE_S)
    except OSError as error:
        raise UsageError(
            f"writes.state={folder} cannot be used ({error.strerror or error}); give a folder that this user may "
            "write to"
        ) from None
    try:
        adopt(config, generation, database)
    finally:
        database.close()


def _check_cluster(demands: Sequence[Demand]) -> None:
    """Raise ``UsageError`` if Ray has no room for the replicas."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    check_largest(demands, nodes, ["CPU", "GPU", "memory"])
    deadline = time.monotonic() + WAIT_FOR_ROOM_S
    while True:
        total, free = ray.cluster_resources(), ray.available_resources()  # type: ignore[no-untyped-call]
        try:
            return check_room(demands, free, "Ray beside other work", ["CPU", "GPU", "memory"])
        except UsageError:
            check_room(demands, total, "Ray", ["CPU", "GPU", "memory"])
            if time.monotonic() > deadline:
                raise
        time.sleep(0.2)


def read_failures() -> str:
    """Errors that made replicas fail to start, as Serve reports them."""
    application = serve.status().applications.get(APP_NAME)
    deployments = {} if application is None else application.deployments
    errors = {
        name: [line for line in status.message.splitlines() if re.match(r"[\w.]*(Error|Exception): ", line)]
        for name, status in deployments.items()
    }
    return "; ".join(f"{name}: {lines[-1]}" for name, lines in errors.items() if lines)


def read_work() -> list[str]:
    """What Serve is putting right or starting, in words; empty if all runs. May hang as long as Serve does."""
    status = serve.status()
    work = [f"proxy {state.value}" for state in status.proxies.values() if state.value != "HEALTHY"]
    for name, application in status.applications.items():
        for deployment, each in application.deployments.items():
            states = ", ".join(f"{num} {state}" for state, num in each.replica_states.items())
            if each.status.value != "HEALTHY" or set(each.replica_states) - {"RUNNING"}:
                work.append(f"{deployment} {each.status.value} ({states or 'no replica'})")
        if not application.deployments:
            work.append(f"{name} {application.status.value}")
    return work


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
