"""Plots: the same lines give the same PNG, and matplotlib is imported only when something is drawn."""

import io
import subprocess
import sys

from PIL import Image

from lookalike.plots import create_figure, label_decades, to_png


def draw() -> bytes:
    figure = create_figure(4, 3)
    axes = figure.subplots()
    axes.plot([10, 500], [1, 2])
    axes.set_xscale("log")
    label_decades(axes.xaxis)
    ticks = [label.get_text() for label in axes.get_xticklabels()]
    assert {"10", "20", "50", "100", "200", "500"} <= set(ticks)
    return to_png(figure)


def test_a_plot_is_the_same_png_each_time() -> None:
    content = draw()
    assert content == draw()
    with Image.open(io.BytesIO(content)) as image:
        assert (image.format, image.size) == ("PNG", (440, 330))


def test_matplotlib_is_imported_only_when_something_is_drawn() -> None:
    code = "import sys, lookalike.plots; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
