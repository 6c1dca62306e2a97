"""Plots of evaluation results as PNG bytes."""

from typing import Any

from lookalike.plots import create_figure, to_png


def plot_by_dim(rows: list[dict[str, Any]], title: str) -> bytes:
    """P@1 and mAP@10 over the embedding size, a line for each embedding and method."""
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        lines.setdefault(f"{row['embedding']} ({row['method']})", []).append(row)
    figure = create_figure(11, 4)
    axes = figure.subplots(1, 2)
    for axis, metric, label in zip(axes, ("p_at_1", "map_at_10_by_k"), ("P@1", "mAP@10 (by k)"), strict=True):
        for name, points in lines.items():
            ordered = sorted(points, key=lambda row: row["dim"])
            axis.plot([p["dim"] for p in ordered], [p[metric] for p in ordered], marker="o", markersize=3, label=name)
        axis.set_xscale("log", base=2)
        axis.set_xlabel("dimensions")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    figure.suptitle(title)
    return to_png(figure)
