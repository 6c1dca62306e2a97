"""What watches the service: every request that ends passes here, to the access log, the recall monitor, the experiment
and their metrics. Nothing here makes a request wait, or fails one.
"""

from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import grpc
from ray.util.metrics import Counter, Gauge, Histogram

from lookalike.serve.experiment.assignment import Arm, Experiment
from lookalike.serve.generations.generation import Generation
from lookalike.serve.proto import retrieval_pb2 as pb
from lookalike.serve.search.router import Router
from lookalike.serve.settings.config import ServeConfig
from lookalike.serve.watch import trace
from lookalike.serve.watch.access_log import AccessLog, publish_experiment
from lookalike.serve.watch.recall_monitor import Estimate, Key, RecallMonitor
from lookalike.serve.wire.errors import RetrievalError
from lookalike.serve.wire.requests import check_feedback

Request = TypeVar("Request")
Response = TypeVar("Response")
SECONDS = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0]
NO_ARM = "default"
"""Label of what no experiment touches."""


class Observer:
    """One replica's access log, recall monitor and experiment. All is of this replica: it knows nothing of others."""

    def __init__(self, config: ServeConfig, router: Router, arms: Sequence[Arm] = ()) -> None:
        self.in_flight = 0
        """Requests that have begun and not ended."""
        self._log = AccessLog(config.access_log) if config.access_log.folder else None
        self._dropped = 0
        self.experiment = None if config.experiment is None else Experiment(config.experiment, arms)
        self._make_metrics()
        self.monitor = RecallMonitor(
            config.monitor,
            router.patient(),
            in_flight=lambda: self.in_flight,
            changed=self._recall_changed,
            skipped=self._recall_skipped,
        )
        if self.experiment is not None:
            self.experiment.guard.closed = self._arm_closed
            if config.access_log.folder:
                publish_experiment(config.access_log.folder, self.experiment.settings)

    def _make_metrics(self) -> None:
        arm = ("arm",)
        self._lost = Counter("lookalike_access_log_dropped_total", "Lines of the access log that were not written.")
        self._arm_requests = Counter("lookalike_arm_requests_total", "Requests of an experiment.", ("arm", "code"))
        self._arm_seconds = Histogram("lookalike_arm_duration_seconds", "Time an arm took.", SECONDS, arm)
        self._closed = Gauge("lookalike_arm_closed", "1 for an arm that broke its guardrail here.", arm)
        self._sampled = Counter("lookalike_recall_sampled_total", "Searches whose recall was measured.", arm)
        self._skipped = Counter("lookalike_recall_skipped_total", "Samples that were not measured.", ("reason",))
        labels = ("generation", "arm")
        self._recall = Gauge("lookalike_recall", "Recall of live answers.", labels)
        self._recall_low = Gauge("lookalike_recall_low", "Lower end of its 95% interval.", labels)
        self._recall_high = Gauge("lookalike_recall_high", "Upper end of its 95% interval.", labels)

    def begin(self, method: str) -> trace.Trace:
        """A request has come in; it must ``end``."""
        self.in_flight += 1
        return trace.begin(method)

    def end(self, seen: trace.Trace, code: grpc.StatusCode) -> None:
        """A request that ``begin`` began has been answered, or has failed."""
        self.in_flight -= 1
        trace.end(seen, code.name)
        self._write(seen)
        if seen.experiment:
            self._arm_requests.inc(1, {"arm": seen.arm, "code": seen.code})
        for arm, arm_code, duration_ms in seen.outcomes:
            self._arm_seconds.observe(duration_ms / 1000, {"arm": arm})
            if self.experiment is not None:
                self.experiment.guard.count(arm, arm_code, duration_ms)
        for searched in seen.searches if code is grpc.StatusCode.OK else ():
            self.monitor.offer(searched)

    def _write(self, seen: trace.Trace) -> None:
        if self._log is not None:
            self._log.add(seen)
            if lost := self._log.dropped - self._dropped:
                self._lost.inc(lost)
                self._dropped += lost

    async def watch(self, method: str, work: Callable[[Request], Awaitable[Response]], request: Request) -> Response:
        """``work(request)``, as one request from begin to end."""
        seen, code = self.begin(method), grpc.StatusCode.CANCELLED
        try:
            response = await work(request)
            code = grpc.StatusCode.OK
            return response
        except Exception as error:
            code = error.code if isinstance(error, RetrievalError) else grpc.StatusCode.INTERNAL
            raise
        finally:
            self.end(seen, code)

    async def feedback(self, request: pb.FeedbackRequest) -> pb.FeedbackResponse:
        """``Feedback``: it goes into the access log as the line of its own request."""
        check_feedback(request, has_log=self._log is not None)
        trace.current().feedback = request
        return pb.FeedbackResponse()

    def estimate(self, generation: Generation) -> pb.RecallEstimate | None:
        """Recall of the default plan on ``generation``, as this replica measured it on the searches it answered."""
        control = self.experiment.arms[0] if self.experiment is not None else None
        arm = control.name if control is not None and control.plans is None else ""
        found = self.monitor.estimate(generation.name, arm)
        return None if found is None else pb.RecallEstimate(**vars(found))

    def close(self) -> None:
        """Write what waits for the access log."""
        if self._log is not None:
            self._log.close()

    def _recall_changed(self, key: Key, estimate: Estimate | None) -> None:
        generation, arm = key
        labels = {"generation": generation, "arm": arm or NO_ARM}
        gone = float("nan")  # a gauge cannot be taken back
        self._recall.set(gone if estimate is None else estimate.recall, labels)
        self._recall_low.set(gone if estimate is None else estimate.low, labels)
        self._recall_high.set(gone if estimate is None else estimate.high, labels)
        if estimate is not None:
            self._sampled.inc(1, {"arm": labels["arm"]})
            if self.experiment is not None and arm:
                self.experiment.guard.recall(arm, estimate)

    def _recall_skipped(self, reason: str) -> None:
        self._skipped.inc(1, {"reason": reason})

    def _arm_closed(self, arm: str, reason: str) -> None:
        self._closed.set(1, {"arm": arm})
        if self._log is not None and self.experiment is not None:
            name = self.experiment.settings.name
            self._log.add({"method": "Guardrail", "experiment": name, "arm": arm, "reason": reason})
