"""What several sections share."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from andromeda.evaluate.result import EvalResult
from andromeda.utils.html import Child, Markup, el

MALFORMED = (KeyError, TypeError, ValueError, IndexError, AttributeError)
"""What reading a result raises that is not of the shape of its kind."""


def code(text: str) -> Markup:
    """A command as one types it."""
    return el("code", text)


def missing_section(why: str, *commands: str) -> Markup:
    """Says that nothing is known yet, and which commands provide it."""
    shown: list[Child] = [part for text in commands for part in (el("br"), code(text))]
    return el("p", why, shown, class_="empty")


def malformed_result(result: EvalResult) -> Markup:
    """Says that a result has not the shape of its kind: written by another version, or by hand. The rest of the page stands."""
    return el("p", f"The result {result.name} is not of the shape that its kind has: run its command again.", class_="empty")


def shell_quote(path: Path) -> str:
    """A path as a shell takes it."""
    return shlex.quote(str(path))


def provenance_notes(found: Sequence[EvalResult], newest: int | None) -> list[Markup]:
    """Which commands made these results, of which weights; each once."""
    made: dict[tuple[str, int, str], list[str]] = {}
    for result in found:
        made.setdefault((result.command, result.step, result.made.partition("T")[0]), []).append(result.name)
    return [_origin(*key, names if len(made) > 1 else [], newest) for key, names in made.items()]


def _origin(text: str, step: int, date: str, names: list[str], newest: int | None) -> Markup:
    stale = f"; the newest checkpoint is of step {newest:,}" if newest is not None and newest != step else ""
    which = f"{', '.join(names)}: " if names else "Command: "
    return el("p", which, code(text), f" on step {step:,}{stale}, {date}", class_="note")
