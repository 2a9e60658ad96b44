"""Variable tracking (RULER, arXiv 2404.06654, section 3; worded anew): chains of assignments, whose names are asked for."""

from __future__ import annotations

from itertools import pairwise
from random import Random

from andromeda.evaluate.retrieval.needles import split_question
from andromeda.evaluate.retrieval.problem import Problem
from andromeda.evaluate.retrieval.style import Style
from andromeda.evaluate.retrieval.words import numbers, words


class Variables:
    """`a = 1234567`, `b = a`, ... `e = d`: which variables hold 1234567? Beside it a chain of another number."""

    name = "variables"
    HOPS = 4
    answers = others = HOPS + 1
    everywhere = False

    def draw(self, random: Random, style: Style) -> Problem:
        """Two chains of five variables."""
        names, (value, other) = words(random, self.answers + self.others), numbers(random, 2)
        right, wrong = names[: self.answers], names[self.answers :]
        return Problem(
            self._chain(right, value, style),
            self._chain(wrong, other, style),
            style.variables.format(value=value),
            tuple(right),
            tuple(wrong),
        )

    def _chain(self, names: list[str], value: str, style: Style) -> list[str]:
        hops = [style.alias.format(name=name, other=before) for before, name in pairwise(names)]
        return [style.first.format(name=names[0], value=value), *hops]

    def solve(self, text: str, style: Style) -> list[str]:
        """Follow the assignments line by line."""
        body, question = split_question(text)
        held: dict[str, str] = {}
        first, alias = style.pattern(style.first), style.pattern(style.alias)
        for line in body.splitlines():
            if found := alias.fullmatch(line):
                held[found["name"]] = held.get(found["other"], found["other"])
            elif found := first.fullmatch(line):
                held[found["name"]] = found["value"]
        return [name for name, value in held.items() if value in question]
