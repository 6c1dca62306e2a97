"""How many replicas a deployment has: by the requests in it and, where a latency is asked for, by how long they take.

Serve calls the policy, keeps to the delays before it acts, and starts and ends replicas. A replica that starts catches
up with the writer before it takes requests; one that ends finishes those it has.
"""

import functools
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple, ParamSpec, TypeVar

from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy

from lookalike.serve.settings.load import Autoscaling, Deployed

P = ParamSpec("P")
R = TypeVar("R")
ROOM = 0.8
"""Share of the target that fewer replicas must keep to before there are fewer: else one would come and go."""
WELL_BELOW = 0.5
"""Share of the target below which the latency lets replicas go."""
FASTEST = 2.0
"""Growth by latency at a time: beyond a doubling it says little about how many are needed."""
WINDOW_S = 10.0
LATENCY = "latency_ms"


class Load(NamedTuple):
    """What a deployment has to do."""

    ongoing: float
    """Requests that are worked on or wait, in all replicas together."""
    latency_ms: float
    """Mean time of the calls of late in milliseconds; 0 where there were none."""
    replicas: int
    """Replicas there are meant to be at present."""


def count_replicas(
    load: Load, *, target_ongoing: float, target_latency_ms: float | None, lowest: int, highest: int
) -> int:
    """Replicas wanted for ``load``: more when either target is exceeded, fewer when both are well kept."""
    by_queue = _by_queue(load, target_ongoing)
    by_latency = 1 if target_latency_ms is None else _by_latency(load, target_latency_ms)
    return min(max(by_queue, by_latency, lowest), highest)


def _by_queue(load: Load, target: float) -> int:
    needed = math.ceil(load.ongoing / target)
    return needed if needed > load.replicas else min(load.replicas, math.ceil(load.ongoing / target / ROOM))


def _by_latency(load: Load, target_ms: float) -> int:
    ratio = load.latency_ms / target_ms
    if ratio > 1:
        return math.ceil(load.replicas * min(ratio, FASTEST))
    return load.replicas if ratio > WELL_BELOW else 1


class LoadPolicy:
    """``count_replicas`` as Serve's autoscaling policy."""

    def __init__(self, target_latency_ms: float | None = None) -> None:
        self._target_latency_ms = target_latency_ms

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """Replicas wanted; no state is kept."""
        assert context.config is not None, "Serve calls the policy of deployments that have a configuration"
        told = ((context.aggregated_metrics or {}).get(LATENCY) or {}).values()
        latencies = [latency for latency in told if latency > 0]  # a replica without calls says nothing
        mean_ms = sum(latencies) / len(latencies) if latencies else 0.0
        load = Load(context.total_num_requests, mean_ms, context.target_num_replicas)
        wanted = count_replicas(
            load,
            target_ongoing=context.config.target_ongoing_requests,
            target_latency_ms=self._target_latency_ms,
            lowest=context.capacity_adjusted_min_replicas,
            highest=context.capacity_adjusted_max_replicas,
        )
        return wanted, {}


def replica_options(settings: Deployed, num_replicas: int, num_cpus: float, num_gpus: float = 0.0) -> dict[str, Any]:
    """Deployment options: how many replicas, and what each reserves; ``settings`` go before the other arguments."""
    actor: dict[str, Any] = {"num_cpus": num_cpus if settings.num_cpus is None else settings.num_cpus}
    if num_gpus:
        actor["num_gpus"] = num_gpus
    if settings.memory_mb is not None:
        actor["memory"] = settings.memory_mb << 20
    if settings.autoscaling is None:
        return {"num_replicas": num_replicas, "ray_actor_options": actor}
    return {"autoscaling_config": to_serve(settings.autoscaling, num_replicas), "ray_actor_options": actor}


def to_serve(settings: Autoscaling, num_replicas: int) -> AutoscalingConfig:
    """Serve's form of ``settings``; ``num_replicas`` are there at first, within the bounds."""
    policy = AutoscalingPolicy(  # type: ignore[no-untyped-call]
        policy_function="lookalike.serve.search.autoscaling:LoadPolicy",
        policy_kwargs={"target_latency_ms": settings.target_latency_ms},
    )
    return AutoscalingConfig(
        min_replicas=settings.min_replicas,
        max_replicas=settings.max_replicas,
        initial_replicas=min(max(num_replicas, settings.min_replicas), settings.max_replicas),
        target_ongoing_requests=settings.target_ongoing_requests,
        upscale_delay_s=settings.upscale_delay_s,
        downscale_delay_s=settings.downscale_delay_s,
        look_back_period_s=settings.look_back_s,
        policy=policy,
    )


class Pace:
    """How long the calls of late took."""

    def __init__(self) -> None:
        self._calls: deque[tuple[float, float]] = deque(maxlen=1000)

    def add(self, seconds: float) -> None:
        """A call has taken so long."""
        self._calls.append((time.monotonic(), seconds))

    @property
    def mean_ms(self) -> float:
        """Mean of those that ended in the last ``WINDOW_S`` seconds; 0 without any."""
        since = time.monotonic() - WINDOW_S
        while self._calls and self._calls[0][0] < since:
            self._calls.popleft()
        return 1000 * sum(seconds for _, seconds in self._calls) / len(self._calls) if self._calls else 0.0


class Paced:
    """A replica that tells Serve's autoscaler how long its calls take."""

    @functools.cached_property
    def pace(self) -> Pace:
        """The calls of late."""
        return Pace()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What Serve collects."""
        return {LATENCY: self.pace.mean_ms}


def paced(method: Callable[P, Awaitable[R]]) -> Callable[P, Awaitable[R]]:
    """A method of a ``Paced`` class whose calls count."""

    @functools.wraps(method)
    async def call(*args: P.args, **kwargs: P.kwargs) -> R:
        start = time.monotonic()
        try:
            return await method(*args, **kwargs)
        finally:
            owner: Any = args[0]
            owner.pace.add(time.monotonic() - start)

    return call
