"""One picture of an extension: loss against context for the same targets, and loss by position, of every method and stage."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

from andromeda.extend.results import UNSTRETCHED

STYLES: dict[str, dict[str, Any]] = {"untrained": {"linestyle": ":", "alpha": 0.7}, "after": {"linestyle": "-"}}
CEILING = 1.6
"""A loss above this multiple of the best one is cut off: models that have broken down would flatten all others."""


def draw(values: dict[str, Any], stem: Path) -> list[Path]:
    """Write `stem`.png and `stem`.svg from what extension.json holds; returns their paths."""
    from matplotlib.figure import Figure

    panels = 3 if _retrievals(values) else 2
    figure = Figure(figsize=(5.2 * panels, 4.4), layout="constrained")
    axes = figure.subplots(1, panels)
    _context(axes[0], values)
    _position(axes[1], values)
    if panels == 3:
        _retrieval(axes[2], values)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), frameon=False)
    paths = [stem.with_suffix(ending) for ending in (".png", ".svg")]
    for path in paths:
        figure.savefig(path, dpi=150)
    return paths


def curves(values: dict[str, Any]) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Label, style and measurement of everything that was measured."""
    found: list[tuple[str, dict[str, Any], dict[str, Any]]] = []
    if values.get(UNSTRETCHED):
        found.append(("as it was", {"color": "black", "linestyle": "--"}, values[UNSTRETCHED]))
    for number, (method, stages) in enumerate(values["methods"].items()):
        for stage, style in STYLES.items():
            if stages.get(stage):
                label = f"{method}, {'untrained' if stage == 'untrained' else 'trained'}"
                found.append((label, {"color": f"C{number}", **style}, stages[stage]))
    return found


def _context(axes: Any, values: dict[str, Any]) -> None:
    for label, style, each in curves(values):
        axes.plot(each["context"]["context"], each["context"]["nats"], marker=".", label=label, **style)
    _dress(
        axes, values, "tokens of context", "loss of the same targets (nats)", [n for *_, e in curves(values) for n in e["context"]["nats"]]
    )
    _name_lengths(axes, {n for *_, e in curves(values) for n in e["context"]["context"]})


def _position(axes: Any, values: dict[str, Any]) -> None:
    for _, style, each in curves(values):
        edges = each["position"]["edges"]
        middles = [math.sqrt(max(low, 1) * high) for low, high in itertools.pairwise(edges)]
        axes.plot(middles, each["position"]["nats"], linewidth=1, **style)
    late = [n for *_, e in curves(values) for n, end in zip(e["position"]["nats"], e["position"]["edges"][1:], strict=True) if end > 64]
    _dress(axes, values, "position in the row", "loss at that position (nats)", late)
    furthest = max(e["position"]["edges"][-1] for *_, e in curves(values))
    _name_lengths(axes, {16 << i for i in range(0, 40, 2) if 16 << i < 0.3 * furthest} | {furthest})


def _retrieval(axes: Any, values: dict[str, Any]) -> None:
    for _, style, each in curves(values):
        if each.get("retrieval"):
            found = each["retrieval"]
            axes.plot(found["lengths"], [100 * sum(one) / len(one) for one in found["accuracy"]], marker=".", **style)
    axes.set(ylim=(-3, 103))
    _dress(axes, values, "tokens of context", "notes retrieved (%)", [])
    _name_lengths(axes, {n for *_, e in curves(values) if e.get("retrieval") for n in e["retrieval"]["lengths"]})


def _retrievals(values: dict[str, Any]) -> bool:
    return any(each.get("retrieval") for *_, each in curves(values))


def _dress(axes: Any, values: dict[str, Any], x: str, y: str, losses: list[float]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.25)
    axes.axvline(values["trained"], color="gray", linewidth=0.8)
    finite = [n for n in losses if n is not None and math.isfinite(n)]
    if finite and max(finite) > CEILING * min(finite):
        axes.set_ylim(0.96 * min(finite), CEILING * min(finite))


def _name_lengths(axes: Any, lengths: set[int]) -> None:
    axes.set_xticks(sorted(lengths), [_short(n) for n in sorted(lengths)])
    axes.minorticks_off()


def _short(tokens: int) -> str:
    return f"{tokens // 1024} Ki" if tokens % 1024 == 0 else f"{tokens:,}"
