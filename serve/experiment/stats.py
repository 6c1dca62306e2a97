"""The figures of an experiment, with intervals and p-values.

The units are what chance assigned to arms: sessions, and requests without one. A split compares the share of units with
feedback (a session counts once, however many answers it had) by a two-proportion test, or Fisher's for small counts;
with several arms Holm's rule corrects the p-values. Interleaving counts, unit by unit, which arm's hits had more
feedback and compares wins with losses by a sign test.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import NormalDist

import numpy as np

from lookalike.intervals import Interval, Z, difference, wilson
from lookalike.serve.experiment.guardrails import SERVICE_ERRORS
from lookalike.serve.experiment.log import ExperimentLog, LoggedRequest

LEVEL = 0.05
"""Probability of finding a difference where there is none."""
MISMATCH = 0.001
"""With a smaller p-value the arms' sizes do not fit their weights."""
POWER = Z + NormalDist().inv_cdf(0.8)
"""Standard errors of a difference that is found four times in five."""


@dataclass(frozen=True)
class ArmFigures:
    """The figures of one arm; ``units`` are sessions, and requests without one."""

    name: str
    requests: int
    sessions: int
    errors: int
    degraded: int
    p50_ms: float
    p99_ms: float
    answers_with_feedback: int
    feedback_rate: float
    """Share of answers with feedback; without an interval, because answers of one session depend on each other."""
    units: int
    units_with_feedback: int
    unit_interval: Interval
    """Wilson interval of the share of units with feedback."""
    breaks: tuple[str, ...]
    """Guardrails that the figures break, in words."""


@dataclass(frozen=True)
class ArmComparison:
    """One arm of a split compared with control."""

    arm: str
    apart: float
    """Share of units with feedback minus that of control."""
    interval: Interval
    p_value: float
    """Corrected for the number of arms."""
    shown: bool
    """Whether the difference is significant."""
    detectable: float
    """Difference that this many units would show four times in five."""


@dataclass(frozen=True)
class Duel:
    """The two arms of an interleaving compared unit by unit."""

    arm: str
    control: str
    wins: int
    ties: int
    losses: int
    p_value: float
    shown: bool


def describe_arms(log: ExperimentLog) -> list[ArmFigures]:
    """Return the figures of each arm that answered; an interleaving has one entry for both."""
    acted = {request_id for request_id, _, _ in log.feedback}
    by_arm: dict[str, list[LoggedRequest]] = defaultdict(list)
    for request in log.requests:
        by_arm[request.arm].append(request)
    names = [arm.name for arm in log.settings.arms]
    order = [*names, *sorted(set(by_arm) - set(names))]
    return [_describe(name, by_arm[name], acted, log) for name in order if name in by_arm]


def _describe(name: str, requests: Sequence[LoggedRequest], acted: set[str], log: ExperimentLog) -> ArmFigures:
    errors = sum(request.code in SERVICE_ERRORS for request in requests)
    answers = [request for request in requests if request.code == "OK"]
    with_feedback = sum(request.request_id in acted for request in answers)
    p50, p99 = np.percentile([request.duration_ms for request in requests], [50, 99])
    limits = log.settings.guardrails
    breaks = []
    if limits.max_error_share is not None and errors / len(requests) > limits.max_error_share:
        breaks.append(
            f"{errors / len(requests):.2%} of the requests failed, max_error_share is {limits.max_error_share:.2%}"
        )
    if limits.max_p99_ms is not None and p99 > limits.max_p99_ms:
        breaks.append(f"99% took up to {p99:.1f} ms, max_p99_ms is {limits.max_p99_ms:g}")
    units = {request.unit for request in requests}
    units_with_feedback = len({request.unit for request in requests if request.request_id in acted})
    return ArmFigures(
        name,
        len(requests),
        len({request.session for request in requests} - {""}),
        errors,
        sum(request.degraded for request in requests),
        float(p50),
        float(p99),
        with_feedback,
        with_feedback / max(1, len(answers)),
        len(units),
        units_with_feedback,
        wilson(units_with_feedback, len(units)),
        () if name == log.settings.control.name else tuple(breaks),
    )


