"""What a probe is: problems that are generated, a solver that shows they can be solved, and the score of guessing."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Generic, NamedTuple, Protocol, TypeVar

Said = TypeVar("Said", str, tuple[int, ...])
"""Text, which a tokenizer spells, or token ids."""


class Problem(NamedTuple, Generic[Said]):
    """What is given, and the only right continuation."""

    prompt: Said
    answer: Said


class Task(Protocol[Said]):
    """A kind of problem."""

    chance: float
    """Expected score of guessing: an answer of the right kind, chosen as well as possible without relating the question to
    what stands before it."""

    def draw(self, random: Random, alphabet: Sequence[int]) -> Problem[Said]:
        """A problem. alphabet: token ids that may be used."""

    def solve(self, prompt: Said) -> Said:
        """The answer, from the prompt alone."""
