"""Watches the service: every request goes on record here, in metrics, access log, recall monitor and experiment.

Nothing here makes a request wait, or fails one.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from ray.util.metrics import Counter, Gauge, Histogram

from lookalike.serve.experiment.assignment import Arm, Experiment
from lookalike.serve.front.overload import ShedError
from lookalike.serve.generations.generation import Generation
from lookalike.serve.proto import retrieval_pb2 as pb
from lookalike.serve.search.router import Router
from lookalike.serve.settings.config import ServeConfig
from lookalike.serve.watch.access_log import AccessLog, publish_experiment
from lookalike.serve.watch.recall_monitor import Estimate, Key, RecallMonitor
from lookalike.serve.watch.trace import Trace

SECONDS = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0]
NO_ARM = "default"
"""Label of requests outside every experiment."""


class Observer:
    """One replica's metrics, access log, recall monitor and experiment. It knows nothing of other replicas."""

    def __init__(self, config: ServeConfig, router: Router, arms: Sequence[Arm] = ()) -> None:
        self.in_flight = 0
        """Requests that have begun and not ended."""
        self._log = AccessLog(config.access_log) if config.access_log.folder else None
        self._dropped = 0
        self.experiment = None if config.experiment is None else Experiment(config.experiment, arms)
        self._make_metrics()
        self.monitor = RecallMonitor(
            config.monitor,
            router.for_background(),
            in_flight=lambda: self.in_flight,
            measured=self._recall_measured,
            changed=self._recall_changed,
            skipped=lambda reason: self._skipped.inc(1, {"reason": reason}),
        )
        if self.experiment is not None:
            self.experiment.guard.closed = self._arm_closed
            if config.access_log.folder:
                publish_experiment(config.access_log.folder, self.experiment.settings)

    def _make_metrics(self) -> None:
        arm = ("arm",)
        self._requests = Counter("lookalike_requests_total", "Requests by status.", ("method", "code", "tenant"))
        self._seconds = Histogram("lookalike_request_duration_seconds", "Time in the ingress.", SECONDS, ("method",))
        self._stages = Histogram("lookalike_stage_duration_seconds", "Time of a search's parts.", SECONDS, ("stage",))
        self._missing = Counter("lookalike_shards_missing_total", "Shards that partial answers went without.")
        self._shed = Counter("lookalike_shed_total", "Requests refused because the queue was full.", ("method",))
        self._degraded = Counter("lookalike_degraded_total", "Answers by a cheaper plan because of the load.")
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

    @contextmanager
    def watch(self, method: str, tenant: str = "") -> Iterator[Trace]:
        """The trace of one request, which the block answers; it goes on record when the block ends."""
        self.in_flight += 1
        trace = Trace(method=method, tenant=tenant)
        try:
            with trace:
                yield trace
        except ShedError:
            self._shed.inc(1, {"method": method})
            raise
        finally:
            self.in_flight -= 1
            self._record(trace)

    def _record(self, trace: Trace) -> None:
        self.count(trace.method, trace.code, trace.tenant)
        self._seconds.observe(trace.total_ms / 1000, {"method": trace.method})
        if self._log is not None:
            self._log.add(trace)
            if lost := self._log.dropped - self._dropped:
                self._lost.inc(lost)
                self._dropped += lost
        if trace.experiment:
            self._record_arms(trace)
        if trace.code == "OK" and trace.info is not None:
            self._record_search(trace, trace.info)

    def count(self, method: str, code: str, tenant: str) -> None:
        """Count a request; a stream that failed as a whole is counted by this alone."""
        self._requests.inc(1, {"method": method, "code": code, "tenant": tenant})

    def _record_arms(self, trace: Trace) -> None:
        assert self.experiment is not None
        self._arm_requests.inc(1, {"arm": trace.arm, "code": trace.code})
        for timing in trace.arms:
            self._arm_seconds.observe(timing.total_ms / 1000, {"arm": timing.arm})
            self.experiment.guard.count(timing.arm, timing.code, timing.total_ms)

    def _record_search(self, trace: Trace, info: pb.SearchInfo) -> None:
        for part in info.stage_times:
            self._stages.observe(part.duration_ms / 1000, {"stage": part.stage})
        if missing := info.coverage.shards_asked - info.coverage.shards_answered:
            self._missing.inc(missing)
        if info.degraded:
            self._degraded.inc(1)
        if self.monitor.settings.share:
            for search in trace.searches:
                self.monitor.offer(search)

    def estimate(self, generation: Generation) -> pb.RecallEstimate | None:
        """Recall of the default plan on ``generation``, measured on the searches that this replica answered."""
        control = self.experiment.arms[0] if self.experiment is not None else None
        arm = control.name if control is not None and control.plans is None else ""
        estimate = self.monitor.estimate(generation.name, arm)
        return None if estimate is None else pb.RecallEstimate(**vars(estimate))

    def close(self) -> None:
        """Write the lines that wait for the access log."""
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

    def _recall_measured(self, arm: str, recall: float) -> None:
        if self.experiment is not None:
            self.experiment.guard.measure(arm, recall)

    def _arm_closed(self, arm: str, reason: str) -> None:
        self._closed.set(1, {"arm": arm})
        if self._log is not None and self.experiment is not None:
            name = self.experiment.settings.name
            self._log.add({"method": "Guardrail", "experiment": name, "arm": arm, "reason": reason})
