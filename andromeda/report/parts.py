"""What several sections share."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from andromeda.evaluate.result import Result
from andromeda.utils.html import Child, Html, el

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


def origins(found: Sequence[Result], newest: int | None) -> list[Html]:
    """Which commands made these results, of which weights; each once."""
    made: dict[tuple[str, int, str], list[str]] = {}
    for result in found:
        made.setdefault((result.command, result.step, result.made.partition("T")[0]), []).append(result.name)
    return [_origin(*key, names if len(made) > 1 else [], newest) for key, names in made.items()]


def _origin(text: str, step: int, date: str, names: list[str], newest: int | None) -> Html:
    stale = f"; the newest checkpoint is of step {newest:,}" if newest is not None and newest != step else ""
    which = f"{', '.join(names)}: " if names else "Made by "
    return el("p", which, command(text), f" on step {step:,}{stale}, {date}", class_="note")
