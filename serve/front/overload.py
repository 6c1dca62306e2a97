"""Too many requests: a bounded queue in each ingress replica, refusal with a time to come back, and cheaper plans.

A request first waits for one of the replica's slots. When the queue is full it is refused, with how long the queue
takes to empty at the pace of late. Before that, where the service may degrade, requests that leave the plan to the
service take a cheaper one of those that were measured.
"""

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import Any

import grpc

from lookalike.retrieval.plan import Plan
from lookalike.serve.settings.load import Degrade
from lookalike.serve.wire.errors import RetrievalError
from lookalike.serve.wire.requests import ServicePlans

ADMITTED = frozenset({"Search", "SearchBatch", "Embed", "Upsert", "Delete"})
"""Methods that need a slot. The others are few, and must work under load: what is served, health, administration."""
ARRIVED: ContextVar[float | None] = ContextVar("arrived", default=None)
"""When the request of this task arrived, by the loop's clock in seconds: the wait for a slot counts as its time."""
SMOOTHING = 0.1
"""Weight of the newest request in the mean time of late."""
FIRST_MEAN_S = 0.02


class ShedError(RetrievalError):
    """A request refused because the queue is full."""


class Admission:
    """The slots of one replica and the queue before them."""

    def __init__(self, max_ongoing: int, max_queued: int, timeout_s: float) -> None:
        self.max_ongoing, self.max_queued, self._timeout_s = max_ongoing, max_queued, timeout_s
        self.ongoing, self.waiting = 0, 0
        self._mean_s = FIRST_MEAN_S
        self._slots = asyncio.Semaphore(max_ongoing)

    @property
    def share(self) -> float:
        """Requests that are worked on or wait, per slot; above 1 some wait."""
        return (self.ongoing + self.waiting) / self.max_ongoing

    @property
    def retry_after_ms(self) -> int:
        """How long the queue as it is takes at the pace of late, in milliseconds."""
        return math.ceil(1000 * self._mean_s * (self.waiting + 1) / self.max_ongoing)

    @asynccontextmanager
    async def slot(self, timeout_ms: int = 0, *, patient: bool = False) -> AsyncIterator[None]:
        """A slot for as long as the block runs. Raises ``ShedError`` when too many wait already, unless ``patient``,
        and DEADLINE_EXCEEDED when none came free in the time that the request (``timeout_ms``, 0 says nothing) or the
        service allows."""
        if self._slots.locked() and not patient and 0 <= self.max_queued <= self.waiting:
            raise ShedError(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"{self.ongoing} requests are worked on and {self.waiting} wait; retry after {self.retry_after_ms} ms",
            )
        loop = asyncio.get_running_loop()
        arrived = ARRIVED.set(loop.time())
        try:
            await self._wait(min(timeout_ms / 1000 or self._timeout_s, self._timeout_s))
            start = loop.time()
            self.ongoing += 1
            try:
                yield
            finally:
                self.ongoing -= 1
                self._slots.release()
                self._mean_s += SMOOTHING * (loop.time() - start - self._mean_s)
        finally:
            ARRIVED.reset(arrived)

    async def _wait(self, timeout_s: float) -> None:
        if not self._slots.locked():
            await self._slots.acquire()
            return
        self.waiting += 1
        try:
            async with asyncio.timeout(timeout_s):
                await self._slots.acquire()
        except TimeoutError:
            raise RetrievalError(
                grpc.StatusCode.DEADLINE_EXCEEDED,
                f"the request waited {timeout_s:g} s for its turn; slow down, or add replicas",
            ) from None
        finally:
            self.waiting -= 1


class Ladder:
    """Which plan to take at which load: down at once when it rises, up only when it has clearly fallen."""

    def __init__(self, settings: Degrade) -> None:
        self._settings, self._felt = settings, 0.0
        """The load that counts: it follows rises, and falls only once they are ``enter - leave`` behind."""

    def choose(self, plans: ServicePlans, share: float) -> Plan | None:
        """A cheaper plan than the default one at the load ``share``; None where the default is to be taken."""
        settings = self._settings
        self._felt = min(max(self._felt, share), share + settings.enter - settings.leave)
        steps = find_rungs(plans, settings.min_recall)
        if self._felt < settings.enter or not steps:
            return None
        depth = (self._felt - settings.enter) / max(1e-9, 1 - settings.enter)
        return steps[min(int(depth * len(steps)), len(steps) - 1)]


def find_rungs(plans: ServicePlans, min_recall: float) -> list[Plan]:
    """Plans known to reach ``min_recall`` that cost less than the default one, dearest first; each but those that a
    cheaper one equals. None where the default plan was not measured beside others."""
    places = [place for place, (_, plan) in enumerate(plans.measured) if plan == plans.default]
    best, found = -math.inf, list[Plan]()
    for recall, plan in plans.measured[: places[0]] if places else ():
        if recall >= min_recall and recall > best:
            best = recall
            found.append(plan)
    return found[::-1]


def allowed_ms(request: Any) -> int:
    """``timeout_ms`` of a request that has search options, 0 for others."""
    return int(request.options.timeout_ms) if "options" in request.DESCRIPTOR.fields_by_name else 0
