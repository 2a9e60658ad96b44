"""Parity of a row of bits: every bit counts, so that no part of the row tells anything (out of distribution: longer rows)."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from andromeda.data.reasoning_tasks import ReasoningProblem

EXAMPLES = 4


class Parity:
    """`1 0 1 1 : 1`, five times; the last parity is asked for."""

    chance = 0.5
    """Half of all rows are even."""

    def __init__(self, bits: int) -> None:
        self._bits = bits

    def draw(self, random: Random, alphabet: Sequence[int]) -> ReasoningProblem[str]:
        """Five rows."""
        rows = [[random.randrange(2) for _ in range(self._bits)] for _ in range(EXAMPLES + 1)]
        lines = [f"{' '.join(map(str, row))} : {sum(row) % 2}\n" for row in rows[:-1]]
        return ReasoningProblem("".join(lines) + f"{' '.join(map(str, rows[-1]))} :", f" {sum(rows[-1]) % 2}")

    def solve(self, prompt: str) -> str:
        """Count the ones of the last line."""
        return f" {prompt.splitlines()[-1].count('1') % 2}"