def sessions_of_several_arms(log: ExperimentLog) -> int:
    """Return the number of sessions that saw more than one arm, which a split does not allow."""
    pairs = {(request.session, request.arm) for request in log.requests if request.session}
    return sum(num_arms > 1 for num_arms in Counter(session for session, _ in pairs).values())


def compare(arms: Sequence[ArmFigures], control: str) -> list[ArmComparison]:
    """Compare every other arm with ``control``; return nothing if control has no units."""
    base = next((arm for arm in arms if arm.name == control), None)
    others = [arm for arm in arms if arm.name != control]
    if base is None:
        return []
    p_values = holm(
        [two_proportions(arm.units_with_feedback, arm.units, base.units_with_feedback, base.units) for arm in others]
    )
    return [_compare(arm, base, p_value) for arm, p_value in zip(others, p_values, strict=True)]


def _compare(arm: ArmFigures, base: ArmFigures, p_value: float) -> ArmComparison:
    hits, trials = arm.units_with_feedback, arm.units
    apart = hits / trials - base.units_with_feedback / base.units
    rate = (hits + base.units_with_feedback) / (trials + base.units)
    detectable = POWER * sqrt(rate * (1 - rate) * (1 / trials + 1 / base.units))
    interval = difference(hits, trials, base.units_with_feedback, base.units)
    return ArmComparison(arm.name, apart, interval, p_value, p_value < LEVEL, detectable)


def two_proportions(hits: int, trials: int, other_hits: int, other_trials: int) -> float:
    """Return the two-sided p-value of equal shares: pooled z test, or Fisher's if a count below 5 is expected."""
    from scipy.stats import fisher_exact, norm

    total, all_hits = trials + other_trials, hits + other_hits
    if all_hits in (0, total):
        return 1.0
    if min(trials, other_trials) * min(all_hits, total - all_hits) / total < 5:
        table = [[hits, trials - hits], [other_hits, other_trials - other_hits]]
        return float(fisher_exact(table).pvalue)
    rate = all_hits / total
    z = (hits / trials - other_hits / other_trials) / sqrt(rate * (1 - rate) * (1 / trials + 1 / other_trials))
    return float(2 * norm.sf(abs(z)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p-values corrected for their number (Holm 1979), in the same order."""
    corrected, largest = list(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda place: p_values[place])):
        largest = max(largest, min(1.0, p_values[place] * (len(p_values) - rank)))
        corrected[place] = largest
    return corrected


def duel(log: ExperimentLog) -> Duel:
    """Count, unit by unit, which arm's hits had more feedback; draws and units without feedback are ties."""
    from scipy.stats import binomtest

    control, arm = (settings.name for settings in log.settings.arms)
    requests = {request.request_id: request for request in log.requests}
    leads: Counter[str] = Counter({request.unit: 0 for request in log.requests})
    for request_id, hit, _ in log.feedback:
        request = requests.get(request_id)
        owner = request.owners.get(hit) if request is not None else None
        if request is not None and owner is not None:
            leads[request.unit] += 1 if owner == arm else -1
    wins, losses = sum(lead > 0 for lead in leads.values()), sum(lead < 0 for lead in leads.values())
    p_value = float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0
    return Duel(arm, control, wins, len(leads) - wins - losses, losses, p_value, p_value < LEVEL)


def mismatch(log: ExperimentLog, arms: Sequence[ArmFigures]) -> float | None:
    """Return the p-value of the arms' units given their weights (chi-square); None if weights decided nothing."""
    from scipy.stats import chisquare

    if log.settings.mode != "split":
        return None
    units = {arm.name: arm.units for arm in arms}
    counts = np.array([units.get(arm.name, 0) for arm in log.settings.arms])
    weights = np.array([arm.weight for arm in log.settings.arms])
    return float(chisquare(counts, counts.sum() * weights / weights.sum()).pvalue)
