"""The recall of live answers: some searches are made again exactly, in the background.

A sample repeats the query, k and filters of a request on the generation that answered, by its exact plan. One
measurement is the share of the exact hits that the answer had, by id; a hit that scores like the k-th exact hit counts,
because duplicates make that list arbitrary. A batch gives at most one query, so that measurements are independent. The
estimate for a generation and arm rests on a window of measurements.

Only a plan of the service on a whole index is measured. Answers that are degraded, come from some of the shards or
follow a plan of the request are left out and counted, as are samples beyond ``max_per_s`` or in a busy moment. A
replica measures the requests that it answered itself.
"""

import asyncio
import random
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lookalike.intervals import mean_interval
from lookalike.retrieval.planner import per_query_recall
from lookalike.retrieval.ranking import NO_ROW, NO_SCORE, Hits
from lookalike.serve.search.router import Router
from lookalike.serve.settings.watching import MonitorSettings
from lookalike.serve.watch.trace import SearchRecord
from lookalike.serve.wire.answers import Answer
from lookalike.serve.wire.ask import Ask
from lookalike.serve.wire.errors import RetrievalError
from lookalike.telemetry import fields, get_logger

log = get_logger(__name__)
MAX_WAITING = 16
"""Samples that wait for their exact search."""
MAX_WINDOWS = 32
"""Most windows kept, of a generation and arm each; the window with the oldest measurement goes first."""


@dataclass(frozen=True)
class Estimate:
    """Mean recall, its 95% interval and the queries it rests on."""

    recall: float
    low: float
    high: float
    queries: int


Key = tuple[str, str]
"""Generation and arm; the arm is empty outside an experiment."""


class RecallMonitor:
    """Measures the searches that ``offer`` gives it; ``in_flight`` returns the number of requests in the replica.

    ``measured`` is called with the arm and recall of each answer; ``changed`` with a window's new estimate, or None
    when the window is dropped; ``skipped`` with the reason why a sample was not measured.
    """

    def __init__(
        self,
        settings: MonitorSettings,
        router: Router,
        *,
        in_flight: Callable[[], int] = lambda: 0,
        measured: Callable[[str, float], None] = lambda arm, recall: None,
        changed: Callable[[Key, Estimate | None], None] = lambda key, estimate: None,
        skipped: Callable[[str], None] = lambda reason: None,
    ) -> None:
        self.settings = settings
        self.router, self._in_flight = router, in_flight
        self._measured, self._changed, self._skipped = measured, changed, skipped
        self.random = random.Random()
        self._windows: OrderedDict[Key, deque[float]] = OrderedDict()
        self._waiting: deque[tuple[SearchRecord, int]] = deque()
        self._worker: asyncio.Task[None] | None = None
        self._next = 0.0

    def offer(self, search: SearchRecord) -> None:
        """Take an answer into the sample by chance, and return at once. Called in the event loop of the searches."""
        if self.settings.share <= 0 or self.random.random() >= self.settings.share:
            return
        if reason := self._unfit(search) or self._inconvenient():
            self._skipped(reason)
            return
        self._next = time.monotonic() + 1 / self.settings.max_per_s
        self._waiting.append((search, self.random.randrange(len(search.vectors))))
        if self._worker is None or self._worker.done():
            self._worker = asyncio.ensure_future(self._measure_waiting())

    def estimate(self, generation: str, arm: str = "") -> Estimate | None:
        """The recall of a generation, or of one arm on it; None before the first measurement."""
        values = self._windows.get((generation, arm))
        if not values:
            return None
        low, high = mean_interval(np.array(values))
        return Estimate(float(np.mean(values)), low, high, len(values))

    async def drain(self) -> None:
        """Return when no sample waits."""
        if self._worker is not None:
            await self._worker

    def _unfit(self, search: SearchRecord) -> str:
        """Why an answer says nothing about the service's plan; empty if it does."""
        if search.own_plan:
            return "own_plan"
        if search.options.degraded:
            return "degraded"
        return "partial" if search.outcome.shards_answered < len(self.router.shards) else ""

    def _inconvenient(self) -> str:
        if self._in_flight() > self.settings.max_in_flight:
            return "busy"
        if time.monotonic() < self._next:
            return "rate"
        return "queue" if len(self._waiting) >= MAX_WAITING else ""

    async def _measure_waiting(self) -> None:
        while self._waiting:
            search, query = self._waiting.popleft()
            if self._in_flight() > self.settings.max_in_flight:
                self._skipped("busy")
                continue
            try:
                recall = await self._measure(search, query)
            except RetrievalError as error:  # shards lost or late, or the generation has gone
                self._skipped("failed")
                log.info("recall not measured %s", fields(error=str(error)[:200]))
            else:
                self._add((search.generation.name, search.arm), recall)

    async def _measure(self, search: SearchRecord, query: int) -> float:
        generation, options = search.generation, search.options
        deadline = asyncio.get_running_loop().time() + self.settings.timeout_s
        vector = search.vectors[query : query + 1]
        ask = Ask(generation.name, vector, options.k, generation.plans.exact, options.filters)
        exact = await self.router.search(ask, deadline=deadline, allow_partial=False)
        same_dim = options.plan.rerank_dim == generation.meta.dim
        return recall_of(search.outcome.answer, query, exact.answer, same_dim=same_dim)

    def _add(self, key: Key, recall: float) -> None:
        window = self._windows.setdefault(key, deque(maxlen=self.settings.window))
        self._windows.move_to_end(key)
        window.append(recall)
        self._changed(key, self.estimate(*key))
        self._measured(key[1], recall)
        if len(self._windows) > MAX_WINDOWS:
            oldest, _ = self._windows.popitem(last=False)
            self._changed(oldest, None)


def recall_of(given: Answer, query: int, exact: Answer, *, same_dim: bool) -> float:
    """Recall of the answer to ``query`` against ``exact``, the exact answer to that query alone, by ids.

    ``same_dim``: both are scored at full dimension, so scores tell which other hits are as good.
    """
    numbers: dict[str, int] = {}

    def by_id(answer: Answer, line: int) -> Hits:
        rows = [
            NO_ROW if row < 0 else numbers.setdefault(str(answer.entries[row][0]), len(numbers))
            for row in answer.hits.rows[line].tolist()
        ]
        return Hits(np.array([rows]), np.where(np.array(rows) < 0, NO_SCORE, answer.hits.scores[line])[None])

    return float(per_query_recall(by_id(given, query), by_id(exact, 0), same_dim=same_dim)[0])
