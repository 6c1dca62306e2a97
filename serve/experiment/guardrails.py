"""Guardrails: an arm that provably breaks a limit gets no more traffic. Each replica judges its own answers."""

from collections.abc import Callable

from lookalike.serve.experiment.evidence import Evidence
from lookalike.serve.settings.watching import ExperimentSettings
from lookalike.telemetry import fields, get_logger

log = get_logger(__name__)
SERVICE_ERRORS = frozenset(
    ["UNKNOWN", "INTERNAL", "UNAVAILABLE", "DEADLINE_EXCEEDED", "DATA_LOSS", "UNIMPLEMENTED", "RESOURCE_EXHAUSTED"]
)
"""Status codes that are not the caller's fault."""
P99_SHARE = 0.01
FALSE_ALARM = 0.01
"""Highest probability that an arm which keeps a limit is ever closed for it in one replica, however long it runs."""


class Guard:
    """Closes arms in one replica; ``closed`` is called once for each with its name and the reason."""

    def __init__(self, settings: ExperimentSettings) -> None:
        self.settings = settings
        self.reasons: dict[str, str] = {}
        """Closed arm -> the limit that it broke."""
        self.closed: Callable[[str, str], None] = lambda arm, reason: None
        limits = settings.guardrails
        names = [arm.name for arm in settings.arms[1:]]  # control is never closed: there is nowhere else to go
        self._arms = frozenset(names)

        def watch(limit: float | None) -> dict[str, Evidence]:
            return {} if limit is None else {name: Evidence(limit) for name in names}

        self._failed = watch(limits.max_error_share)
        self._slow = watch(None if limits.max_p99_ms is None else P99_SHARE)
        self._lost = watch(None if limits.min_recall is None else 1 - limits.min_recall)

    def is_closed(self, arm: str) -> bool:
        """Whether ``arm`` gets no more traffic from this replica."""
        return arm in self.reasons

    def count(self, arm: str, code: str, duration_ms: float) -> None:
        """Count one request of ``arm``, answered or failed, and close the arm if that is proof against it."""
        limits = self.settings.guardrails
        if arm not in self._arms or self.is_closed(arm) or code == "CANCELLED":
            return
        if arm in self._failed and self._proves(self._failed[arm], float(code in SERVICE_ERRORS)):
            failed, num = self._failed[arm].stretch
            self._close(arm, f"{failed:.0f} of {num} requests failed, max_error_share is {limits.max_error_share:g}")
        elif limits.max_p99_ms is not None and self._proves(self._slow[arm], float(duration_ms > limits.max_p99_ms)):
            slow, num = self._slow[arm].stretch
            self._close(arm, f"{slow:.0f} of {num} requests took longer than max_p99_ms, {limits.max_p99_ms:g}")

    def measure(self, arm: str, recall: float) -> None:
        """Take the measured ``recall`` of one answer of ``arm``, and close the arm if that is proof against it."""
        if arm not in self._lost or self.is_closed(arm):
            return
        if self._proves(self._lost[arm], 1 - recall):
            lost, num = self._lost[arm].stretch
            limit = self.settings.guardrails.min_recall
            self._close(arm, f"recall is {1 - lost / num:.4f} over {num} queries, min_recall {limit:g}")

    def _proves(self, evidence: Evidence, value: float) -> bool:
        evidence.add(value)
        enough = evidence.num >= self.settings.guardrails.min_requests and evidence.stretch[1] > 0
        return enough and evidence.capital >= 1 / FALSE_ALARM

    def _close(self, arm: str, reason: str) -> None:
        self.reasons[arm] = reason
        log.warning("arm closed %s", fields(experiment=self.settings.name, arm=arm, reason=reason))
        self.closed(arm, reason)
