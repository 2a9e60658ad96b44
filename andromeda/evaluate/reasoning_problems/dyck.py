"""Dyck language: which brackets close what is open, innermost first (out of distribution: more of them are open)."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from andromeda.data.reasoning_tasks import ReasoningProblem

EXAMPLES = 4
CLOSING = {"(": ")", "[": "]", "{": "}"}


class Dyck:
    """`( [ ] { : } )`, five times; the last answer is asked for."""

    def __init__(self, depth: int) -> None:
        """depth: brackets left open."""
        self._depth = depth
        self.chance = len(CLOSING) ** -depth
        """The kinds of the open brackets are drawn evenly and separately."""

    def draw(self, random: Random, alphabet: Sequence[int]) -> ReasoningProblem[str]:
        """Five rows, with pairs that are closed already between the open brackets."""
        rows = [self._row(random) for _ in range(EXAMPLES + 1)]
        lines = [f"{' '.join(row)} : {closers(row)}\n" for row in rows[:-1]]
        return ReasoningProblem("".join(lines) + f"{' '.join(rows[-1])} :", f" {closers(rows[-1])}")

    def _row(self, random: Random) -> list[str]:
        row: list[str] = []
        for _ in range(self._depth):
            row.append(random.choice(list(CLOSING)))
            if random.random() < 0.5:
                pair = random.choice(list(CLOSING))
                row += [pair, CLOSING[pair]]
        return row

    def solve(self, prompt: str) -> str:
        """Close what is open in the last line."""
        return f" {closers(prompt.splitlines()[-1].split()[:-1])}"


def closers(row: Sequence[str]) -> str:
    """What closes all that a row leaves open."""
    open_ones: list[str] = []
    for bracket in row:
        if bracket in CLOSING:
            open_ones.append(bracket)
        else:
            open_ones.pop()
    return " ".join(CLOSING[bracket] for bracket in reversed(open_ones))
