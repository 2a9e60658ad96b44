"""The picture of a comparison: every arm's effect with its interval, the best on top, colored by the verdict."""

from __future__ import annotations

import statistics
from io import BytesIO
from pathlib import Path
from typing import Any

from andromeda.ablate.table import UNITS
from andromeda.utils.files import write_whole

COLOURS = {"better": "#1a7f4b", "perhaps better": "#7cbf9a", "worse": "#b3261e", "perhaps worse": "#e09a94"}
OTHER = "#7a7a7a"


def draw(results: dict[str, Any], out: Path) -> None:
    """Write plot.png and plot.svg; nothing where no arm has an effect."""
    rows = [row for row in results["arms"] if row["effect"]]
    if not rows:
        return
    for kind in ("png", "svg"):
        write_whole(out / f"plot.{kind}", picture(results, rows, kind))


def picture(results: dict[str, Any], rows: list[dict[str, Any]], kind: str) -> bytes:
    """The picture in one format."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = sorted(rows, key=lambda row: -row["effect"]["mean"])
    figure = Figure(figsize=(8.0, 1.3 + 0.26 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    reach = _reach(rows)
    for height, row in enumerate(rows):
        _arm(axes, height, row, reach)
    axes.axvline(0.0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [_title(row) for row in rows], fontsize=8)
    axes.set_ylim(-0.7, len(rows) - 0.3)
    axes.set_xlabel(f"{UNITS[results['metric']]} against what the arm is compared with; left is better")
    axes.set_title(f"equal {results['budget']}, {len(results['seeds'])} seeds, 95 % intervals", fontsize=9)
    axes.grid(axis="x", linewidth=0.3)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.set_xlim(-reach if any(row["effect"]["mean"] < 0 for row in rows) else -0.3 * reach, reach)
    page = BytesIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "andromeda"}):
        figure.savefig(page, format=kind, dpi=160, metadata={"Date": None} if kind == "svg" else {})
    return page.getvalue()


def _arm(axes: Any, height: int, row: dict[str, Any], reach: float) -> None:
    """A point with its interval; one outside the frame is an arrow at its edge, with its figure."""
    effect, color = row["effect"], COLOURS.get(row["verdict"], OTHER)
    if abs(effect["mean"]) > reach:
        right = effect["mean"] > 0
        words = f"{effect['mean']:+.3f} →" if right else f"← {effect['mean']:+.3f}"
        place = {"x": 0.98 * reach if right else -0.98 * reach, "ha": "right" if right else "left"}
        axes.text(y=height, s=words, color=color, fontsize=8, va="center", **place)
        return
    if effect["low"] is not None:
        axes.plot([effect["low"], effect["high"]], [height, height], color=color, linewidth=2.2, alpha=0.6, solid_capstyle="butt")
    axes.plot(effect["mean"], height, "o", color=color, markersize=5)


def _title(row: dict[str, Any]) -> str:
    return row["name"] if row["on"] in ("", "baseline") else f"{row['name']} (on {row['on']})"


def _reach(rows: list[dict[str, Any]]) -> float:
    """Half the frame's width. It follows the means: neither wide intervals of few seeds nor one far arm may press all points together."""
    means = sorted(abs(row["effect"]["mean"]) for row in rows)
    return float(max(min(1.6 * means[-1], 6 * statistics.median(means)), 1e-3))
