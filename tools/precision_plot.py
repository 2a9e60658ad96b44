"""The plot of `andromeda bench precision`: the loss of every step in both precisions, and their difference."""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path
from typing import Any

from andromeda.utils.files import write_whole

RESULT = Path("benchmarks/results/gpu-precision.json")
PLOT = Path("docs/images/precision.png")
SMOOTH = 25
"""Steps over which the difference is averaged: that of a single step is mostly rounding noise."""
COLORS = ("#2166c0", "#c05a21")


def smoothed(values: list[float], width: int) -> list[float]:
    """Moving averages of `width` values."""
    return [sum(values[end - width : end]) / width for end in range(width, len(values) + 1)]


def plot(result: dict[str, Any]) -> bytes:
    """Both curves in one PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    (first, one), (second, other) = ((name, implementation["losses"]) for name, implementation in result["implementations"].items())
    figure = Figure(figsize=(8.0, 5.0), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    for name, losses, color in ((first, one, COLORS[0]), (second, other, COLORS[1])):
        above.plot(range(1, len(losses) + 1), losses, color=color, linewidth=1.0, label=name)
    above.set_ylabel("nats/byte")
    above.set_yscale("log")
    above.set_yticks([0.5, 1, 2, 5], ["0.5", "1", "2", "5"])
    above.yaxis.set_minor_formatter(NullFormatter())
    above.legend(frameon=False)
    difference = [b - a for a, b in zip(one, other, strict=True)]
    below.plot(range(SMOOTH, len(difference) + 1), smoothed(difference, SMOOTH), color="black", linewidth=1.0)
    below.axhline(0.0, color="gray", linewidth=0.6)
    below.set_ylabel(f"{second} - {first}")
    below.set_xlabel(f"step; below, moving average over {SMOOTH} steps")
    for axes in (above, below):
        axes.grid(linewidth=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    page = BytesIO()
    figure.savefig(page, format="png", dpi=160)
    return page.getvalue()


if __name__ == "__main__":
    write_whole(PLOT, plot(json.loads(RESULT.read_text())))
