"""Retrieval problems after RULER (arXiv 2404.06654, section 3), generated from invented words and numbers.

A problem has lines to hide, a question, correct answers and wrong ones of the same kind. Every task has a solver that reads the answers
off the prompt, and a known score of guessing. Each is worded in English and as Python source.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from random import Random
from typing import Protocol


@dataclass(frozen=True)
class RetrievalProblem:
    """What is hidden and what is asked."""

    evidence: list[str]
    """Lines that answer the question, in this order; the first goes to the depth that is asked for."""
    distractors: list[str]
    """Lines of the same kind that answer other questions; anywhere."""
    question: str
    answers: tuple[str, ...]
    others: tuple[str, ...]
    """Wrong answers of the same kind, drawn in the same way."""
    noise: Iterator[str] | None = None
    """Lines that fill the rest; None takes the style's own."""
    words: list[str] = field(default_factory=list)
    """Words of a list that is the whole text, the right answers first, the wrong ones after them."""


class RetrievalTask(Protocol):
    """A kind of problem."""

    @property
    def name(self) -> str:
        """What a user calls it."""

    @property
    def answers(self) -> int:
        """Right answers of a problem."""

    @property
    def others(self) -> int:
        """Wrong ones that they are ranked among."""

    @property
    def everywhere(self) -> bool:
        """Whether the whole text is evidence, so that there is no depth."""

    def draw(self, random: Random, style: PromptStyle) -> RetrievalProblem:
        """A problem."""

    def solve(self, text: str, style: PromptStyle) -> list[str]:
        """The answers, from the prompt alone."""


def chance_accuracy(answers: int, others: int) -> float:
    """Expected score of a ranking that does not know the text.

    Right and wrong answers are drawn alike, so that every one of those left is first with the same probability: of `answers`
    slots, the one after j right answers is hit by chance in (answers - j) of (answers - j + others) cases.
    """
    return sum((answers - j) / (answers - j + others) for j in range(answers)) / answers


@dataclass(frozen=True)
class PromptStyle:
    """One language."""

    header: str
    list_header: str
    """Before a list of words."""
    list_end: str
    noise: tuple[str, ...]
    """Lines that say nothing, in turn."""
    fact: str
    """A key has a value."""
    first: str
    """A variable is set to a value."""
    alias: str
    """A variable is set to another variable."""
    question: str
    """The value of one key."""
    all_values: str
    """All values of one key."""
    several_keys: str
    """The values of several keys."""
    variables: str
    """All variables that hold a value."""
    common: str
    """The `count` words that come most often."""
    lead: str = " "
    comma: str = ", "

    def pattern(self, template: str) -> re.Pattern[str]:
        """What finds a template's filled lines: {names} match words."""
        escaped = re.escape(template.rstrip("\n"))
        return re.compile(re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>\\w+)", escaped))


STYLES = {
    "prose": PromptStyle(
        header="Some facts are hidden in the text below. Remember them: questions follow.\n",
        list_header="Some words come more often than others in the list below. Remember which: a question follows.\n",
        list_end="\n",
        noise=(
            "The grass is green and the sky is blue.\n",
            "The sun is warm and the wind is mild.\n",
            "Here we go again, there and back.\n",
            "One day follows the other, and nobody minds.\n",
        ),
        fact="The secret number of {key} is {value}.\n",
        first="The variable {name} is set to {value}.\n",
        alias="The variable {name} is set to the variable {other}.\n",
        question="Question: what is the secret number of {key}?\nAnswer: The secret number of {key} is",
        all_values="Question: what are all the secret numbers of {key}?\nAnswer: The secret numbers of {key} are",
        several_keys="Question: what are the secret numbers of {keys}?\nAnswer: The secret numbers of {keys} are",
        variables="Question: which variables are set to {value}?\nAnswer: The variables that are set to {value} are",
        common="Question: which {count} words come most often in the list?\nAnswer: The {count} words that come most often are",
    ),
    "code": PromptStyle(
        header="from settings import register\n",
        list_header='words = """\n',
        list_end='\n"""\n',
        noise=("for item in items:\n", "    total += item\n", "if total > limit:\n", "    total = 0\n"),
        fact="register({key}, {value})\n",
        first="{name} = {value}\n",
        alias="{name} = {other}\n",
        question="assert lookup({key}) == (",
        all_values="assert lookup_all({key}) == [",
        several_keys="assert lookup_each({keys}) == [",
        variables="assert names_of({value}) == [",
        common="assert most_common(words, {count}) == [",
        lead="",
    ),
}
"""By name."""


SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
LETTERS = 6
DIGITS = 7


def words(random: Random, count: int) -> list[str]:
    """Different words of three syllables."""
    numbers = random.sample(range(len(SYLLABLES) ** 3), count)
    return [_word(number) for number in numbers]


