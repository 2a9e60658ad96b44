"""Addition of two digits, after four examples."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from andromeda.train.callbacks.probes.task import Problem


class Arithmetic:
    """`3 + 4 = 7`, five times; the last sum is asked for. Never is the question among the examples."""

    chance = 0.1
    """Nine is the sum of ten of the hundred pairs, and no other sum of more."""
    EXAMPLES = 4

    def draw(self, random: Random, alphabet: Sequence[int]) -> Problem[str]:
        """Five different pairs of digits."""
        *examples, asked = [divmod(pair, 10) for pair in random.sample(range(100), self.EXAMPLES + 1)]
        lines = [f"{a} + {b} = {a + b}\n" for a, b in examples]
        return Problem("".join(lines) + f"{asked[0]} + {asked[1]} =", f" {sum(asked)}")

    def solve(self, prompt: str) -> str:
        """Add what stands in the last line."""
        a, _, b, _ = prompt.splitlines()[-1].split()
        return f" {int(a) + int(b)}"
