"""``lookalike experiment``: what the access logs say of an experiment, in figures and in words."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from lookalike.serve.experiment.log import ExperimentLog, read_experiment_log
from lookalike.serve.experiment.stats import (
    MISMATCH,
    ArmFigures,
    Comparison,
    Duel,
    compare,
    describe_arms,
    duel,
    mismatch,
    sessions_of_several_arms,
)

WHY_FORCED = {
    "fits": "an arm could not have answered them",
    "guardrail": "an arm was closed",
    "failed": "one of the two arms failed",
}


def experiment(args: Sequence[str]) -> int:
    """Print what the access logs say of an experiment."""
    what = "Compare the arms of an experiment by the access logs of all replicas."
    parser = argparse.ArgumentParser(prog="lookalike experiment", description=what)
    parser.add_argument("folder", help="folder with access logs, also in folders below it")
    parser.add_argument("--experiment", metavar="NAME", help="which one, where there are several")
    parser.add_argument("--kind", help="count feedback of this kind alone, as in click (default: of every kind)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(args)
    report = analyse(read_experiment_log(options.folder, options.experiment, options.kind))
    print(json.dumps(report, indent=1) if options.json else render(report))
    return 0


def analyse(log: ExperimentLog) -> dict[str, Any]:
    """All figures, and ``means``: what they mean, a sentence each."""
    arms = describe_arms(log)
    comparisons = compare(arms, log.settings.control.name) if log.settings.mode == "split" else []
    fought = duel(log) if log.settings.mode == "interleave" else None
    closed = sorted(set(log.closed))
    # what a closed arm no longer gets, weights do not say
    chance = None if closed else mismatch(log, arms)
    means = [*_warnings(log, arms, chance)]
    if fought is not None:
        means.append(_say_duel(fought))
    elif not any(arm.answers_with_feedback for arm in arms):
        means.append("no feedback was recorded, so nothing can be said of the arms' answers")
    else:
        means += [_say_comparison(one, arms, log) for one in comparisons]
    return {
        "experiment": log.settings.name,
        "mode": log.settings.mode,
        "control": log.settings.control.name,
        "arms": [asdict(arm) for arm in arms],
        "comparisons": [asdict(one) for one in comparisons],
        "duel": None if fought is None else asdict(fought),
        "forced": dict(log.forced),
        "closed": [
            {"arm": arm, "reason": reason, "replicas": log.closed.count((arm, reason))} for arm, reason in closed
        ],
        "weights_p_value": chance,
        "unreadable_lines": log.unreadable,
        "means": means,
    }


def _warnings(log: ExperimentLog, arms: Sequence[ArmFigures], chance: float | None) -> list[str]:
    found = []
    if chance is not None and chance < MISMATCH:
        sizes = ", ".join(f"{arm.name} {arm.units}" for arm in arms)
        weights = ", ".join(f"{arm.name} {arm.weight:g}" for arm in log.settings.arms)
        found.append(
            f"do not trust the comparison: the arms' sizes ({sizes}) do not fit their weights ({weights}), "
            f"p={chance:.2g}; look for what loses or repeats the requests of one arm"
        )
    if log.settings.mode == "split" and (several := sessions_of_several_arms(log)):
        found.append(
            f"do not trust the comparison: {several} sessions saw several arms; a changed experiment needs a new name"
        )
    found += [
        f"arm {arm} was closed by its guardrail: {reason}; its figures end there"
        for arm, reason in sorted(set(log.closed))
    ]
    return found + [f"arm {arm.name} is beyond a guardrail: {reason}" for arm in arms for reason in arm.breaks]


def _say_comparison(one: Comparison, arms: Sequence[ArmFigures], log: ExperimentLog) -> str:
    by_name = {arm.name: arm for arm in arms}
    arm, base = by_name[one.arm], by_name[log.settings.control.name]
    units = _name_units(arms)
    rates = (
        f"feedback in {arm.units_with_feedback / arm.units:.2%} of {arm.units} {units}, "
        f"{base.units_with_feedback / base.units:.2%} of {base.units} with {base.name}: {one.apart * 100:+.2f} "
        f"points ({one.interval[0] * 100:+.2f} to {one.interval[1] * 100:+.2f}), p={one.p_value:.2g}"
    )
    if one.shown:
        return f"arm {one.arm} {'leads' if one.apart > 0 else 'trails'}: {rates}"
    return (
        f"no difference shown between {one.arm} and {base.name}: {rates}; as many {units} would show a difference "
        f"of {one.detectable * 100:.2f} points four times in five"
    )


def _say_duel(found: Duel) -> str:
    counts = (
        f"{found.arm} wins {found.wins}, loses {found.losses}, {found.ties} ties or without feedback, "
        f"p={found.p_value:.2g}"
    )
    if not found.shown:
        return f"no difference shown between {found.arm} and {found.control}: {counts}"
    return f"arm {found.arm if found.wins > found.losses else found.control} leads: {counts}"


def _name_units(arms: Sequence[ArmFigures]) -> str:
    sessions, units = sum(arm.sessions for arm in arms), sum(arm.units for arm in arms)
    return "sessions" if sessions == units else "requests" if sessions == 0 else "sessions and single requests"


def render(report: dict[str, Any]) -> str:
    """The report as text."""
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
        "- this holds for one look at the end of a length chosen beforehand; whoever looks daily and stops at a "
        "difference finds one too often",
    ]
    return "\n".join(lines)
