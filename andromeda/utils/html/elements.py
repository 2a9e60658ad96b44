"""Elements of a page as `Markup`: tables, lists of figures, bars and heat maps, from the templates in `templates/elements.html`.

Text is escaped unless it is `Markup` already (Jinja2's autoescape, and `el` for single elements and SVG), and control characters,
which HTML does not allow and which a model may write, are shown as their pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from andromeda.utils.formatting import format_number, format_percent

VOID = frozenset({"meta", "br", "hr", "img", "input", "rect", "line", "path", "circle", "use"})
"""Elements that have no closing tag."""

Child = str | int | float | None | Iterable["Child"]
"""What an element may contain: text, numbers, `Markup`, nested sequences of these; None is left out."""

CONTROL_PICTURES = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"} | dict.fromkeys(range(127, 160), "\ufffd")
# Half a surrogate pair cannot be encoded as UTF-8.
CONTROL_PICTURES |= dict.fromkeys(range(0xD800, 0xE000), "\ufffd")


def markup(child: Child) -> Markup:
    """One child as markup: text escaped, control characters replaced, sequences joined."""
    if child is None:
        return Markup("")
    if isinstance(child, Markup):
        return child
    if isinstance(child, str):
        return escape(child.translate(CONTROL_PICTURES))
    if isinstance(child, int | float):
        return escape(child)
    return join(*child)


def join(*children: Child) -> Markup:
    """Children one after the other."""
    return Markup("").join(markup(child) for child in children)


@cache
def environment() -> Environment:
    """The templates of pages. Every expression in them goes through `markup`, on top of Jinja2's own escaping."""
    return Environment(
        loader=PackageLoader("andromeda.utils.html"),
        autoescape=True,
        finalize=markup,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _render(macro: str, **values: Any) -> Markup:
    return Markup(getattr(environment().get_template("elements.html").module, macro)(**values))


def el(name: str, /, *children: Child, **attributes: str | float | bool | None) -> Markup:
    """A single element. Attributes: `class_` is class, `data_x` is data-x; None and False leave one out, True writes its name alone."""
    head = name + "".join(_attribute(key, value) for key, value in attributes.items())
    if name in VOID and not children:
        return Markup(f"<{head}/>")
    return Markup(f"<{head}>{join(*children)}</{name}>")


def _attribute(key: str, value: str | float | bool | None) -> str:
    if value is None or value is False:
        return ""
    key = key.rstrip("_").replace("_", "-")
    return f" {key}" if value is True else f' {key}="{markup(str(value))}"'


def table(head: Sequence[Child], rows: Sequence[Sequence[Child]], *, text: int = 1, caption: str = "") -> Markup:
    """A table; the first `text` columns hold text, the others numbers, aligned to the right."""
    return _render("table", head=head, rows=rows, text=text, caption=caption)


def definition_list(pairs: Sequence[tuple[str, Child]]) -> Markup:
    """Terms with their values; those without a value are left out."""
    return _render("definition_list", pairs=[(name, value) for name, value in pairs if value not in (None, "")])


def tiles(entries: Sequence[tuple[str, Child, Child]]) -> Markup:
    """Key figures: name, figure, a few words about it."""
    return _render("tiles", entries=entries)


def grid(*figures: Child, kind: str = "") -> Markup:
    """Figures next to each other, as many as the page is wide for. kind: two (wider ones) or four (narrower ones)."""
    return _render("grid", figures=figures, kind=kind)


def details(title: str, *inner: Child) -> Markup:
    """A section that is closed until the reader opens it."""
    return _render("details", title=title, inner=inner)


@dataclass(frozen=True)
class Bar:
    """One bar of a bar chart. color: number of one of the page's colors; 0 takes that of its sign."""

    name: str
    value: float
    color: int = 0
    tip: str = ""

    @property
    def kind(self) -> str:
        """Its CSS class."""
        return f"c{self.color}" if self.color else "minus" if self.value < 0 else "plus"


def bar_chart(
    title: str,
    rows: Sequence[Bar],
    *,
    unit: str = "",
    show: Callable[[float | None], str] = format_number,
    full: float = 0.0,
    note: str = "",
) -> Markup:
    """A horizontal bar and a number per line. full: the value that fills the width (0: the largest)."""
    low, high = min([0.0, *(r.value for r in rows)]), max([0.0, *(r.value for r in rows)])
    low, high = (-full if low < 0 else 0.0, full) if full else (low, high)
    width = (high - low) or 1.0
    zero = -low / width
    bars = [(row, _place(row.value, zero, width), show(row.value)) for row in rows]
    return _render("bar_chart", title=title, unit=unit, bars=bars, zero=f"{100 * zero:.2f}", note=note)


def _place(value: float, zero: float, width: float) -> str:
    share = abs(value) / width
    left = zero - share if value < 0 else zero
    return f"left:{100 * left:.2f}%;width:{100 * share:.2f}%"


def heat_map(
    title: str,
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float | None]],
    *,
    corner: str = "",
    across: str = "",
    show: Callable[[float | None], str] = format_percent,
    full: float = 1.0,
    low: float = 0.0,
    note: str = "",
) -> Markup:
    """A table with a row of `values` per name in `rows`, shaded from `low` (no color) to `full`; negative values in another color."""
    shades = [[_shade(value, low, full) for value in row] for row in values]
    lines = [
        (name, [(value, kind, share, column, show(value)) for value, (kind, share), column in zip(row, shade, columns, strict=True)])
        for name, row, shade in zip(rows, values, shades, strict=True)
    ]
    return _render("heat_map", title=title, columns=columns, lines=lines, corner=corner, across=across, note=note)


def _shade(value: float | None, low: float, full: float) -> tuple[str, str]:
    """CSS class and strength of one cell."""
    if value is None:
        return "none", ""
    share = max(0.0, min(1.0, (abs(value) - low) / (full - low or 1.0)))
    return ("minus" if value < 0 else "plus") + (" strong" if share > 0.6 else ""), f"{share:.3f}"
