"""Aggregation: which words come most often in a list that fills the whole context (RULER, arXiv 2404.06654, section 3)."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from random import Random

from andromeda.evaluate.retrieval.problem import Problem
from andromeda.evaluate.retrieval.style import Style
from andromeda.evaluate.retrieval.words import LETTERS, words


@dataclass(frozen=True)
class Counting:
    """The first `answers` words come more often than all others.

    Common words: a few come ten times, and as many as there is room for come twice (RULER's common words extraction).
    Frequent words: how often a word comes falls with the square of its rank (RULER's frequent words extraction, Zipf's 2.0).
    """

    name: str
    answers: int
    others: int
    zipf: bool
    everywhere = True
    OFTEN, SELDOM = 10, 2
    POOL = 4096

    def draw(self, random: Random, style: Style) -> Problem:
        """Words with their shares; how many there are depends on the room."""
        pool = words(random, self.POOL)
        right, wrong = pool[: self.answers], pool[self.answers : self.answers + self.others]
        return Problem([], [], style.common.format(count=self.answers), tuple(right), tuple(wrong), words=pool)

    def counts(self, size: int) -> list[int]:
        """How often each of the first words comes in a list of about `size`; the right ones first, strictly more often than others."""
        if self.zipf:
            counts = [max(1, round(size * 0.6 / rank**2)) for rank in range(1, self.answers + self.others + 1)]
            counts[: self.answers] = [count + 1 for count in counts[: self.answers]]
            rest = max(0, size - sum(counts))
            return [*counts, *[1] * min(rest, self.POOL - len(counts))]
        seldom = max(self.others, (size - self.answers * self.OFTEN) // self.SELDOM)
        return [self.OFTEN] * self.answers + [self.SELDOM] * min(seldom, self.POOL - self.answers)

    def solve(self, text: str, style: Style) -> list[str]:
        """Count."""
        body = text[len(style.header) :]
        found = Counter(re.findall(rf"\b[a-z]{{{LETTERS}}}\b", body))
        return [word for word, _ in found.most_common(self.answers)]
