"""Needles in a haystack: keys with numbers (RULER, arXiv 2404.06654, section 3; worded anew)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from andromeda.evaluate.retrieval.problem import Problem
from andromeda.evaluate.retrieval.style import Style
from andromeda.evaluate.retrieval.words import numbers, words


@dataclass(frozen=True)
class Needles:
    """Facts of `keys` keys with `values` values each are asked for among those of `distractors` other keys."""

    name: str
    keys: int = 1
    values: int = 1
    distractors: int = 0
    unseen: int = 0
    """Wrong answers that are not in the text."""
    crowded: bool = False
    """Whether the rest of the text is facts too, instead of noise."""
    everywhere = False

    @property
    def answers(self) -> int:
        """Right answers of a problem."""
        return self.keys * self.values

    @property
    def others(self) -> int:
        """Wrong ones."""
        return self.distractors + self.unseen

    def draw(self, random: Random, style: Style) -> Problem:
        """Keys and values that are all different."""
        keys = words(random, self.keys + self.distractors)
        right, asked = numbers(random, self.answers + self.others), keys[: self.keys]
        wrong = right[self.answers :]
        right = right[: self.answers]
        facts = [style.fact.format(key=asked[i // self.values], value=value) for i, value in enumerate(right)]
        distractors = [style.fact.format(key=key, value=value) for key, value in zip(keys[self.keys :], wrong, strict=False)]
        noise = _facts(Random(random.getrandbits(64)), style, {*keys}, {*right, *wrong}) if self.crowded else None
        return Problem(facts, distractors, self._question(style, asked), tuple(right), tuple(wrong), noise)

    def _question(self, style: Style, asked: list[str]) -> str:
        if self.keys > 1:
            return style.several_keys.format(keys=style.comma.join(asked))
        return (style.all_values if self.values > 1 else style.question).format(key=asked[0])

    def solve(self, text: str, style: Style) -> list[str]:
        """The numbers of all facts whose key stands in the question."""
        body, question = split_question(text)
        facts = [(found["key"], found["value"]) for found in style.pattern(style.fact).finditer(body)]
        asked = [word for word in re.findall(r"\w+", question) if word in dict(facts)]
        return [value for key in dict.fromkeys(asked) for other, value in facts if other == key]


def split_question(text: str) -> tuple[str, str]:
    """Text and question."""
    cut = max(text.rfind("\n" + word) for word in ("Question:", "assert "))
    return text[: cut + 1], text[cut + 1 :]


def _facts(random: Random, style: Style, keys: set[str], values: set[str]) -> Iterator[str]:
    """Facts without end, none of which repeats a key or a value."""
    while True:
        key, value = words(random, 1)[0], numbers(random, 1)[0]
        if key not in keys and value not in values:
            keys.add(key)
            values.add(value)
            yield style.fact.format(key=key, value=value)
