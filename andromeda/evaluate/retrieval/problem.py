"""A problem of retrieval before it has a length: lines to hide, a question, right answers and wrong ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from random import Random
from typing import Protocol

from andromeda.evaluate.retrieval.style import Style


@dataclass(frozen=True)
class Problem:
    """What is hidden and what is asked."""

    evidence: list[str]
    """Lines that answer the question, in this order; the first goes to the depth that is asked for."""
    distractors: list[str]
    """Lines of the same kind that answer other questions; anywhere."""
    question: str
    answers: tuple[str, ...]
    others: tuple[str, ...]
    """Wrong answers of the same kind, drawn in the same way."""
    noise: Iterator[str] | None = None
    """Lines that fill the rest; None takes the style's own."""
    words: list[str] = field(default_factory=list)
    """Words of a list that is the whole text, the right answers first, the wrong ones after them."""


class Task(Protocol):
    """A kind of problem."""

    @property
    def name(self) -> str:
        """What a user calls it."""

    @property
    def answers(self) -> int:
        """Right answers of a problem."""

    @property
    def others(self) -> int:
        """Wrong ones that they are ranked among."""

    @property
    def everywhere(self) -> bool:
        """Whether the whole text is evidence, so that there is no depth."""

    def draw(self, random: Random, style: Style) -> Problem:
        """A problem."""

    def solve(self, text: str, style: Style) -> list[str]:
        """The answers, from the prompt alone."""


def chance(answers: int, others: int) -> float:
    """Expected score of a ranking that does not know the text.

    Right and wrong answers are drawn alike, so that every one of those left is first with the same probability: of `answers`
    slots, the one after j right answers is hit by chance in (answers - j) of (answers - j + others) cases.
    """
    return sum((answers - j) / (answers - j + others) for j in range(answers)) / answers
