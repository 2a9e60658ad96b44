"""HTML that cannot be forgotten to be escaped: text is escaped unless it was made here."""

from __future__ import annotations

import html
from collections.abc import Iterable

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
