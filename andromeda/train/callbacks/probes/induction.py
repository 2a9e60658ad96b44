"""Induction (arXiv 2209.11895): a random sequence again, and what came next the first time."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from andromeda.train.callbacks.probes.task import Problem


class Induction:
    """s1 ... s16 s1 ... sj -> s(j+1), all different, j from 4 to 15."""

    LENGTH = 16
    SHORTEST = 4
    chance = 1 / LENGTH
    """One of the tokens of the sequence."""

    def draw(self, random: Random, alphabet: Sequence[int]) -> Problem[tuple[int, ...]]:
        """A sequence and the beginning of its repetition."""
        sequence = tuple(random.sample(list(alphabet), self.LENGTH))
        again = random.randint(self.SHORTEST, self.LENGTH - 1)
        return Problem(sequence + sequence[:again], (sequence[again],))

    def solve(self, prompt: tuple[int, ...]) -> tuple[int, ...]:
        """The token after the first occurrence of the last one."""
        return (prompt[prompt.index(prompt[-1]) + 1],)
