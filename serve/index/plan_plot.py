"""``plan.png``: recall over cost of every candidate that the planner measured."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from lookalike.plots import create_figure, label_decades, to_png
from lookalike.retrieval.choice import MeasuredPlan, RankBy, cost_of

TICKS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9995, 0.9999)
LOWEST = 0.5
"""Recall below which candidates are drawn at the lower edge."""


def plot(
    measured: Sequence[MeasuredPlan],
    front: Sequence[int],
    chosen: int,
    *,
    target: float,
    k: int,
    rank_by: RankBy,
    num_queries: int,
) -> bytes:
    """Return a PNG of missed recall over cost, both on log scales, which spread out the good plans.

    Colour: prefix of the shortlist. Circle: several stages; square: one stage; triangle: early exit; cross: breaks a
    limit. The line is the Pareto front, dots mark the target, the star marks the choice.
    """
    figure = create_figure(8, 5)
    axes = figure.subplots()
    finest = 0.5 / (num_queries * k)  # nothing missed is drawn as half a result missed
    costs = np.array([cost_of(candidate, rank_by) for candidate in measured])
    missed = np.clip([1 - candidate.recall for candidate in measured], finest, 1 - LOWEST)
    dims = sorted({candidate.plan.shortlist_dim for candidate in measured})
    for number, dim in enumerate(dims):
        for marker, size, places in _group(measured, dim):
            axes.plot(costs[places], missed[places], marker, ms=size, alpha=0.65, color=f"C{number % 10}")
        axes.plot([], [], "o", color=f"C{number % 10}", label=f"shortlist at {dim}-d")
    for marker, words in (("s", "one stage"), ("^", "early exit"), ("x", "breaks a limit")):
        if any(_marker(candidate)[0] == marker for candidate in measured):
            axes.plot([], [], marker, color="0.4", label=words)
    axes.plot(costs[front], missed[front], "-", color="0.4", lw=1, label="Pareto front", zorder=1)
    axes.axhline(max(finest, 1 - target), color="crimson", lw=1, ls=":", label=f"target {target:g}")
    axes.plot(costs[chosen], missed[chosen], "*", color="crimson", ms=15, mec="white", label="chosen", zorder=5)
    cost_label = f"cost of a query [us], {_CAPTIONS[rank_by]}"
    axes.set(xscale="log", yscale="log", xlabel=cost_label, ylabel=f"recall@{k} against exact")
    label_decades(axes.xaxis)
    axes.set_title(f"chosen: {measured[chosen].plan.describe()}", fontsize=9)
    _label_recall(axes, finest)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0)
    return to_png(figure)


_CAPTIONS = {"model": "by the model", "measured": "measured"}


def _marker(candidate: MeasuredPlan) -> tuple[str, float]:
    """Return (marker, its size)."""
    if candidate.breaks:
        return "x", 5
    if candidate.plan.margins:
        return "^", 6
    return ("s", 6) if candidate.plan.is_single_stage else ("o", 4)


def _group(measured: Sequence[MeasuredPlan], dim: int) -> list[tuple[str, float, list[int]]]:
    """Return (marker, its size, places) of the candidates of one prefix."""
    groups: dict[tuple[str, float], list[int]] = {}
    for place, candidate in enumerate(measured):
        if candidate.plan.shortlist_dim == dim:
            groups.setdefault(_marker(candidate), []).append(place)
    return [(marker, size, places) for (marker, size), places in groups.items()]


def _label_recall(axes: Any, finest: float) -> None:
    """Label an axis of missed recall with ticks in recall, the best on top."""
    low, high = axes.get_ylim()
    ticks = [recall for recall in TICKS if finest < 1 - recall <= high]
    axes.set_yticks([*(1 - recall for recall in ticks), finest], [*(f"{recall:g}" for recall in ticks), "all found"])
    axes.minorticks_off()
    axes.set_ylim(high, min(low, finest * 0.8))
    axes.grid(alpha=0.25)
