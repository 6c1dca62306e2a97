"""Settings of the retrieval service: the argument of ``serve.app:build``, so also ``args:`` of a Serve config."""

from typing import Literal

from pydantic import Field, field_validator, model_validator

from lookalike import storage
from lookalike.config import Config
from lookalike.serve.settings.load import Batching, Degrade, Deployments, Retries
from lookalike.serve.settings.security import Tls
from lookalike.serve.settings.watching import AccessLogSettings, ExperimentSettings, MonitorSettings


class RequestLimits(Config):
    """Bounds of a request; a request beyond them is INVALID_ARGUMENT."""

    max_k: int = Field(default=1000, ge=1, le=100_000)
    """Hits a query may ask for."""
    max_batch: int = Field(default=256, ge=1, le=65_536)
    """Queries or images in one request."""
    max_hits: int = Field(default=65_536, ge=1, le=1 << 31)
    """Hits that a request may ask for: its queries times k."""
    max_image_bytes: int = Field(default=10_000_000, ge=1)
    """Encoded size of one image in bytes."""
    max_pixels: int = Field(default=50_000_000, ge=1)
    """Width x height of one image, checked before it is decoded."""
    max_scans: int = Field(default=64, ge=1, le=65_536)
    """Scans of one JPEG, counted before it is decoded; progressive ones have about ten. Scans x pixels may be 16 times
    ``max_pixels``."""
    max_decode_s: float = Field(default=5.0, gt=0.0, le=600.0)
    """Processor time for decoding one image, in seconds."""
    max_shortlist_k: int = Field(default=10_000, ge=1)
    """Candidates in each shard's shortlist."""
    max_filter_values: int = Field(default=1000, ge=1, le=1_000_000)
    """Values in all filters of a request together."""
    max_filter_bytes: int = Field(default=1 << 20, ge=1, le=(1 << 31) - 1)
    """Characters of these values together, in bytes of UTF-8."""
    max_request_bytes: int = Field(default=64 << 20, ge=1024, le=(1 << 31) - 1)
    """Encoded size of one request in bytes; a batch of a stream may have a quarter of it, or the size of a search."""
    max_id_bytes: int = Field(default=512, ge=1, le=65_536)
    """Length of an id in bytes of UTF-8; none is empty."""
    max_metadata_bytes: int = Field(default=16_384, ge=0, le=16 << 20)
    """Column names and values of a written row together, in bytes of UTF-8."""


class EncoderReplicas(Config):
    """The image encoder's own deployment."""

    num_replicas: int = Field(default=1, ge=1)
    """Copies of the encoder."""
    num_threads: int = Field(default=1, ge=1)
    """Torch threads per replica."""
    num_gpus: float = Field(default=0.0, ge=0.0)
    """GPUs a replica reserves; 0 computes on CPU."""
    max_batch: int = Field(default=16, ge=1)
    """Images of concurrent requests encoded in one forward pass."""
    batch_wait_ms: float = Field(default=2.0, ge=0.0)
    """Longest time that the first image of a batch waits for others, in milliseconds."""
    num_decoders: int = Field(default=2, ge=1, le=256)
    """Processes that decode images for a replica, one image each at a time."""


class Writes(Config):
    """Writes and index changes while the service runs."""

    state: str | None = None
    """Folder of this service alone for its writes, the name of the served index, and the indexes that compaction
    builds. It must be on a disk that syncs and locks files, shared if replicas run on several machines. None: searches
    only."""
    roots: tuple[str, ...] = ()
    """Folders and URI prefixes below which ``switch`` may name artifacts and ``backup`` may write, besides the folder
    ``state`` and, for artifacts, the roots of the configured index, plan and encoder."""
    compact_rows: int | None = Field(default=20_000, ge=1)
    """Compact once this many written and deleted rows wait; None leaves compaction to the operator."""
    keep_hours: float | None = Field(default=24.0, ge=0.0)
    """Age in hours from which the next compaction removes the files of an earlier one, if no index that is served, or
    may be rolled back to, needs them. None removes nothing."""
    max_pending_rows: int = Field(default=200_000, ge=1)
    """Written and deleted rows that may wait for compaction; further writes are RESOURCE_EXHAUSTED."""

    @field_validator("roots")
    @classmethod
    def _not_everything(cls, roots: tuple[str, ...]) -> tuple[str, ...]:
        for root in roots:
            if not root.rpartition("://")[2].strip("/"):
                raise ValueError(f"writes.roots has {root!r}, which is everything; name a folder")
        return roots

    @field_validator("state")
    @classmethod
    def _on_a_disk(cls, state: str | None) -> str | None:
        if state is not None and (not state or not storage.is_local(state)):
            raise ValueError(f"writes.state is {state!r}; it must be a folder on a disk, so that writes can be synced")
        return state


