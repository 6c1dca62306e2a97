"""Plots as PNG bytes: the only module that imports matplotlib, and only when something is drawn."""

import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure


def create_figure(width: float, height: float) -> "Figure":
    """An empty figure of ``width`` x ``height`` inches that belongs to no window."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def label_decades(axis: "Axis") -> None:
    """Label 1, 2 and 5 of each decade of a log axis, as plain numbers."""
    from matplotlib.ticker import LogLocator

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter("{x:g}")


def to_png(figure: "Figure") -> bytes:
    """PNG bytes at 110 dots an inch; the same plot gives the same bytes on every machine with this matplotlib."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()
