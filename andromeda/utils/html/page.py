"""A whole page: head, style, scripts and table of contents around its sections (`templates/page.html`)."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from markupsafe import Markup

from andromeda.utils.html.elements import Child, environment


@dataclass(frozen=True)
class Section:
    """A part of the page. lead: one sentence that says what it shows."""

    id: str
    title: str
    lead: Child
    body: Child = None


def page(title: str, subtitle: Child, sections: Sequence[Section], top: Child = None, foot: Child = None, script: str = "") -> str:
    """A whole document. top: what comes above the sections. script: file name of the page's own script, after the common one."""
    scripts = [_resource("script.js"), *([_resource(script)] if script else [])]
    return (
        environment()
        .get_template("page.html")
        .render(
            title=title,
            subtitle=subtitle,
            sections=sections,
            top=top,
            foot=foot,
            style=Markup(_resource("style.css")),
            scripts=[Markup(text) for text in scripts],
            hashes=Markup(" ".join(_hash(text) for text in scripts)),
        )
        + "\n"
    )


def _hash(script: str) -> str:
    """The source expression of an inline script in a content security policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


@cache
def _resource(name: str) -> str:
    return (files("andromeda.utils.html") / name).read_text("utf-8")
