"""Bars to the left and the right of zero, with their figures: what adds up to a sum."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from andromeda.study.page.markup import Html, el
from andromeda.study.page.numbers import figure


@dataclass(frozen=True)
class Bar:
    """One of them. colour: number of one of the page's colours; 0 takes that of its sign."""

    name: str
    value: float
    colour: int = 0
    tip: str = ""


def bars(
    title: str,
    rows: Sequence[Bar],
    *,
    unit: str = "",
    show: Callable[[float | None], str] = figure,
    full: float = 0.0,
    note: str = "",
) -> Html:
    """A figure with a bar a line. full: the figure that fills the width (0: the largest)."""
    low, high = min([0.0, *(r.value for r in rows)]), max([0.0, *(r.value for r in rows)])
    low, high = (-full if low < 0 else 0.0, full) if full else (low, high)
    width = (high - low) or 1.0
    zero = -low / width
    lines = [
        el(
            "tr",
            el("th", row.name, scope="row"),
            el("td", el("i", class_=_class(row), style=_place(row.value, zero, width)), class_="bar", style=f"--zero:{100 * zero:.2f}%"),
            el("td", show(row.value), class_="number"),
            data_tip=row.tip or None,
        )
        for row in rows
    ]
    return el(
        "figure",
        el("figcaption", el("b", title), el("span", unit, class_="unit") if unit else None),
        el("table", el("tbody", lines), class_="bars"),
        el("p", note, class_="note") if note else None,
        class_="chart",
    )


def _class(row: Bar) -> str:
    return f"c{row.colour}" if row.colour else "minus" if row.value < 0 else "plus"


def _place(value: float, zero: float, width: float) -> str:
    share = abs(value) / width
    left = zero - share if value < 0 else zero
    return f"left:{100 * left:.2f}%;width:{100 * share:.2f}%"
