"""Heat maps: a table of figures whose cells are also shaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from andromeda.study.page.markup import Html, el
from andromeda.study.page.numbers import percent


def heat(
    title: str,
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float | None]],
    *,
    corner: str = "",
    across: str = "",
    show: Callable[[float | None], str] = percent,
    full: float = 1.0,
    low: float = 0.0,
    note: str = "",
) -> Html:
    """A table with a row of `values` for each of `rows`, shaded from `low` (nothing) to `full`; negative figures in another colour."""
    head = el("tr", el("th", corner, scope="col"), [el("th", column, scope="col") for column in columns])
    body = [
        el("tr", el("th", name, scope="row"), [_cell(value, show, low, full, f"{name}, {columns[i]}") for i, value in enumerate(row)])
        for name, row in zip(rows, values, strict=True)
    ]
    return el(
        "figure",
        el("figcaption", el("b", title), el("span", across, class_="unit") if across else None),
        el("div", el("table", el("thead", head), el("tbody", body), class_="heat"), class_="scroll", tabindex="0"),
        el("p", note, class_="note") if note else None,
        class_="chart",
    )


def _cell(value: float | None, show: Callable[[float | None], str], low: float, full: float, where: str) -> Html:
    if value is None:
        return el("td", show(None), class_="none", data_tip=f"{where}: not measured")
    share = max(0.0, min(1.0, (abs(value) - low) / (full - low or 1.0)))
    side = "minus" if value < 0 else "plus"
    return el(
        "td", show(value), class_=side + (" strong" if share > 0.6 else ""), style=f"--s:{share:.3f}", data_tip=f"{where}: {show(value)}"
    )
