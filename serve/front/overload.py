"""Too many requests: a bounded queue in each ingress replica, refusal with a time to come back, and cheaper plans.

A request first waits for one of the replica's slots. If the queue is full it is refused, and told how long the queue
takes to drain at the recent rate. Before that, if the service may degrade, a request that brings no plan gets a cheaper
plan among the measured ones.
"""

import asyncio
import math
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

import grpc

from lookalike.retrieval.plan import Plan
from lookalike.serve.front.deadline import HEADER
from lookalike.serve.settings.config import ServeConfig
from lookalike.serve.settings.load import Degrade
from lookalike.serve.wire.errors import RetrievalError
from lookalike.serve.wire.requests import ServicePlans

ADMITTED = frozenset({"Search", "SearchBatch", "SearchStream", "Embed", "Upsert", "Delete"})
"""Methods that need a slot. The others (Describe, health, administration) are few and must work under load."""
SMOOTHING = 0.1
"""Weight of the newest request in the moving average of request time."""
FIRST_MEAN_S = 0.02
TENANT_SHARE, ACTIVE_S = 4, 10.0
"""One tenant may hold a slot in ``TENANT_SHARE``, if another one came in the last ``ACTIVE_S`` seconds."""
IMAGE_SHARE = 4
"""Slots of a replica, and places of its queue, for each one that requests with images have."""


class ShedError(RetrievalError):
    """A request refused because the queue is full."""


