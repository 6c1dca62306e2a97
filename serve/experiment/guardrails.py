"""Guardrails: an arm that provably breaks a limit gets no more traffic. Each replica judges its own answers."""

from collections import deque
from collections.abc import Callable

from lookalike.intervals import Z, wilson
from lookalike.serve.settings.watching import ExperimentSettings
from lookalike.serve.watch.recall_monitor import Estimate
from lookalike.telemetry import fields, get_logger

log = get_logger(__name__)
WINDOW = 1000
"""Number of an arm's latest requests that are judged (or ``min_requests``, if that is more)."""
SERVICE_ERRORS = frozenset(
    ["UNKNOWN", "INTERNAL", "UNAVAILABLE", "DEADLINE_EXCEEDED", "DATA_LOSS", "UNIMPLEMENTED", "RESOURCE_EXHAUSTED"]
)
"""Status codes that are not the caller's fault."""
P99_SHARE = 0.01
PROOF = 3.0
"""Standard errors beyond a limit that count as proof. An arm is judged after every request, so chance has many tries:
at 1.96 (a 95% interval) many arms that keep their limits would be closed in the long run."""


class Guard:
    """Closes arms in one replica; ``closed`` is called once for each with its name and the reason."""

    def __init__(self, settings: ExperimentSettings) -> None:
        self.settings = settings
        self.reasons: dict[str, str] = {}
        """Closed arm -> the limit that it broke."""
        self.closed: Callable[[str, str], None] = lambda arm, reason: None
        size = max(WINDOW, settings.guardrails.min_requests)
        names = [arm.name for arm in settings.arms[1:]]  # control is never closed: there is nowhere else to go
        self._failed: dict[str, deque[bool]] = {name: deque(maxlen=size) for name in names}
        self._slow: dict[str, deque[bool]] = {name: deque(maxlen=size) for name in names}

    def is_closed(self, arm: str) -> bool:
        """Whether ``arm`` gets no more traffic from this replica."""
        return arm in self.reasons

    def count(self, arm: str, code: str, duration_ms: float) -> None:
        """Count one request of ``arm``, answered or failed, and close the arm if that is proof against it."""
        limits = self.settings.guardrails
        if arm not in self._failed or self.is_closed(arm) or code == "CANCELLED":
            return
        failed, slow = self._failed[arm], self._slow[arm]
        failed.append(code in SERVICE_ERRORS)
        slow.append(limits.max_p99_ms is not None and duration_ms > limits.max_p99_ms)
        if len(failed) < limits.min_requests:
            return
        if limits.max_error_share is not None and wilson(sum(failed), len(failed), PROOF)[0] > limits.max_error_share:
            self._close(
                arm, f"{sum(failed)} of {len(failed)} requests failed, max_error_share is {limits.max_error_share:g}"
            )
        elif limits.max_p99_ms is not None and wilson(sum(slow), len(slow), PROOF)[0] > P99_SHARE:
            self._close(arm, f"{sum(slow)} of {len(slow)} requests took longer than max_p99_ms, {limits.max_p99_ms:g}")

    def recall(self, arm: str, estimate: Estimate) -> None:
        """Close ``arm`` if its latest recall estimate is proof against it."""
        limits = self.settings.guardrails
        if arm not in self._failed or self.is_closed(arm) or limits.min_recall is None:
            return
        highest = estimate.recall + PROOF / Z * (estimate.high - estimate.recall)
        if estimate.queries >= limits.min_requests and highest < limits.min_recall:
            recall = f"{estimate.recall:.4f} ({estimate.low:.4f} to {estimate.high:.4f})"
            self._close(arm, f"recall is {recall}, min_recall {limits.min_recall:g}")

    def _close(self, arm: str, reason: str) -> None:
        self.reasons[arm] = reason
        log.warning("arm closed %s", fields(experiment=self.settings.name, arm=arm, reason=reason))
        self.closed(arm, reason)
