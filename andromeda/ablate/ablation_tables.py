"""Tables and plots of an ablation: effect, interval, p-value, cost and verdict of each variant."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from andromeda.utils.files import write_whole

HEAD = (
    "variant",
    "compared with",
    "{metric}",
    "effect",
    "95 % interval",
    "spread",
    "p",
    "p (Holm)",
    "time",
    "memory",
    "weights",
    "verdict",
)
UNITS = {"loss": "nats/token", "bits_per_byte": "bits/byte"}
DASH = "–"  # noqa: RUF001 - a dash that stands for nothing


def head(results: dict[str, Any]) -> list[str]:
    """Column titles."""
    return [title.format(metric=UNITS[results["metric"]]) for title in HEAD]


def cells(row: dict[str, Any]) -> list[str]:
    """Cells of one variant."""
    effect = row["effect"] or {}
    interval = DASH if effect.get("low") is None else f"{effect['low']:+.4f} to {effect['high']:+.4f}"
    return [
        row["name"],
        row["compared_with"],
        mean(row),
        _signed(effect.get("mean")),
        interval,
        DASH if effect.get("spread") is None else f"{effect['spread']:.4f}",
        probability(effect.get("p")),
        probability(row["corrected_p"]),
        ratio(row["time_ratio"]),
        ratio(row["memory_ratio"]),
        ratio(row["size_ratio"]),
        row["verdict"] or DASH,
    ]


def mean(row: dict[str, Any]) -> str:
    """Mean final metric and number of runs."""
    if row["mean"] is None:
        return "not trained" if not row["train"] else DASH
    return f"{row['mean']:.4f} ({sum(run['loss'] is not None for run in row['runs'].values())})"


def probability(p: float | None) -> str:
    """A p-value with the digits that are meaningful."""
    if p is None:
        return DASH
    return "< 0.0001" if p < 1e-4 else f"{p:.4f}" if p < 0.1 else f"{p:.2f}"


def ratio(value: float | None) -> str:
    """A cost relative to that of what the variant is compared with."""
    return DASH if value is None else f"{100 * (value - 1):+.0f} %".replace("-0 %", "+0 %")


def lines(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A markdown table."""
    return [f"| {' | '.join(head)} |", f"|{'|'.join('---' for _ in head)}|", *(f"| {' | '.join(row)} |" for row in rows)]


def markdown(results: dict[str, Any]) -> str:
    """table.md."""
    base = results["variants"][0]
    gpu, cpu = results["machine"]["gpu"], results["machine"]["cpu"]
    text = [
        f"# {' '.join(results['configuration'])}",
        "",
        f"Equal {results['budget']}{evenness(results)}, seeds {', '.join(map(str, results['seeds']))}, on {gpu or cpu}. "
        f"The baseline has {base['parameters']:,} parameters and takes {base['steps']:,} steps.",
        legend(results),
        "",
        *lines(head(results), (cells(row) for row in results["variants"])),
        "",
        verdicts(results),
    ]
    return "\n".join(text) + "\n"


def evenness(results: dict[str, Any]) -> str:
    """How far budgets differ because steps are whole; empty if they do not."""
    base = results["variants"][0].get("spent")
    spent = [row["spent"] / row["budget_share"] for row in results["variants"] if row["train"] and row.get("spent")]
    if not base or not spent or (far := max(abs(each / base - 1) for each in spent)) < 5e-5:
        return ""
    return f" (to {100 * far:.2g} %, because steps are whole)"


def legend(results: dict[str, Any]) -> str:
    """What the columns and the verdicts mean."""
    claims = sum(row["corrected_p"] is not None for row in results["variants"])
    variance = (
        "each variant's own variance" if results["variance"] == "own" else "a variance shrunk towards that of all variants (moderated t)"
    )
    words = [
        "Effect is the variant minus what it is compared with, seed by seed: below zero is better.",
        "Spread is the standard deviation of these differences.",
        f"Intervals and p are from a paired t-test with {variance}.",
        f'"better" and "worse" hold at 5 % for all {claims} comparisons together (Holm); "perhaps" holds for that variant only.',
    ]
    measured = f" on {', '.join(results['cost'])}" if results.get("cost") else ""
    if any(row["time_ratio"] for row in results["variants"]):
        words.append(f"Time and memory are those of a training step{measured}, measured alone on the device.")
    return " ".join(words)


def verdicts(results: dict[str, Any]) -> str:
    """Variants grouped by verdict."""
    groups: dict[str, list[str]] = {}
    for row in results["variants"][1:]:
        if row["verdict"]:
            groups.setdefault(row["verdict"], []).append(row["name"])
    said = [f"{word[0].upper()}{word[1:]}: {'; '.join(names)}." for word, names in sorted(groups.items())]
    return " ".join(said) or "Nothing was trained."


def _signed(value: float | None) -> str:
    return DASH if value is None else f"{value:+.4f}"


COLORS = {"better": "#1a7f4b", "perhaps better": "#7cbf9a", "worse": "#b3261e", "perhaps worse": "#e09a94"}
OTHER = "#7a7a7a"


def draw(results: dict[str, Any], out: Path) -> None:
    """Write plot.png and plot.svg, if any variant has an effect."""
    rows = [row for row in results["variants"] if row["effect"]]
    if not rows:
        return
    for kind in ("png", "svg"):
        write_whole(out / f"plot.{kind}", picture(results, rows, kind))


def picture(results: dict[str, Any], rows: list[dict[str, Any]], kind: str) -> bytes:
    """A forest plot in one format: every variant's effect with its interval, the best on top, colored by verdict."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = sorted(rows, key=lambda row: -row["effect"]["mean"])
    figure = Figure(figsize=(8.0, 1.3 + 0.26 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    reach = _reach(rows)
    for height, row in enumerate(rows):
        _draw_effect(axes, height, row, reach)
    axes.axvline(0.0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [_title(row) for row in rows], fontsize=8)
    axes.set_ylim(-0.7, len(rows) - 0.3)
    axes.set_xlabel(f"{UNITS[results['metric']]} relative to what the variant is compared with; left is better")
    axes.set_title(f"equal {results['budget']}, {len(results['seeds'])} seeds, 95 % intervals", fontsize=9)
    axes.grid(axis="x", linewidth=0.3)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.set_xlim(-reach if any(row["effect"]["mean"] < 0 for row in rows) else -0.3 * reach, reach)
    page = BytesIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "andromeda"}):
        figure.savefig(page, format=kind, dpi=160, metadata={"Date": None} if kind == "svg" else {})
    return page.getvalue()


def _draw_effect(axes: Any, height: int, row: dict[str, Any], reach: float) -> None:
    """A point with its interval; one outside the frame is an arrow at the edge with its value."""
    effect, color = row["effect"], COLORS.get(row["verdict"], OTHER)
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
    return row["name"] if row["compared_with"] in ("", "baseline") else f"{row['name']} (compared with {row['compared_with']})"


def _reach(rows: list[dict[str, Any]]) -> float:
    """Half the frame's width, from the means: neither wide intervals nor one distant variant may squeeze all points together."""
    means = sorted(abs(row["effect"]["mean"]) for row in rows)
    return float(max(min(1.6 * means[-1], 6 * statistics.median(means)), 1e-3))
