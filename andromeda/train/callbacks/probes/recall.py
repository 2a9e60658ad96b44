"""Associative recall (multi-query variant: zoology, arXiv 2312.04927): pairs of tokens, then one key again."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from andromeda.train.callbacks.probes.task import Problem


class Recall:
    """k1 v1 k2 v2 ... k8 v8 ki -> vi, all tokens different."""

    PAIRS = 8
    chance = 1 / PAIRS
    """One of the values that were seen."""

    def draw(self, random: Random, alphabet: Sequence[int]) -> Problem[tuple[int, ...]]:
        """Eight pairs and the key of one of them."""
        tokens = random.sample(list(alphabet), 2 * self.PAIRS)
        asked = 2 * random.randrange(self.PAIRS)
        return Problem((*tokens, tokens[asked]), (tokens[asked + 1],))

    def solve(self, prompt: tuple[int, ...]) -> tuple[int, ...]:
        """The token after the first occurrence of the last one."""
        return (prompt[prompt.index(prompt[-1]) + 1],)
