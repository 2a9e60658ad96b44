"""The probes of training, larger than any that a model saw there: out of distribution."""

from __future__ import annotations

import string
from collections.abc import Sequence
from random import Random

from andromeda.data.reasoning_tasks import AssociativeRecall, Induction, ReasoningProblem


class TwoDigits:
    """`37 + 45 = 82`, five times; the last sum is asked for."""

    chance = 90 / 8100
    """109 is the sum of ninety of the 8,100 pairs, and no other sum of more."""
    EXAMPLES = 4

    def draw(self, random: Random, alphabet: Sequence[int]) -> ReasoningProblem[str]:
        """Five different pairs of numbers of two digits."""
        pairs = [(10 + pair // 90, 10 + pair % 90) for pair in random.sample(range(8100), self.EXAMPLES + 1)]
        lines = [f"{a} + {b} = {a + b}\n" for a, b in pairs[:-1]]
        a, b = pairs[-1]
        return ReasoningProblem("".join(lines) + f"{a} + {b} =", f" {a + b}")

    def solve(self, prompt: str) -> str:
        """Add what stands in the last line."""
        a, _, b, _ = prompt.splitlines()[-1].split()
        return f" {int(a) + int(b)}"


class LongRecall(AssociativeRecall):
    """Recall among 32 pairs."""

    PAIRS = 32
    chance = 1 / PAIRS


class LongInduction(Induction):
    """Induction over a sequence of 64 tokens."""

    LENGTH = 64
    chance = 1 / LENGTH


class ThreeHops:
    """Four chains `a = 3`, `b = a`, `c = b`, the lines of a hop in mixed order; then `assert c ==`."""

    CHAINS = 4
    chance = 1 / CHAINS
    """One of the values that were seen."""

    def draw(self, random: Random, alphabet: Sequence[int]) -> ReasoningProblem[str]:
        """Twelve variables with different names and four different digits."""
        names = random.sample(string.ascii_lowercase, 3 * self.CHAINS)
        values = random.sample(range(10), self.CHAINS)
        chains = [(*names[3 * i : 3 * i + 3], value) for i, value in enumerate(values)]
        hops = [[f"{a} = {value}\n" for a, _, _, value in chains], [f"{b} = {a}\n" for a, b, _, _ in chains]]
        hops.append([f"{c} = {b}\n" for _, b, c, _ in chains])
        for lines in hops:
            random.shuffle(lines)
        _, _, asked, value = random.choice(chains)
        return ReasoningProblem("".join(sum(hops, start=[])) + f"assert {asked} ==", f" {value}")  # noqa: RUF017 - three short lists

    def solve(self, prompt: str) -> str:
        """Follow the names until there is a digit."""
        *lines, question = prompt.splitlines()
        bound = dict(line.split(" = ") for line in lines)
        found = question.split()[1]
        while found in bound:
            found = bound[found]
        return f" {found}"
