"""metrics.jsonl read back: of a run that is going on, that was killed, or that somebody else sent."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TIMED = ("seconds", "tokens_per_second", "mfu", "memory_gib")
"""Figures that depend on the machine's mood: all others repeat."""


@dataclass(frozen=True)
class Metrics:
    """The lines of metrics.jsonl that can be read."""

    lines: list[dict[str, Any]]
    broken: int = 0
    """Lines that cannot: the last one, while it is being written, or after a kill."""

    def points(self, name: str) -> list[tuple[float, float]]:
        """(step, figure) wherever the figure is a number."""
        return [(line["step"], line[name]) for line in self.lines if is_number(line.get(name))]

    def last(self, name: str) -> float | None:
        """The newest value of a figure."""
        return next((line[name] for line in reversed(self.lines) if is_number(line.get(name))), None)

    def names(self, start: str) -> list[str]:
        """Figures whose names begin so, in the order in which they came."""
        return list(dict.fromkeys(name for line in self.lines for name in line if name.startswith(start)))

    @property
    def step(self) -> int:
        """The newest step that there are figures of."""
        return max((int(line["step"]) for line in self.lines), default=0)


def read_metrics(path: Path) -> Metrics:
    """The lines that are whole. A file that is missing has none."""
    try:
        raw = path.read_bytes()
    except OSError:
        return Metrics([])
    lines, broken = [], 0
    for text in raw.splitlines():
        try:
            line = json.loads(text)
            lines.append(line | {"step": int(line["step"])})
        except (ValueError, TypeError, KeyError):
            broken += bool(text.strip(b"\0 "))
    return Metrics(lines, broken)


def is_number(value: Any) -> bool:
    """Whether a figure is one."""
    return isinstance(value, int | float) and not isinstance(value, bool)
