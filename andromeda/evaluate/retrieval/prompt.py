"""A problem as a prompt of exactly so many tokens, with any tokenizer.

Lines are encoded one by one, so that lengths add up; the text that the tokens spell is the same. What is missing to the exact
length is noise, of which the first line loses its beginning.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain, cycle
from random import Random

from andromeda.data.tokenizer import Tokenizer
from andromeda.evaluate.retrieval.counting import Counting
from andromeda.evaluate.retrieval.problem import Problem, Task
from andromeda.evaluate.retrieval.style import Style

Ids = list[int]


def build_prompt(task: Task, problem: Problem, style: Style, tokenizer: Tokenizer, length: int, depth: float, random: Random) -> Ids:
    """The prompt, `length` tokens: the separator, the text, the question. depth: where the evidence begins, 0 to 1.

    Raises TooShort when it does not fit.
    """
    if isinstance(task, Counting):
        return _list(task, problem, style, tokenizer, length, random)
    head, tail = [tokenizer.eos, *tokenizer.encode(style.header)], tokenizer.encode(problem.question)
    evidence, distractors = (tokenizer.encode_batch(lines) for lines in (problem.evidence, problem.distractors))
    needed = sum(map(len, [head, tail, *evidence, *distractors]))
    if needed > length:
        raise TooShort(needed)
    noise = _noise(problem.noise or cycle(style.noise), tokenizer, length - needed)
    return head + joined(_hidden(noise, evidence, distractors, depth, random)) + tail


def _noise(lines: Iterator[str], tokenizer: Tokenizer, count: int) -> list[Ids]:
    """Lines of `count` tokens in all; the first one lacks its beginning."""
    found: list[Ids] = []
    missing = count
    while missing > 0:
        for line in tokenizer.encode_batch([next(lines) for _ in range(max(1, missing // 64))]):
            if missing > 0:
                found.append(line)
                missing -= len(line)
    if missing < 0:
        # The last line is the one that was too long: without its beginning it becomes the first.
        found.insert(0, found.pop()[-missing:])
    return found


def _hidden(noise: list[Ids], evidence: list[Ids], distractors: list[Ids], depth: float, random: Random) -> list[Ids]:
    """All lines in order: the first of the evidence at its depth, the rest of it anywhere behind, distractors anywhere."""
    gaps = len(noise)
    first = round(depth * gaps)
    where = [first, *sorted(random.randint(first, gaps) for _ in evidence[1:])]
    elsewhere = sorted(random.randint(0, gaps) for _ in distractors)
    # Within a gap the evidence stands towards its end of the text, so that depths 0 and 1 are what they say.
    placed = [(gap, depth >= 0.5, i, line) for i, (gap, line) in enumerate(zip(where, evidence, strict=True))]
    placed += [(gap, depth < 0.5, i, line) for i, (gap, line) in enumerate(zip(elsewhere, distractors, strict=True))]
    placed.sort(key=lambda item: item[:3])
    lines: list[Ids] = []
    for gap in range(gaps + 1):
        while placed and placed[0][0] == gap:
            lines.append(placed.pop(0)[3])
        lines += noise[gap : gap + 1]
    return lines


def _list(task: Counting, problem: Problem, style: Style, tokenizer: Tokenizer, length: int, random: Random) -> Ids:
    """A list of words that fills the prompt."""
    head = [tokenizer.eos, *tokenizer.encode(style.list_header)]
    tail = tokenizer.encode(style.list_end) + tokenizer.encode(problem.question)
    room = length - len(head) - len(tail)
    spelt = tokenizer.encode_batch([f" {word}" for word in problem.words])

    def tokens(size: int) -> int:
        return sum(count * len(word) for count, word in zip(task.counts(size), spelt, strict=False))

    if tokens(0) > room:
        raise TooShort(length - room + tokens(0))
    low, high = 0, room + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if tokens(middle) <= room else (low, middle)
    listed = [word for count, word in zip(task.counts(low), spelt, strict=False) for _ in range(count)]
    random.shuffle(listed)
    return head + joined(_noise(cycle(style.noise), tokenizer, room - tokens(low))) + joined(listed) + tail


class TooShort(Exception):
    """The problem takes more tokens than there are."""

    def __init__(self, needed: int) -> None:
        super().__init__(needed)
        self.needed = needed


def joined(lines: Iterable[Ids]) -> Ids:
    """Tokens of lines one after the other."""
    return list(chain.from_iterable(lines))
