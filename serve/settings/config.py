"""Settings of the retrieval service: the argument of the application builder, so also ``args:`` of a Serve config."""

from typing import Literal

from pydantic import Field, field_validator, model_validator

from lookalike import storage
from lookalike.config import Config
from lookalike.serve.settings.load import Batching, Degrade, Deployments, Retries
from lookalike.serve.settings.security import Tls
from lookalike.serve.settings.watching import AccessLogSettings, ExperimentSettings, MonitorSettings


class RequestLimits(Config):
    """Bounds of a request; beyond them it is INVALID_ARGUMENT."""

    max_k: int = Field(default=1000, ge=1, le=100_000)
    """Hits a query may ask for."""
    max_batch: int = Field(default=256, ge=1, le=65_536)
    """Queries or images in one request."""
    max_image_bytes: int = Field(default=10_000_000, ge=1)
    """Encoded size of one image in bytes."""
    max_pixels: int = Field(default=50_000_000, ge=1)
    """Width x height of one image, checked before it is decoded."""
    max_shortlist_k: int = Field(default=10_000, ge=1)
    """Candidates in each shard's shortlist."""
    max_filter_values: int = Field(default=1000, ge=1, le=1_000_000)
    """Values of all filters of a request together."""
    max_request_bytes: int = Field(default=64 << 20, ge=1024, le=(1 << 31) - 1)
    """Encoded size of one request, or of one batch of a stream, in bytes."""
    max_id_bytes: int = Field(default=512, ge=1, le=65_536)
    """Length of an id in bytes of UTF-8; none is empty."""
    max_metadata_bytes: int = Field(default=16_384, ge=0, le=16 << 20)
    """Names and values of a written row's columns together, in bytes of UTF-8."""


class EncoderReplicas(Config):
    """The image encoder's own deployment."""

    num_replicas: int = Field(default=1, ge=1)
    """Copies of the encoder."""
    num_threads: int = Field(default=1, ge=1)
    """Torch threads a replica computes with."""
    num_gpus: float = Field(default=0.0, ge=0.0)
    """GPUs a replica reserves; 0 computes on CPU."""
    max_batch: int = Field(default=16, ge=1)
    """Images of concurrent requests encoded in one forward pass."""
    batch_wait_ms: float = Field(default=2.0, ge=0.0)
    """How long the first image of a batch waits for others, in milliseconds."""


class Writes(Config):
    """Writes and changes of the index while it is served."""

    state: str | None = None
    """Folder for this service alone that keeps its writes, which index it serves, and the indexes that compaction
    builds: on a disk, shared where replicas run on several machines. Without one the service answers searches only."""
    compact_rows: int | None = Field(default=20_000, ge=1)
    """Written and deleted rows from which on an index that holds them is built; None leaves that to the operator."""
    keep_hours: float | None = Field(default=24.0, ge=0.0)
    """How long at least what a compaction made is kept once no index that is served, or may be rolled back to, needs
    it, counted in hours from when it was made; the next compaction removes it. None removes nothing."""
    max_pending_rows: int = Field(default=200_000, ge=1)
    """Written and deleted rows that may wait for compaction; beyond them writes are RESOURCE_EXHAUSTED."""

    @field_validator("state")
    @classmethod
    def _on_a_disk(cls, state: str | None) -> str | None:
        if state is not None and (not state or not storage.is_local(state)):
            raise ValueError(f"writes.state is {state!r}; it must be a folder on a disk, where a write can be synced")
        return state


class ServeConfig(Config):
    """Everything that ``lookalike.serve.app:build`` needs."""

    index: str
    """URI of the ``index`` artifact."""
    plan: str | None = None
    """URI of a ``plan`` artifact made for this index; without one, search is exact at full dimension."""
    encoder: str = "auto"
    """URI of the ``encoder`` artifact; ``auto`` takes the index's ancestor, ``none`` serves vectors and ids only."""
    placement: Literal["fused", "sharded", "staged"] = "fused"
    """``fused``: all in the ingress replica, the fastest where its node can hold the whole index. ``sharded``: a
    deployment a shard, which re-ranks its own candidates. ``staged``: the same with re-ranking in a deployment of its
    own. The answers are the same."""
    limits: RequestLimits = RequestLimits()
    timeout_s: float = Field(default=10.0, gt=0.0, le=3600.0)
    """Longest time a request may take in the service, in seconds; requests may ask for less."""
    loopback_only: bool = True
    """Refuse callers from other machines. Ray's gRPC listener always binds every interface, so this is checked per
    request; set it to false in a cluster, and guard the port by network policy."""
    tenants: str | None = None
    """URI of the YAML or JSON file of the tenants (``front/tenants.py``): every call then needs a token. None asks for
    none."""
    tls: Tls = Tls()
    port: int = Field(default=9000, ge=0, le=65_535)
    """gRPC port of ``lookalike serve``; 0 takes a free one. Under a Serve config ``grpc_options.port`` decides."""
    num_replicas: int = Field(default=1, ge=1)
    """Copies of the ingress."""
    shard_replicas: int = Field(default=1, ge=1)
    """Copies of each shard and of the re-ranker."""
    cpus_per_replica: float = Field(default=0.2, ge=0.0)
    """CPUs that each replica reserves from Ray."""
    max_ongoing_requests: int = Field(default=64, ge=1)
    """Requests a replica works on at a time."""
    max_queued_requests: int = Field(default=256, ge=-1)
    """Requests that wait in an ingress replica, or at a caller for another deployment, before RESOURCE_EXHAUSTED; -1 is
    no bound."""
    degrade: Degrade | None = None
    """Cheaper plans under load; None keeps every request's plan."""
    stream_window: int = Field(default=8, ge=1, le=1024)
    """Batches of one stream that are worked on at a time."""
    encoder_replicas: EncoderReplicas = EncoderReplicas()
    access_log: AccessLogSettings = AccessLogSettings()
    monitor: MonitorSettings = MonitorSettings()
    experiment: ExperimentSettings | None = None
    """Arms that share the traffic; None sends all of it to ``index`` and ``plan``."""
    deployments: Deployments = Deployments()
    retries: Retries = Retries()
    batching: Batching = Batching()
    writes: Writes = Writes()

    @model_validator(mode="after")
    def _check_artifacts(self) -> "ServeConfig":
        for name in ("index", "plan", "encoder", "tenants"):
            if getattr(self, name) == "":
                raise ValueError(f"{name!r} is empty; give a URI")
        return self