class Admission:
    """The slots of one replica and the queue before them, from which tenants are served in turn.

    While another tenant is active, one may hold ``TENANT_SHARE`` of the slots, so that the other's requests wait behind
    few of them.
    """

    def __init__(self, max_ongoing: int, max_queued: int, timeout_s: float) -> None:
        self.max_ongoing, self.max_queued, self._timeout_s = max_ongoing, max_queued, timeout_s
        self.ongoing, self.waiting = 0, 0
        self._mean_s = FIRST_MEAN_S
        self._held, self._seen = Counter[str](), dict[str, float]()
        self._queues: dict[str, deque[asyncio.Future[None]]] = {}
        """Tenant -> its waiting requests; the tenant whose turn it is comes first."""

    @property
    def share(self) -> float:
        """Active and queued requests per slot; above 1 some wait."""
        return (self.ongoing + self.waiting) / self.max_ongoing

    @property
    def retry_after_ms(self) -> int:
        """Time to drain the queue at the recent rate, in ms."""
        return math.ceil(1000 * self._mean_s * (self.waiting + 1) / self.max_ongoing)

    @asynccontextmanager
    async def slot(self, timeout_ms: int = 0, *, patient: bool = False, tenant: str = "") -> AsyncIterator[None]:
        """Hold a slot while the block runs.

        Raises ``ShedError`` if the queue is full, unless ``patient``, and DEADLINE_EXCEEDED if no slot comes free in
        the time that the request (``timeout_ms``; 0: any time) and the service allow.
        """
        self._seen[tenant] = time.monotonic()
        if tenant not in self._queues and self._is_free(tenant):
            self._begin(tenant)
        else:
            if not patient and 0 <= self.max_queued <= self.waiting:
                raise ShedError(
                    grpc.StatusCode.RESOURCE_EXHAUSTED,
                    f"{self.ongoing} requests are worked on and {self.waiting} wait; "
                    f"retry after {self.retry_after_ms} ms",
                )
            await self._wait(tenant, min(timeout_ms / 1000 or self._timeout_s, self._timeout_s))
        start = time.perf_counter()
        try:
            yield
        finally:
            self._end(tenant)
            self._mean_s += SMOOTHING * (time.perf_counter() - start - self._mean_s)

    def _is_free(self, tenant: str) -> bool:
        """Whether a request of ``tenant`` may begin."""
        if self.ongoing >= self.max_ongoing:
            return False
        if self._held[tenant] < max(1, self.max_ongoing // TENANT_SHARE):
            return True
        since = time.monotonic() - ACTIVE_S
        return all(seen < since for other, seen in self._seen.items() if other != tenant)

    def _begin(self, tenant: str) -> None:
        self.ongoing += 1
        self._held[tenant] += 1

    def _end(self, tenant: str) -> None:
        self.ongoing -= 1
        self._held[tenant] -= 1
        while (name := next(filter(self._is_free, self._queues), None)) is not None:
            queue = self._queues.pop(name)
            if not (turn := queue.popleft()).done():  # its caller may have left
                self._begin(name)
                turn.set_result(None)
            if queue:
                self._queues[name] = queue  # behind the other tenants

    async def _wait(self, tenant: str, timeout_s: float) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queues.setdefault(tenant, deque()).append(turn)
        self.waiting += 1
        try:
            async with asyncio.timeout(timeout_s):
                await turn
        except BaseException as error:
            if turn.done() and not turn.cancelled():  # the slot came at the same moment
                self._end(tenant)
            if not isinstance(error, TimeoutError):
                raise
            raise RetrievalError(
                grpc.StatusCode.DEADLINE_EXCEEDED,
                f"the request waited {timeout_s:g} s for its turn; slow down, or add replicas",
            ) from None
        finally:
            self.waiting -= 1


class ImageAdmission:
    """Slots for requests with images: a quarter of the replica's, beside the others, so that searches never wait here.

    A tenant may hold half of them and fill half of the queue; without tenants all callers count as one.
    """

    def __init__(self, config: ServeConfig) -> None:
        self._own, self._timeout_s, self._held = dict[str, Admission](), config.timeout_s, 0
        self._num = max(1, config.max_ongoing_requests // IMAGE_SHARE)
        self._queue = config.max_queued_requests // IMAGE_SHARE
        self._all = Admission(self._num, -1, config.timeout_s)

    @asynccontextmanager
    async def slot(self, tenant: str, timeout_ms: int = 0, *, patient: bool = False) -> AsyncIterator[None]:
        """Hold a slot of ``tenant`` while the block runs; raises as ``Admission.slot`` does."""
        own = self._own.setdefault(tenant, self._admission_of(tenant))
        if not patient and 0 <= self._queue <= self._held - self._num:
            raise ShedError(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"{self._held} requests with images are worked on or wait; retry after {own.retry_after_ms} ms",
            )
        self._held += 1
        try:
            async with own.slot(timeout_ms, patient=patient), self._all.slot(timeout_ms, patient=True):
                yield
        finally:
            self._held -= 1

    def _admission_of(self, tenant: str) -> Admission:
        if not tenant:
            return Admission(self._num, self._queue, self._timeout_s)
        return Admission(max(1, self._num // 2), self._queue // 2, self._timeout_s)


class Ladder:
    """Chooses the plan for the load: a cheaper one as soon as it rises, a better one once it has clearly fallen."""

    def __init__(self, settings: Degrade) -> None:
        self._settings, self._felt = settings, 0.0
        """The load that counts: it rises with the load, and stays up to ``enter - leave`` above it when that falls."""

    def choose(self, plans: ServicePlans, share: float) -> Plan | None:
        """A cheaper plan than the default at the load ``share``; None if the default is to be taken."""
        settings = self._settings
        self._felt = min(max(self._felt, share), share + settings.enter - settings.leave)
        steps = find_rungs(plans, settings.min_recall)
        if self._felt < settings.enter or not steps:
            return None
        depth = (self._felt - settings.enter) / max(1e-9, 1 - settings.enter)
        return steps[min(int(depth * len(steps)), len(steps) - 1)]


def find_rungs(plans: ServicePlans, min_recall: float) -> list[Plan]:
    """Plans known to reach ``min_recall`` that cost less than the default plan.

    Most expensive first, without plans that a cheaper one matches. Empty if the default plan was not measured.
    """
    places = [place for place, (_, plan) in enumerate(plans.measured) if plan == plans.default]
    best, rungs = -math.inf, list[Plan]()
    for recall, plan in plans.measured[: places[0]] if places else ():
        if recall >= min_recall and recall > best:
            best = recall
            rungs.append(plan)
    return rungs[::-1]


def allowed_ms(request: Any) -> int:
    """``timeout_ms`` of a request that has search options, 0 for others."""
    return int(request.options.timeout_ms) if "options" in request.DESCRIPTOR.fields_by_name else 0


def read_time_left(metadata: Iterable[tuple[str, str | bytes]]) -> float:
    """Seconds until the caller's deadline; infinite without one."""
    given = [str(value) for key, value in metadata if key == HEADER]
    numbers = [int(text) for text in given if text.isascii() and text.isdigit() and len(text) < 12]
    return min(numbers, default=math.inf) / 1000
