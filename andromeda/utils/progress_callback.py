"""How long work says how far it is, to whoever called it."""

from __future__ import annotations

from collections.abc import Callable

ProgressCallback = Callable[[str, int, int], None]
"""Called with (stage, done, total) as work proceeds."""


def no_progress(stage: str, done: int, total: int) -> None:
    """A callback that shows nothing."""