class ServeConfig(Config):
    """All settings of a service."""

    index: str
    """URI of the ``index`` artifact."""
    plan: str | None = None
    """URI of a ``plan`` artifact made for this index; None searches exactly, at full dimension."""
    encoder: str = "auto"
    """URI of the ``encoder`` artifact; ``auto`` takes the index's ancestor, ``none`` serves vectors and ids only."""
    placement: Literal["fused", "sharded", "staged"] = "fused"
    """``fused``: all in the ingress replica, the fastest if its node can hold the whole index. ``sharded``: one
    deployment per shard, which re-ranks its own candidates. ``staged``: also a separate deployment that re-ranks. The
    answers are the same."""
    limits: RequestLimits = RequestLimits()
    timeout_s: float = Field(default=10.0, gt=0.0, le=3600.0)
    """Longest time a request may take in the service, in seconds; a request may ask for less."""
    loopback_only: bool = True
    """Refuse callers from other machines. Each request is checked, because Ray's gRPC listener always binds every
    interface. Set it to false in a cluster, and guard the port by network policy."""
    tenants: str | None = None
    """URI of the tenants file, YAML or JSON (``front/tenants.py``): every call then needs a token. None: no tokens."""
    tls: Tls = Tls()
    port: int = Field(default=9000, ge=0, le=65_535)
    """gRPC port of ``lookalike serve``; 0 takes a free one. In a Serve config ``grpc_options.port`` decides."""
    num_replicas: int = Field(default=1, ge=1)
    """Copies of the ingress."""
    shard_replicas: int = Field(default=1, ge=1)
    """Copies of each shard and of the re-ranker."""
    cpus_per_replica: float = Field(default=0.2, ge=0.0)
    """CPUs that each replica reserves from Ray."""
    max_ongoing_requests: int = Field(default=64, ge=1)
    """Requests a replica works on at a time."""
    max_queued_requests: int = Field(default=256, ge=-1)
    """Requests that may wait in an ingress replica, or before another deployment; further ones are RESOURCE_EXHAUSTED.
    -1: no bound."""
    degrade: Degrade | None = None
    """Cheaper plans under load; None never changes a plan."""
    stream_window: int = Field(default=8, ge=1, le=1024)
    """Batches of one stream that are worked on at a time."""
    caller_bytes_per_s: int = Field(default=32 << 20, ge=1 << 10, le=1 << 40)
    """Average bytes per second of one tenant's messages above 4 MiB, or of an address without tenants; the first comes
    at once. A message of 60 MB takes a process some tenths of a second from all others: raise it where cores abound."""
    max_streams: int = Field(default=64, ge=1, le=100_000)
    """Streams open in an ingress replica at a time; with tenants one may have half of them."""
    stream_idle_s: float = Field(default=60.0, gt=0.0, le=3600.0)
    """Seconds without a batch after which a stream is ended."""
    encoder_replicas: EncoderReplicas = EncoderReplicas()
    access_log: AccessLogSettings = AccessLogSettings()
    monitor: MonitorSettings = MonitorSettings()
    experiment: ExperimentSettings | None = None
    """Arms that share the traffic; None sends all of it to ``index`` with ``plan``."""
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
