"""What several sections share."""

from __future__ import annotations

import shlex
from pathlib import Path

from andromeda.evaluate.result import Result
from andromeda.study.page import Child, Html, el

MISSHAPEN = (KeyError, TypeError, ValueError, IndexError, AttributeError)
"""What reading a result raises that is not of the shape of its kind."""


def command(text: str) -> Html:
    """A command as one types it."""
    return el("code", text)


def empty(why: str, *commands: str) -> Html:
    """Says that nothing is known yet, and which commands mend that."""
    shown: list[Child] = [part for text in commands for part in (el("br"), command(text))]
    return el("p", why, shown, class_="empty")


def damaged(result: Result) -> Html:
    """Says that a result has not the shape of its kind: written by another version, or by hand. The rest of the page stands."""
    return el("p", f"The result {result.name} is not of the shape that its kind has: run its command again.", class_="empty")


def quoted(path: Path) -> str:
    """A path as a shell takes it."""
    return shlex.quote(str(path))


def origin(result: Result, newest: int | None) -> Html:
    """Which command made a result, of which weights."""
    stale = f"; the newest checkpoint is of step {newest:,}" if newest is not None and newest != result.step else ""
    return el("p", command(result.command), f" on step {result.step:,}{stale}, {result.made.partition('T')[0]}", class_="note")
