"""The page around its sections: head, style, script, list of contents."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from andromeda.utils.html.elements import Child, Html, el, join


@dataclass(frozen=True)
class Section:
    """A part of the page. lead: one sentence that says what it shows."""

    id: str
    title: str
    lead: Child
    body: Child = None


def page(title: str, subtitle: Child, sections: Sequence[Section], top: Child = None, foot: Child = None, script: str = "") -> str:
    """A whole document. top: what stands above the sections. script: the page's own, after the common one."""
    scripts = [_file("script.js"), *([_file(script)] if script else [])]
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        _policy(scripts),
        el("meta", name="generator", content="Andromeda"),
        el("title", title),
        # An icon of its own, or a browser asks the server for one.
        Html('<link rel="icon" href="data:,"/>'),
        el("style", Html(_file("style.css"))),
    )
    contents = el("nav", [el("a", s.title, href=f"#{s.id}") for s in sections], aria_label="Contents")
    body = el(
        "body",
        el("header", el("h1", title), el("p", subtitle, class_="lead"), top),
        contents,
        el("main", [_section(s) for s in sections]),
        el("footer", foot) if foot else None,
        el("div", id="tip", role="status", hidden=True),
        [el("script", Html(text)) for text in scripts],
    )
    return "<!doctype html>\n" + el("html", head, body, lang="en") + "\n"


def _section(section: Section) -> Html:
    return el("section", el("h2", section.title), el("p", section.lead, class_="lead"), section.body, id=section.id)


def _policy(scripts: Sequence[str]) -> Html:
    """Nothing is loaded from anywhere, and no script runs but ours: a text that the model wrote could be one."""
    hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in scripts)
    rules = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src {hashes}; base-uri 'none'; form-action 'none'"
    return Html('<meta http-equiv="Content-Security-Policy" content="' + join(rules).replace("&#x27;", "'") + '"/>')


@cache
def _file(name: str) -> str:
    return (files("andromeda.utils.html") / name).read_text("utf-8")