def _word(number: int) -> str:
    size = len(SYLLABLES)
    return SYLLABLES[number // size**2] + SYLLABLES[number // size % size] + SYLLABLES[number % size]


def numbers(random: Random, count: int) -> list[str]:
    """Different numbers of seven digits."""
    return [str(number) for number in random.sample(range(10 ** (DIGITS - 1), 10**DIGITS), count)]


@dataclass(frozen=True)
class NeedleTask:
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

    def draw(self, random: Random, style: PromptStyle) -> RetrievalProblem:
        """Keys and values that are all different."""
        keys = words(random, self.keys + self.distractors)
        right, asked = numbers(random, self.answers + self.others), keys[: self.keys]
        wrong = right[self.answers :]
        right = right[: self.answers]
        facts = [style.fact.format(key=asked[i // self.values], value=value) for i, value in enumerate(right)]
        distractors = [style.fact.format(key=key, value=value) for key, value in zip(keys[self.keys :], wrong, strict=False)]
        noise = _facts(Random(random.getrandbits(64)), style, {*keys}, {*right, *wrong}) if self.crowded else None
        return RetrievalProblem(facts, distractors, self._question(style, asked), tuple(right), tuple(wrong), noise)

    def _question(self, style: PromptStyle, asked: list[str]) -> str:
        if self.keys > 1:
            return style.several_keys.format(keys=style.comma.join(asked))
        return (style.all_values if self.values > 1 else style.question).format(key=asked[0])

    def solve(self, text: str, style: PromptStyle) -> list[str]:
        """The numbers of all facts whose key stands in the question."""
        body, question = split_question(text)
        facts = [(found["key"], found["value"]) for found in style.pattern(style.fact).finditer(body)]
        asked = [word for word in re.findall(r"\w+", question) if word in dict(facts)]
        return [value for key in dict.fromkeys(asked) for other, value in facts if other == key]


def split_question(text: str) -> tuple[str, str]:
    """Text and question."""
    cut = max(text.rfind("\n" + word) for word in ("Question:", "assert "))
    return text[: cut + 1], text[cut + 1 :]


def _facts(random: Random, style: PromptStyle, keys: set[str], values: set[str]) -> Iterator[str]:
    """Facts without end, none of which repeats a key or a value."""
    while True:
        key, value = words(random, 1)[0], numbers(random, 1)[0]
        if key not in keys and value not in values:
            keys.add(key)
            values.add(value)
            yield style.fact.format(key=key, value=value)


class VariableTracking:
    """`a = 1234567`, `b = a`, ... `e = d`: which variables hold 1234567? A second chain holds another number."""

    name = "variables"
    HOPS = 4
    answers = others = HOPS + 1
    everywhere = False

    def draw(self, random: Random, style: PromptStyle) -> RetrievalProblem:
        """Two chains of five variables."""
        names, (value, other) = words(random, self.answers + self.others), numbers(random, 2)
        right, wrong = names[: self.answers], names[self.answers :]
        return RetrievalProblem(
            self._chain(right, value, style),
            self._chain(wrong, other, style),
            style.variables.format(value=value),
            tuple(right),
            tuple(wrong),
        )

    def _chain(self, names: list[str], value: str, style: PromptStyle) -> list[str]:
        hops = [style.alias.format(name=name, other=before) for before, name in pairwise(names)]
        return [style.first.format(name=names[0], value=value), *hops]

    def solve(self, text: str, style: PromptStyle) -> list[str]:
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


@dataclass(frozen=True)
class WordExtraction:
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

    def draw(self, random: Random, style: PromptStyle) -> RetrievalProblem:
        """Words with their shares; how many there are depends on the room."""
        pool = words(random, self.POOL)
        right, wrong = pool[: self.answers], pool[self.answers : self.answers + self.others]
        return RetrievalProblem([], [], style.common.format(count=self.answers), tuple(right), tuple(wrong), words=pool)

    def counts(self, size: int) -> list[int]:
        """How often each of the first words comes in a list of about `size`; the right ones first, strictly more often than others."""
        if self.zipf:
            counts = [max(1, round(size * 0.6 / rank**2)) for rank in range(1, self.answers + self.others + 1)]
            counts[: self.answers] = [count + 1 for count in counts[: self.answers]]
            rest = max(0, size - sum(counts))
            return [*counts, *[1] * min(rest, self.POOL - len(counts))]
        seldom = max(self.others, (size - self.answers * self.OFTEN) // self.SELDOM)
        return [self.OFTEN] * self.answers + [self.SELDOM] * min(seldom, self.POOL - self.answers)

    def solve(self, text: str, style: PromptStyle) -> list[str]:
        """Count."""
        body = text[len(style.header) :]
        found = Counter(re.findall(rf"\b[a-z]{{{LETTERS}}}\b", body))
        return [word for word, _ in found.most_common(self.answers)]


RETRIEVAL_TASKS: dict[str, RetrievalTask] = {
    task.name: task
    for task in (
        NeedleTask("single", unseen=9),
        NeedleTask("needles", distractors=9, crowded=True),
        NeedleTask("multikey", distractors=9),
        NeedleTask("multivalue", values=4, distractors=8),
        NeedleTask("multiquery", keys=4, distractors=8),
        VariableTracking(),
        WordExtraction("common", answers=5, others=5, zipf=False),
        WordExtraction("frequent", answers=3, others=3, zipf=True),
    )
}
"""By name."""

__all__ = ["RETRIEVAL_TASKS", "RetrievalTask"]
