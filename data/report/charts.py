"""Charts of the label report and of the shards, as PNG bytes."""

from collections.abc import Mapping, Sequence
from typing import Any

from lookalike.plots import create_figure, to_png


def plot_zipf(series: Mapping[str, Sequence[float]]) -> bytes:
    """Images of a label against its rank, both on log scales; one sorted line per name."""
    figure, axes = _axes("Rank of the label", "Training images")
    for name, images in series.items():
        axes.loglog(range(1, len(images) + 1), sorted(images, reverse=True), marker=".", linewidth=1, label=name)
    if len(series) > 1:
        axes.legend(frameon=False)
    return to_png(figure)


def plot_concreteness(scores: Sequence[float], boundary: float) -> bytes:
    """Histogram of the scored terms' held-out accuracy, and the decision boundary (the paper's Figure 3)."""
    figure, axes = _axes("Held-out accuracy of the term's classifier", "Terms")
    axes.hist(scores, bins=40, range=(0.0, 1.0), color="#7a9cc6")
    axes.axvline(boundary, color="#b03030", linewidth=1.5, label=f"boundary {boundary:g}")
    axes.legend(frameon=False)
    return to_png(figure)


def plot_curve(curve: Sequence[Mapping[str, float]], criterion: str, boundary: float) -> bytes:
    """Terms kept and the criterion against the candidate boundaries (the paper's quantitative analysis)."""
    figure, axes = _axes("Boundary", criterion)
    at = [row["boundary"] for row in curve]
    axes.plot(at, [row["value"] for row in curve], marker=".", color="#3a6ea5")
    axes.axvline(boundary, color="#b03030", linewidth=1.5, label=f"chosen {boundary:g}")
    terms = axes.twinx()
    terms.plot(at, [row["terms"] for row in curve], linestyle=":", color="#888888")
    terms.set_ylabel("Terms kept (dotted)")
    terms.spines[["top"]].set_visible(False)
    axes.legend(frameon=False)
    return to_png(figure)


def plot_bars(counts: Mapping[str, int], x: str) -> bytes:
    """Horizontal bars, largest on top."""
    figure, axes = _axes(x, "", height=0.6 + 0.2 * len(counts))
    names = sorted(counts, key=lambda name: counts[name])
    axes.barh(names, [counts[name] for name in names], color="#7a9cc6")
    return to_png(figure)


def _axes(x: str, y: str, height: float = 3.2) -> tuple[Any, Any]:
    figure = create_figure(7, height)
    axes = figure.add_subplot(xlabel=x, ylabel=y)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes
