"""Line length of generated Markdown pages."""

from __future__ import annotations

import re
import textwrap

WIDTH = 120
"""Longest line, except of tables, code, headings and commands."""
_ITEM = re.compile(r"\s*(?:[-*]|\d+\.)\s+")
_UNWRAPPED = ("|", "#", "<!--", "![", "```", "`andromeda ", "    ")


def wrap(page: str) -> str:
    """The page with its paragraphs and list items filled to `WIDTH`, where one of their lines is longer."""
    lines: list[str] = []
    paragraph: list[str] = []
    code = False
    for line in page.split("\n"):
        apart = code or not line.strip() or line.startswith(_UNWRAPPED)
        if apart or _ITEM.match(line):
            lines += _filled(paragraph)
            paragraph = []
        if apart:
            lines.append(line)
        else:
            paragraph.append(line)
        code ^= line.startswith("```")
    return "\n".join([*lines, *_filled(paragraph)])


def _filled(paragraph: list[str]) -> list[str]:
    if all(len(line) <= WIDTH for line in paragraph):
        return paragraph
    item = _ITEM.match(paragraph[0])
    indent = " " * (item.end() if item else 0)
    text = " ".join(line.strip() for line in paragraph)
    return textwrap.wrap(text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
