"""Tables, lists of facts, tiles of key figures, and what is folded away."""

from __future__ import annotations

from collections.abc import Sequence

from andromeda.study.page.markup import Child, Html, el


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
