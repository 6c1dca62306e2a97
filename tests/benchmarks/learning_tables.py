"""What the learning benchmark makes of its rows: levels, margins paired by seed, interpolated dims, relations, tables.

A row is one measurement: ``seed``, ``variant`` (the encoder's step), ``role``, ``method``, ``dim``, ``nested`` (a loss
was trained at that dim) and the metrics. Margins are the subject's value minus the other's: above zero, it is better.
"""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

METRICS = ("p_at_1", "map_at_10_by_k")
Row = Mapping[str, Any]
Values = dict[str, dict[int, dict[int, float]]]
"""Name -> dim -> seed -> value of a metric."""
Spread = dict[str, float]
LEAST_TOLERANCE = 0.002
"""Of the relations: REFERENCE's 0.2 points, or the standard error of the metric where that is more."""
TIED_LOSS = 0.01
"""What weight tying may cost from ``TIED_FROM`` dims up (Kusupati et al. 2022: about a point)."""
TIED_FROM = 32


def name_of(row: Row) -> str | None:
    """The line of a table a row belongs to: the variant, for one that is not nested with its method.

    Fixed-feature networks (FF-k) make one line, each at its own k; elsewhere they were never trained: None.
    """
    if row["role"] == "fixed":
        return "fixed" if row["nested"] else None
    if row["role"] == "single" or row["method"] != "prefix":
        return f"{row['variant']} {'truncated' if row['method'] == 'prefix' else row['method']}"
    return str(row["variant"])


def spread(values: Sequence[float]) -> Spread:
    """Mean, extremes and their distance, to four decimals."""
    figures = {"mean": fmean(values), "min": min(values), "max": max(values), "spread": max(values) - min(values)}
    return {name: round(value, 4) for name, value in figures.items()}


def collect(rows: Sequence[Row], metric: str) -> Values:
    """The values of a metric by line, dim and seed."""
    found: Values = {}
    for row in rows:
        if (name := name_of(row)) is not None:
            found.setdefault(name, {}).setdefault(row["dim"], {})[row["seed"]] = row[metric]
    return found


def find_subject(rows: Sequence[Row]) -> str:
    """The variant whose role is ``nested``."""
    return next(str(row["variant"]) for row in rows if row["role"] == "nested")


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Spread:
    """Ours minus theirs over the seeds that both have."""
    return spread([ours[seed] - theirs[seed] for seed in ours if seed in theirs])


def margins(values: Values, subject: str) -> dict[str, dict[int, Spread]]:
    """Other line -> dim -> the subject's margin over it, at the dims both have."""
    ours = values[subject]
    found = {
        name: {dim: paired(ours[dim], at) for dim, at in sorted(dims.items()) if dim in ours}
        for name, dims in values.items()
        if name != subject
    }
    return {name: dims for name, dims in found.items() if dims}


def full_margins(values: Values, subject: str) -> dict[str, Any]:
    """Other line -> the subject's margin, each at its own full size; ``above_spread``: more than seeds make."""
    full = {name: dims[max(dims)] for name, dims in values.items() if name != "fixed"}
    noise = spread(list(full[subject].values()))["spread"]
    found = {name: paired(full[subject], at) for name, at in full.items() if name != subject}
    return {name: {**margin, "above_spread": margin["mean"] > noise} for name, margin in found.items()}


def tolerance(rows: Sequence[Row], subject: str) -> float:
    """What chance in the choice of queries may do to a figure of the subject: the mean standard error of P@1."""
    errors = [row["p_at_1_standard_error"] for row in rows if name_of(row) == subject]
    return round(max(LEAST_TOLERANCE, fmean(errors)), 4)


def interpolated(rows: Sequence[Row], metric: str, allowed: float) -> dict[int, dict[str, Any]]:
    """Dim of the subject without a loss -> how far it is outside its nested neighbours' values, over seeds."""
    subject = find_subject(rows)
    trained = {row["dim"] for row in rows if name_of(row) == subject and row["nested"]}
    values, found = collect(rows, metric)[subject], {}
    for dim in sorted(set(values) - trained):
        below = max((m for m in trained if m < dim), default=0)
        above = min((m for m in trained if m > dim), default=0)
        if not below or not above:
            continue
        outside = []
        for seed, value in values[dim].items():
            low, high = sorted((values[below][seed], values[above][seed]))
            outside.append(max(0.0, low - value, value - high))
        found[dim] = {"between": [below, above], "outside": spread(outside), "within": fmean(outside) <= allowed}
    return found


