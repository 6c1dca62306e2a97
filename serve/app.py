"""The Serve application: ``build`` turns one configuration into deployments, ``start`` and ``stop`` run it here.

``import_path: lookalike.serve.app:build`` with ``args:`` of ``ServeConfig`` is the form a Serve config file takes.
"""

import logging
import os
import socket
from typing import Any

import ray
from ray import serve
from ray.serve.config import gRPCOptions
from ray.serve.schema import LoggingConfig

from lookalike.artifacts import Artifact, lineage
from lookalike.cluster import ensure_ray
from lookalike.errors import ArtifactError, UsageError
from lookalike.retrieval.index_meta import IndexMeta, read_index_meta
from lookalike.retrieval.plan import Plan, load_measured, load_plan
from lookalike.serve.config import ServeConfig
from lookalike.serve.ingress import SERVICERS, Ingress
from lookalike.serve.requests import Plans, check_plan
from lookalike.serve.workers import RerankWorker, ShardWorker, shard_uris
from lookalike.telemetry import fields, get_logger

log = get_logger(__name__)
APP_NAME = "lookalike"


def build(config: ServeConfig) -> serve.Application:
    """The application of ``config``, its artifacts found and checked against each other.

    Raises ``ArtifactError`` for one that is missing or damaged and ``UsageError`` when plan, encoder and index do not
    belong together.
    """
    _check_guard(config)
    meta, plans, encoder_uri = read_service(config)
    shared: dict[str, Any] = {
        "max_ongoing_requests": config.max_ongoing_requests,
        "max_queued_requests": config.max_queued_requests,
        "max_surge_percent": 100,  # an update starts the new replica first: no request is lost
        "ray_actor_options": {"num_cpus": config.cpus_per_replica},
        "logging_config": LoggingConfig(enable_access_log=False),
    }
    ingress = serve.deployment(name="ingress", num_replicas=config.num_replicas, **shared)(Ingress)
    if config.placement == "fused":
        return ingress.bind(config, meta, plans, encoder_uri)
    uris = shard_uris(config, meta)
    shared["num_replicas"] = config.shard_replicas
    shards = [serve.deployment(name=f"shard-{number:03d}", **shared)(ShardWorker).bind(uri)
              for number, uri in enumerate(uris)]  # fmt: skip
    reranker = None
    if config.placement == "staged":
        reranker = serve.deployment(name="rerank", **shared)(RerankWorker).bind(uris)
    encoder = None if encoder_uri is None else _encoder(config, shared).bind(encoder_uri, config)
    return ingress.bind(config, meta, plans, encoder_uri, (shards, reranker, encoder))


def _encoder(config: ServeConfig, shared: dict[str, Any]) -> serve.Deployment:
    from lookalike.serve.encoding import BatchingEncoder  # torch: only for those who encode

    replicas = config.encoder_replicas
    resources = {"num_cpus": config.cpus_per_replica, "num_gpus": replicas.num_gpus}
    options = {**shared, "num_replicas": replicas.num_replicas, "ray_actor_options": resources}
    return serve.deployment(name="encoder", **options)(BatchingEncoder)


def _check_guard(config: ServeConfig) -> None:
    if config.loopback_only and os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1":
        raise UsageError("loopback_only=true cannot hold behind HAProxy, where every caller looks local; set "
                         "serve.loopback_only=false and guard the port by network policy")  # fmt: skip


def read_service(config: ServeConfig) -> tuple[IndexMeta, Plans, str | None]:
    """The index's facts, the plans and the encoder's URI, checked to belong together; raises as ``build`` does."""
    meta = read_index_meta(Artifact.open(config.index, "index"))
    return meta, read_plans(config, meta), find_encoder(config, meta)


def read_plans(config: ServeConfig, meta: IndexMeta) -> Plans:
    """The configured plan and those measured beside it, checked against the index; exact search when there is none."""
    exact = Plan.exact(meta.dim)
    if config.plan is None:
        return Plans(exact, exact)
    plan = load_plan(config.plan)
    check_plan(plan, meta)
    return Plans(plan, exact, load_measured(config.plan))


def find_encoder(config: ServeConfig, meta: IndexMeta) -> str | None:
    """URI of the encoder that made the index's vectors, or None when none is wanted.

    ``auto`` follows the lineage; an encoder that is gone raises ``ArtifactError``, one of another fingerprint
    ``UsageError``.
    """
    if config.encoder == "none":
        return None
    uri = _encoder_of_lineage(config.index, meta.model_fingerprint) if config.encoder == "auto" else config.encoder
    encoder = Artifact.open(uri, "encoder", check=False)
    if encoder.manifest.fingerprint != meta.model_fingerprint:
        found = encoder.manifest.fingerprint
        raise UsageError(f"encoder {uri} has fingerprint {found}, the index {config.index} holds vectors of "
                         f"{meta.model_fingerprint}; serve it with its own encoder, or index again")  # fmt: skip
    return uri


def _encoder_of_lineage(index_uri: str, fingerprint: str) -> str:
    for _, _, ancestor in lineage(Artifact.open(index_uri, "index", check=False)):
        if isinstance(ancestor, Artifact) and ancestor.manifest.fingerprint == fingerprint:
            return ancestor.uri
    raise ArtifactError(f"no encoder {fingerprint} in the lineage of {index_uri}; set serve.encoder to its URI, or to "
                        "none to serve vectors and ids only")  # fmt: skip


def start(config: ServeConfig) -> str:
    """Serve ``config`` from this machine's Ray (started when there is none) and return ``host:port`` once it answers.

    ``config.port`` 0 takes a free port. Raises ``UsageError`` for a port in use, or when
    Serve runs already.
    """
    port = free_port(config.port)
    application = build(config)
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
    except BaseException:  # also Ctrl-C while replicas start
        stop()
        raise
    log.info("serving %s", fields(address=f"127.0.0.1:{port}", placement=config.placement, index=config.index))
    return f"127.0.0.1:{port}"


def _check_no_serve() -> None:
    """Ports belong to the whole Serve instance: beside one that runs already ours would be ignored silently."""
    try:
        ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
    except ValueError:
        return
    raise UsageError("Ray Serve runs already in this cluster; stop it (`serve shutdown`), or deploy beside it with "
                     "`lookalike serve --emit-config` and `serve deploy`")  # fmt: skip


def stop() -> None:
    """End what ``start`` started; Ray itself stays."""
    serve.shutdown()  # type: ignore[no-untyped-call]


def free_port(port: int = 0) -> int:
    """``port`` when nothing listens on it, any free one for 0; raises ``UsageError`` when it is taken."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            reason = error.strerror
            raise UsageError(f"port {port} cannot be used ({reason}); set serve.port to another, or to 0") from None
        return int(probe.getsockname()[1])
