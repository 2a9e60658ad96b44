"""Two hops: variables that get their value from other variables (as RULER's variable tracking, arXiv 2404.06654)."""

from __future__ import annotations

import string
from collections.abc import Sequence
from random import Random

from andromeda.train.callbacks.probes.task import Problem


class MultiHop:
    """Four chains `a = 3`, `b = a` in mixed order; then `assert b ==`, which takes the way over `a`."""

    CHAINS = 4
    chance = 1 / CHAINS
    """One of the values that were seen."""

    def draw(self, random: Random, alphabet: Sequence[int]) -> Problem[str]:
        """Eight variables with different names and four different digits."""
        names = random.sample(string.ascii_lowercase, 2 * self.CHAINS)
        values = random.sample(range(10), self.CHAINS)
        chains = [(names[2 * i], names[2 * i + 1], value) for i, value in enumerate(values)]
        first = [f"{a} = {value}\n" for a, _, value in chains]
        second = [f"{b} = {a}\n" for a, b, _ in chains]
        for lines in (first, second):
            random.shuffle(lines)
        _, asked, value = random.choice(chains)
        return Problem("".join(first + second) + f"assert {asked} ==", f" {value}")

    def solve(self, prompt: str) -> str:
        """Follow the names until there is a digit."""
        *lines, question = prompt.splitlines()
        bound = dict(line.split(" = ") for line in lines)
        found = question.split()[1]
        while found in bound:
            found = bound[found]
        return f" {found}"
