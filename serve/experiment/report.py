"""``lookalike experiment``: report on an experiment from its access logs, in figures and in words."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from lookalike.flags import Parser
from lookalike.serve.experiment.log import ExperimentLog, read_experiment_log
from lookalike.serve.experiment.stats import (
    MISMATCH,
    ArmComparison,
    ArmFigures,
    Duel,
    compare,
    describe_arms,
    duel,
    mismatch,
    sessions_of_several_arms,
)
from lookalike.telemetry import printable_lines

WHY_FORCED = {
    "fits": "an arm could not have answered them",
    "guardrail": "an arm was closed",
    "failed": "one of the two arms failed",
}


def experiment(args: Sequence[str]) -> int:
    """Print a report on an experiment."""
    description = "Compare the arms of an experiment by the access logs of all replicas."
    parser = Parser(prog="lookalike experiment", description=description)
    parser.add_argument("folder", help="folder with access logs, also in folders below it")
    parser.add_argument("--experiment", metavar="NAME", help="its name, if the logs hold several")
    parser.add_argument("--kind", help="count only feedback of this kind, as in click (default: every kind)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(args)
    report = analyse(read_experiment_log(options.folder, options.experiment, options.kind))
    print(json.dumps(report, indent=1) if options.json else render(report))
    return 0


def analyse(log: ExperimentLog) -> dict[str, Any]:
    """Return all figures, and under ``means`` what they mean, in sentences."""
    arms = describe_arms(log)
    comparisons = compare(arms, log.settings.control.name) if log.settings.mode == "split" else []
    outcome = duel(log) if log.settings.mode == "interleave" else None
    closed = sorted(set(log.closed))
    # weights do not describe the traffic once an arm is closed
    weights_p_value = None if closed else mismatch(log, arms)
    means = _warnings(log, arms, weights_p_value)
    if outcome is not None:
        means.append(_say_duel(outcome))
    elif not any(arm.answers_with_feedback for arm in arms):
        means.append("no feedback was recorded, so the arms' answers cannot be compared")
    else:
        means += [_say_comparison(comparison, arms, log) for comparison in comparisons]
    return {
        "experiment": log.settings.name,
        "mode": log.settings.mode,
        "control": log.settings.control.name,
        "arms": [asdict(arm) for arm in arms],
        "comparisons": [asdict(comparison) for comparison in comparisons],
        "duel": None if outcome is None else asdict(outcome),
        "forced": dict(log.forced),
        "closed": [
            {"arm": arm, "reason": reason, "replicas": log.closed.count((arm, reason))} for arm, reason in closed
        ],
        "weights_p_value": weights_p_value,
        "unreadable_lines": log.unreadable,
        "means": means,
    }


def _warnings(log: ExperimentLog, arms: Sequence[ArmFigures], weights_p_value: float | None) -> list[str]:
    warnings = []
    if weights_p_value is not None and weights_p_value < MISMATCH:
        sizes = ", ".join(f"{arm.name} {arm.units}" for arm in arms)
        weights = ", ".join(f"{arm.name} {arm.weight:g}" for arm in log.settings.arms)
        warnings.append(
            f"do not trust the comparison: the arms' sizes ({sizes}) do not fit their weights ({weights}), "
            f"p={weights_p_value:.2g}; look for what loses or repeats the requests of one arm"
        )
    if log.settings.mode == "split" and (several := sessions_of_several_arms(log)):
        warnings.append(
            f"do not trust the comparison: {several} sessions saw several arms; a changed experiment needs a new name"
        )
    warnings += [
        f"arm {arm} was closed by its guardrail: {reason}; its figures end there"
        for arm, reason in sorted(set(log.closed))
    ]
    return warnings + [f"arm {arm.name} is beyond a guardrail: {reason}" for arm in arms for reason in arm.breaks]


def _say_comparison(comparison: ArmComparison, arms: Sequence[ArmFigures], log: ExperimentLog) -> str:
    by_name = {arm.name: arm for arm in arms}
    arm, base = by_name[comparison.arm], by_name[log.settings.control.name]
    units, (low, high) = _name_units(arms), comparison.interval
    rates = (
        f"feedback in {arm.units_with_feedback / arm.units:.2%} of {arm.units} {units}, "
        f"{base.units_with_feedback / base.units:.2%} of {base.units} with {base.name}: {comparison.apart * 100:+.2f} "
        f"points ({low * 100:+.2f} to {high * 100:+.2f}), p={comparison.p_value:.2g}"
    )
    if comparison.shown:
        return f"arm {arm.name} {'leads' if comparison.apart > 0 else 'trails'}: {rates}"
    return (
        f"no difference shown between {arm.name} and {base.name}: {rates}; as many {units} would show a difference "
        f"of {comparison.detectable * 100:.2f} points four times in five"
    )


def _say_duel(outcome: Duel) -> str:
    arm, control = outcome.arm, outcome.control
    counts = (
        f"{arm} wins {outcome.wins}, loses {outcome.losses}, {outcome.ties} ties or without feedback, "
        f"p={outcome.p_value:.2g}"
    )
    if not outcome.shown:
        return f"no difference shown between {arm} and {control}: {counts}"
    return f"arm {arm if outcome.wins > outcome.losses else control} leads: {counts}"


def _name_units(arms: Sequence[ArmFigures]) -> str:
    sessions, units = sum(arm.sessions for arm in arms), sum(arm.units for arm in arms)
    return "sessions" if sessions == units else "requests" if sessions == 0 else "sessions and single requests"


def render(report: dict[str, Any]) -> str:
    """Return the report as text."""
    lines = [
        f"experiment {report['experiment']}, {report['mode']}, control {report['control']}",
        f"{'arm':<12} {'requests':>9} {'sessions':>9} {'errors':>8} {'degraded':>8} {'p50 ms':>8} {'p99 ms':>8}  "
        "answers with feedback  units with feedback (95%)",
    ]
    for arm in report["arms"]:
        low, high = arm["unit_interval"]
        answers = f"{arm['answers_with_feedback']} = {arm['feedback_rate']:.2%}"
        lines.append(
            f"{arm['name']:<12} {arm['requests']:>9} {arm['sessions']:>9} "
            f"{arm['errors'] / arm['requests']:>8.2%} {arm['degraded'] / arm['requests']:>8.2%} "
            f"{arm['p50_ms']:>8.1f} {arm['p99_ms']:>8.1f}  {answers:<21}  "
            f"{arm['units_with_feedback']} of {arm['units']} = "
            f"{arm['units_with_feedback'] / arm['units']:.2%} ({low:.2%} to {high:.2%})"
        )
    lines += [
        f"left out: {count} requests, {WHY_FORCED.get(reason, reason)}" for reason, count in report["forced"].items()
    ]
    if report["unreadable_lines"]:
        lines.append(f"left out: {report['unreadable_lines']} lines that are cut off or damaged")
    lines.append("units are sessions, and requests without one")
    lines += [
        "",
        *(f"- {sentence}" for sentence in report["means"]),
        "- this holds for one look, at an end that was fixed beforehand; whoever looks daily and stops at the first "
        "difference finds differences too often",
    ]
    return printable_lines(lines)
