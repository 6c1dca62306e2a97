"""Batches decoded by Ray actors anywhere in the cluster, for trainers whose own node has too few CPUs.

The trainer keeps a short queue of batches in step order and requests another when it takes one, so few are in flight.
Ray restarts an actor that dies, and its batches are built again, to the same bytes, because a batch is a function of
its plan. Pixels travel as uint8, a quarter of the size of float32.
"""

import time
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from lookalike.errors import LookalikeError
from lookalike.telemetry import fields, get_logger
from lookalike.train.feed.loader import Batch, BatchBuilder, BatchDataset, BatchPlan

log = get_logger(__name__)
AHEAD = 2  # batches in flight for each actor
PATIENCE_S = 60.0  # between warnings while a batch is late
LIMIT_S = 900.0  # nodes that scale up take minutes
RETRIES = 5  # of a batch whose actor dies


class DecodeActor:
    """Builds batches for one trainer."""

    def __init__(self, builder: BatchBuilder) -> None:
        torch.set_num_threads(1)
        self.builder = builder

    def build(self, plan: BatchPlan) -> dict[str, Any] | LookalikeError:
        """The batch of a plan with arrays in place of tensors: Ray passes arrays on without a copy."""
        batch = self.builder.attempt(plan)
        return batch if isinstance(batch, LookalikeError) else to_arrays(batch)


def to_arrays(batch: Batch) -> dict[str, Any]:
    """Tensors as arrays; images as [n, H, W, 3], their order in memory."""
    arrays = {name: value.numpy() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
    return {**arrays, "images": batch["images"].permute(0, 2, 3, 1).numpy()}


def to_tensors(arrays: dict[str, Any]) -> Batch:
    """The inverse of ``to_arrays``, in new memory: the store's is read-only, and can be freed after the copy."""
    batch = {
        name: torch.from_numpy(value.copy()) if isinstance(value, np.ndarray) else value
        for name, value in arrays.items()
    }
    return {**batch, "images": batch["images"].permute(0, 3, 1, 2)}


def actor_batches(
    dataset: BatchDataset,
    num_actors: int,
    *,
    num_cpus: float = 1.0,
    resource: str | None = None,
    limit_s: float = LIMIT_S,
) -> Iterator[Batch]:
    """The dataset's batches in step order, built by ``num_actors`` actors of ``num_cpus`` CPUs each.

    ``resource`` keeps the actors on nodes that offer a custom resource of this name. A batch that takes longer than
    ``limit_s`` seconds, because CPUs are missing, raises ``LookalikeError``.
    """
    import ray

    actor = ray.remote(DecodeActor).options(
        num_cpus=num_cpus,
        resources={resource: 0.001} if resource else None,
        max_restarts=-1,
        max_task_retries=RETRIES,
        scheduling_strategy="SPREAD",  # not in the training worker's own placement group
    )
    # passed by value: an object in the store could be lost before an actor restarts
    pool = _Pool([actor.remote(dataset.builder) for _ in range(num_actors)])
    who = f"{num_actors} loader.actors of {num_cpus:g} CPUs" + (f" and resource {resource!r}" if resource else "")
    plans, waiting = dataset.plans(), deque[tuple[BatchPlan, Any]]()
    try:
        while True:
            while len(waiting) < AHEAD * num_actors and (plan := next(plans, None)) is not None:
                waiting.append((plan, pool.submit(plan)))
            if not waiting:
                return
            yield pool.take(*waiting.popleft(), who, limit_s)
    finally:
        for started in pool.actors:
            ray.kill(started)


class _Pool:
    """Actors and their batches in flight; the least busy actor gets the next batch, so slow nodes get fewer."""

    def __init__(self, actors: list[Any]) -> None:
        self.actors = actors
        self._in_flight: dict[Any, int] = {}

    def submit(self, plan: BatchPlan) -> Any:
        import ray

        if self._in_flight:
            done, _ = ray.wait(list(self._in_flight), num_returns=len(self._in_flight), timeout=0, fetch_local=False)
            for reference in done:
                del self._in_flight[reference]
        busy = list(self._in_flight.values())
        number = min(range(len(self.actors)), key=busy.count)
        reference = self.actors[number].build.remote(plan)
        self._in_flight[reference] = number
        return reference

    def take(self, plan: BatchPlan, reference: Any, who: str, limit_s: float) -> Batch:
        import ray

        for _ in range(RETRIES + 1):
            self._await(plan, reference, who, limit_s)
            try:
                arrays = ray.get(reference)
            except (ray.exceptions.RayActorError, ray.exceptions.ObjectLostError) as error:
                log.warning("decode again %s", fields(step=plan.step, error=type(error).__name__))
                reference = self.submit(plan)
                continue
            self._in_flight.pop(reference, None)
            if isinstance(arrays, LookalikeError):
                raise arrays
            return to_tensors(arrays)
        raise LookalikeError(
            f"the batch of step {plan.step} killed its decode actor {RETRIES + 1} times; its node may lack memory"
        )

    def _await(self, plan: BatchPlan, reference: Any, who: str, limit_s: float) -> None:
        import ray

        began = time.monotonic()
        while not ray.wait([reference], timeout=min(PATIENCE_S, limit_s), fetch_local=True)[0]:
            seconds = time.monotonic() - began
            log.warning("waiting for %s", fields(batch_of_step=plan.step, seconds=seconds, who=who))
            if seconds >= limit_s:
                raise LookalikeError(
                    f"no batch from {who} within {limit_s:g} s; each training worker starts its own, "
                    "besides its workers.cpus: add nodes, or lower loader.actors"
                )
