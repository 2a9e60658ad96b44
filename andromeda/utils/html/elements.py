"""HTML that cannot be forgotten to be escaped: text is escaped unless it was made here."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from andromeda.utils.formatting import figure, percent

VOID = frozenset({"meta", "br", "hr", "img", "input", "rect", "line", "path", "circle", "use"})
"""Elements that are written without a closing tag."""


class Html(str):
    """Text that is markup already; any other text is escaped when it becomes a child or an attribute."""

    __slots__ = ()


Child = str | int | float | None | Iterable["Child"]
"""What may stand in an element; None is nothing."""


def el(name: str, /, *children: Child, **attributes: str | float | bool | None) -> Html:
    """An element. Attributes: `class_` is class, `data_x` is data-x; None and False leave one out, True writes its name alone."""
    head = name + "".join(_attribute(key, value) for key, value in attributes.items())
    if name in VOID and not children:
        return Html(f"<{head}/>")
    return Html(f"<{head}>{join(*children)}</{name}>")


def join(*children: Child) -> Html:
    """Children one after the other."""
    return Html("".join(_text(child) for child in children))


def _text(child: Child) -> str:
    if child is None:
        return ""
    if isinstance(child, Html):
        return child
    if isinstance(child, str):
        return html.escape(_printable(child))
    if isinstance(child, int | float):
        return str(child)
    return join(*child)


def _attribute(key: str, value: str | float | bool | None) -> str:
    if value is None or value is False:
        return ""
    key = key.rstrip("_").replace("_", "-")
    return f" {key}" if value is True else f' {key}="{html.escape(_printable(str(value)))}"'


def _printable(text: str) -> str:
    """Control characters as pictures: HTML allows none of them, and a model may write any byte."""
    return text.translate(_CONTROLS)


_CONTROLS = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"} | dict.fromkeys(range(127, 160), "\ufffd")
# Half a surrogate pair cannot be written as UTF-8.
_CONTROLS |= dict.fromkeys(range(0xD800, 0xE000), "\ufffd")


def table(head: Sequence[Child], rows: Sequence[Sequence[Child]], *, text: int = 1, caption: str = "") -> Html:
    """A table; the first `text` columns are text, the others figures, set to the right."""
    return el(
        "div",
        el(
            "table",
            el("caption", caption) if caption else None,
            el("thead", el("tr", [el("th", cell, scope="col", class_=None if i < text else "number") for i, cell in enumerate(head)])),
            el("tbody", [el("tr", [_cell(i, cell, text) for i, cell in enumerate(row)]) for row in rows]),
            class_="figures",
        ),
        class_="scroll",
        tabindex="0",
    )


def _cell(index: int, cell: Child, text: int) -> Html:
    return el("th", cell, scope="row") if index == 0 and text else el("td", cell, class_=None if index < text else "number")


def facts(pairs: Sequence[tuple[str, Child]]) -> Html:
    """Names with what they stand for."""
    return el("dl", [el("div", el("dt", name), el("dd", value)) for name, value in pairs if value not in (None, "")], class_="facts")


def tiles(pairs: Sequence[tuple[str, Child, Child]]) -> Html:
    """Key figures: name, figure, a word about it."""
    return el(
        "dl",
        [el("div", el("dt", name), el("dd", value, el("small", word) if word else None)) for name, value, word in pairs],
        class_="tiles",
    )


def grid(*figures: Child, kind: str = "") -> Html:
    """Figures side by side, as many as the page is wide for. kind: two (wider ones) or four (narrower ones)."""
    return el("div", figures, class_=f"grid {kind}".strip())


def details(title: str, *inner: Child) -> Html:
    """Folded away until asked for."""
    return el("details", el("summary", title), inner)


@dataclass(frozen=True)
class Bar:
    """One of them. color: number of one of the page's colors; 0 takes that of its sign."""

    name: str
    value: float
    color: int = 0
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
    return f"c{row.color}" if row.color else "minus" if row.value < 0 else "plus"


def _place(value: float, zero: float, width: float) -> str:
    share = abs(value) / width
    left = zero - share if value < 0 else zero
    return f"left:{100 * left:.2f}%;width:{100 * share:.2f}%"


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
    """A table with a row of `values` for each of `rows`, shaded from `low` (nothing) to `full`; negative figures in another color."""
    head = el("tr", el("th", corner, scope="col"), [el("th", column, scope="col") for column in columns])
    body = [
        el(
            "tr",
            el("th", name, scope="row"),
            [_shaded_cell(value, show, low, full, f"{name}, {columns[i]}") for i, value in enumerate(row)],
        )
        for name, row in zip(rows, values, strict=True)
    ]
    return el(
        "figure",
        el("figcaption", el("b", title), el("span", across, class_="unit") if across else None),
        el("div", el("table", el("thead", head), el("tbody", body), class_="heat"), class_="scroll", tabindex="0"),
        el("p", note, class_="note") if note else None,
        class_="chart",
    )


def _shaded_cell(value: float | None, show: Callable[[float | None], str], low: float, full: float, where: str) -> Html:
    if value is None:
        return el("td", show(None), class_="none", data_tip=f"{where}: not measured")
    share = max(0.0, min(1.0, (abs(value) - low) / (full - low or 1.0)))
    side = "minus" if value < 0 else "plus"
    return el(
        "td", show(value), class_=side + (" strong" if share > 0.6 else ""), style=f"--s:{share:.3f}", data_tip=f"{where}: {show(value)}"
    )
