"""Settings for faults and load."""

from pydantic import Field, model_validator

from lookalike.config import Config


class Retries(Config):
    """Repetition of calls between the service's processes when a process is gone or slow."""

    max_attempts: int = Field(default=4, ge=1, le=100)
    """Most attempts of a call, the first included; 1 never repeats. The request's deadline may end them sooner."""
    pause_ms: float = Field(default=20.0, ge=0.0, le=60_000.0)
    """Pause before the first repetition, in milliseconds; it doubles each time, less up to half of it by chance."""
    max_pause_ms: float = Field(default=500.0, ge=0.0, le=60_000.0)
    """Longest pause, in milliseconds."""
    hedge_ms: float | None = Field(default=1000.0, gt=0.0, le=3_600_000.0)
    """Time after which a search of a shard or a re-rank is sent to a second replica as well, in milliseconds, so that a
    replica that hangs fails no call. An encoding is given up and sent to another one, after ``max_decode_s`` more for
    each image. None never asks a second one."""
    hedge_share: float = Field(default=0.05, ge=0.0, le=1.0)
    """Largest share of calls that may be made twice: when all are slow, more calls would make them slower."""


class Degrade(Config):
    """Cheaper plans under load, for requests that bring neither a plan nor ``min_recall``; the reply says so.

    The load is the number of requests in an ingress replica per slot (``max_ongoing_requests``). Between ``enter`` and
    1 the measured plans that cost less than the default are taken one after the other.
    """

    min_recall: float = Field(default=0.9, gt=0.0, le=1.0)
    """Recall that a plan must be known to reach (the lower end of its interval)."""
    enter: float = Field(default=0.75, gt=0.0, le=1.0)
    """Load from which the first cheaper plan is taken."""
    leave: float = Field(default=0.5, ge=0.0, le=1.0)
    """Load below which all requests get the default plan again. Each cheaper plan is left as far below its own load."""

    @model_validator(mode="after")
    def _check_order(self) -> "Degrade":
        if self.leave >= self.enter:
            raise ValueError(f"leave={self.leave} is not below enter={self.enter}; lower it, or plans would alternate")
        return self


class Autoscaling(Config):
    """Replicas by load: Serve's own autoscaling by the number of requests, which also rises when they take longer."""

    min_replicas: int = Field(default=1, ge=1, le=10_000)
    """Fewest replicas."""
    max_replicas: int = Field(ge=1, le=10_000)
    """Most replicas; the cluster must have room for them."""
    target_ongoing_requests: float = Field(default=8.0, gt=0.0)
    """Active and queued requests per replica that Serve aims at."""
    upscale_delay_s: float = Field(default=10.0, ge=0.0, le=86_400.0)
    """Seconds for which more replicas must be needed before Serve starts them."""
    downscale_delay_s: float = Field(default=300.0, ge=0.0, le=86_400.0)
    """Seconds for which fewer replicas must suffice before Serve ends some."""
    look_back_s: float = Field(default=30.0, gt=0.0, le=3600.0)
    """Seconds over which Serve averages the number of requests; replicas report it every ten seconds."""

    @model_validator(mode="after")
    def _check_bounds(self) -> "Autoscaling":
        if self.max_replicas < self.min_replicas:
            raise ValueError(f"max_replicas={self.max_replicas} is below min_replicas={self.min_replicas}; raise it")
        return self


class ReplicaSettings(Config):
    """Replicas of one kind of deployment, and the resources of each."""

    autoscaling: Autoscaling | None = None
    """Replicas by load, starting at the number set for this deployment; None keeps that number."""
    num_cpus: float | None = Field(default=None, ge=0.0)
    """CPUs a replica reserves from Ray; None takes ``cpus_per_replica``."""
    memory_mb: int | None = Field(default=None, ge=1)
    """Memory a replica reserves from Ray, in MiB; None reserves none."""


class Deployments(Config):
    """Each kind of deployment; the writer is always one replica."""

    ingress: ReplicaSettings = ReplicaSettings()
    shards: ReplicaSettings = ReplicaSettings()
    """For the deployment of each shard, which is scaled by its own load."""
    rerank: ReplicaSettings = ReplicaSettings()
    encoder: ReplicaSettings = ReplicaSettings()
    """GPUs are set by ``encoder_replicas.num_gpus``."""


class Batching(Config):
    """Calls to the shards that concurrent single searches share."""

    enabled: bool = True
    """Whether searches share calls."""
    max_in_flight: int = Field(default=2, ge=1, le=10_000)
    """Calls of one ingress replica to one shard under way at a time; beyond them searches gather."""
    max_batch: int = Field(default=32, ge=1, le=65_536)
    """Most searches in one call."""
    max_wait_ms: float = Field(default=50.0, ge=0.0, le=60_000.0)
    """Longest time that searches gather while no call returns, in milliseconds; then they are sent anyway."""