def relations(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Which of the relations of Kusupati et al. 2022 hold, of those the rows can tell, by P@1.

    ``above_truncated`` and ``above_svd``: at the smallest nested dim, in every seed. ``tied_level``: MRL-E loses no
    more than a point, and the tolerance, from 32 dims up. ``interpolated``: dims without a loss lie between their
    neighbours. MRL against FF is no relation here: on few data FF may win at the smallest dims.
    """
    subject, found = find_subject(rows), {}
    by_line, allowed = margins(collect(rows, "p_at_1"), subject), tolerance(rows, subject)
    smallest = min((row["dim"] for row in rows if name_of(row) == subject and row["nested"]), default=0)
    roles = {name: row["role"] for row in rows if (name := name_of(row)) is not None}
    for name, dims in by_line.items():
        for form in ("truncated", "svd"):
            if roles[name] == "single" and name.endswith(f" {form}") and smallest in dims:
                margin = dims[smallest]
                found[f"above_{form}"] = {"holds": margin["min"] > 0, "dim": smallest, **margin}
        large = {dim: margin["mean"] for dim, margin in dims.items() if dim >= TIED_FROM}
        if roles[name] == "tied" and large:
            worst = max(large, key=lambda dim: large[dim])
            found["tied_level"] = {"holds": large[worst] <= TIED_LOSS + allowed, "dim": worst, "mean": large[worst]}
    if between := interpolated(rows, "p_at_1", allowed):
        worst = max(between, key=lambda dim: between[dim]["outside"]["mean"])
        found["interpolated"] = {
            "holds": all(entry["within"] for entry in between.values()),
            "dim": worst,
            **between[worst]["outside"],
        }
    return found


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """The summary over seeds (see the module); dims are strings, as JSON has them."""
    subject = find_subject(rows)
    values = {metric: collect(rows, metric) for metric in METRICS}
    allowed = tolerance(rows, subject)
    levels = {
        metric: {
            name: {dim: spread(list(at.values())) for dim, at in sorted(dims.items())} for name, dims in of.items()
        }
        for metric, of in values.items()
    }
    summary: dict[str, Any] = {
        "seeds": sorted({row["seed"] for row in rows}),
        "subject": subject,
        "tolerance": allowed,
        "levels": levels,
        "subject_minus": {metric: margins(of, subject) for metric, of in values.items()},
        "subject_minus_at_full_size": full_margins(values["p_at_1"], subject),
        "interpolated": {metric: interpolated(rows, metric, allowed) for metric in METRICS},
        "relations": relations(rows),
    }
    result: dict[str, Any] = _text_keys(summary)
    return result


def _text_keys(value: Any) -> Any:
    return {str(k): _text_keys(v) for k, v in value.items()} if isinstance(value, dict) else value


def render_markdown(summary: Mapping[str, Any]) -> str:
    """Levels and margins of each metric as Markdown tables, in percent: mean over seeds (least to most)."""
    parts = []
    for metric in METRICS:
        parts += [
            _table(f"{metric}, percent", summary["levels"][metric], signed=False),
            _table(f"{metric}, {summary['subject']} minus ..., points", summary["subject_minus"][metric], signed=True),
        ]
    lines = [
        f"- {name}: {'holds' if entry['holds'] else 'DOES NOT HOLD'} (worst at {entry['dim']}-d: "
        f"{100 * entry['mean']:.1f})"
        for name, entry in summary["relations"].items()
    ]
    return "\n\n".join([*parts, "\n".join(lines)]) + "\n"


def _table(title: str, lines: Mapping[str, Mapping[str, Spread]], *, signed: bool) -> str:
    dims = sorted({int(dim) for line in lines.values() for dim in line})
    number = "{:+.1f}" if signed else "{:.1f}"

    def cell(at: Spread | None) -> str:
        if at is None:
            return ""
        mean, least, most = (number.format(100 * at[key]) for key in ("mean", "min", "max"))
        return f"{mean} ({least} to {most})" if at["spread"] else mean

    rows = [f"| {name} | {' | '.join(cell(line.get(str(dim))) for dim in dims)} |" for name, line in lines.items()]
    head = f"| | {' | '.join(map(str, dims))} |\n|---|{'--:|' * len(dims)}"
    return f"**{title}**\n\n{head}\n" + "\n".join(rows)
