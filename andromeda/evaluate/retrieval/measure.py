"""Retrieval measured: accuracy by the length of the prompt and by the depth of the evidence.

Two scores. *accuracy*: which of the possible answers does the model find likeliest? For each answer in turn, given the right
ones before it, the likeliest candidate must be one of the answers that are still missing; chance is known exactly.
*match*: RULER's score, the share of the answers that the greedy continuation holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import torch

from andromeda.data.tokenizer import Tokenizer
from andromeda.evaluate.retrieval.problem import Problem, Task
from andromeda.evaluate.retrieval.prompt import TooShort, build_prompt, joined
from andromeda.evaluate.retrieval.style import Style
from andromeda.evaluate.score import Prompts, rows_at_once
from andromeda.generate.engine import eval_mode
from andromeda.model.transformer import Transformer
from andromeda.utils.errors import RequestError
from andromeda.utils.progress_callback import ProgressCallback, no_progress

SPARE = 4
"""Tokens that a greedy answer may be longer than the right one."""


@dataclass(frozen=True)
class Cell:
    """Scores at one length and depth."""

    accuracy: float
    match: float


@dataclass(frozen=True)
class Asked:
    """A problem as tokens."""

    prompt: list[int]
    slots: list[tuple[list[int], list[list[int]], int]]
    """For each answer: the tokens of those before it, the candidates, and how many of the first candidates are right."""
    whole: int
    """Tokens of all answers."""
    answers: tuple[str, ...]


def room(task: Task, style: Style) -> int:
    """Tokens to keep free for the answers: no tokenizer needs more tokens than bytes."""
    unit = 7 + max(len(style.lead), len(style.comma))
    return task.answers * unit + SPARE


def build(task: Task, style: Style, tokenizer: Tokenizer, length: int, depth: float, random: Random) -> Asked:
    """A problem that takes `length` tokens with its answers. Raises RequestError when it does not fit."""
    problem = task.draw(random, style)
    free = room(task, style)
    try:
        prompt = build_prompt(task, problem, style, tokenizer, length - free, depth, random)
    except TooShort as error:
        raise RequestError(
            f"A length of {length} tokens is too short for {task.name}, which takes {error.needed + free} with this tokenizer."
        ) from None
    spelt = [tokenizer.encode((style.comma if i else style.lead) + answer) for i, answer in enumerate(problem.answers)]
    slots = [(joined(spelt[:j]), _candidates(problem, j, style, tokenizer), len(problem.answers) - j) for j in range(len(spelt))]
    return Asked(prompt, slots, sum(map(len, spelt)), problem.answers)


def _candidates(problem: Problem, slot: int, style: Style, tokenizer: Tokenizer) -> list[list[int]]:
    """What may stand in a slot: the answers that are missing, then the wrong ones."""
    before = style.comma if slot else style.lead
    return tokenizer.encode_batch([before + answer for answer in (*problem.answers[slot:], *problem.others)])


def measure(model: Transformer, tokenizer: Tokenizer, problems: Sequence[Asked]) -> Cell:
    """Score problems of equal length, as many at once as fit."""
    batch = rows_at_once(model, len(problems[0].prompt))
    hits, matches = 0.0, 0.0
    for start in range(0, len(problems), batch):
        group = problems[start : start + batch]
        prompts = Prompts(model, torch.tensor([asked.prompt for asked in group]), max(asked.whole for asked in group) + 2 * SPARE)
        for slot in range(len(group[0].slots)):
            hits += ranked(prompts, [asked.slots[slot] for asked in group]) / len(group[0].slots)
        written = prompts.greedy(max(asked.whole for asked in group) + SPARE, tokenizer.vocab_size)
        for asked, ids in zip(group, written, strict=True):
            text = tokenizer.decode(ids)
            matches += sum(answer in text for answer in asked.answers) / len(asked.answers)
    return Cell(hits / len(problems), matches / len(problems))


def ranked(prompts: Prompts, slots: Sequence[tuple[list[int], list[list[int]], int]]) -> int:
    """In how many problems the likeliest candidate is a right one."""
    losses = []
    for number in range(len(slots[0][1])):
        continuations = [before + candidates[number] for before, candidates, _ in slots]
        losses.append(prompts.nats(continuations, [len(before) for before, _, _ in slots]))
    best = torch.stack(losses).argmin(0)
    return int((best < slots[0][2]).sum())


def grid(
    model: Transformer,
    tokenizer: Tokenizer,
    task: Task,
    style: Style,
    *,
    lengths: Sequence[int],
    depths: Sequence[float],
    samples: int,
    seed: int,
    report: ProgressCallback = no_progress,
) -> list[list[Cell]]:
    """Scores by length and depth. Raises RequestError for a length that is too short."""
    found: list[list[Cell]] = []
    with eval_mode(model):
        for row, length in enumerate(lengths):
            found.append([])
            for column, depth in enumerate(depths):
                draws = [Random(f"{seed} {task.name} {length} {depth} {i}") for i in range(samples)]
                problems = [build(task, style, tokenizer, length, depth, random) for random in draws]
                found[-1].append(measure(model, tokenizer, problems))
                report(task.name, row * len(depths) + column + 1, len(lengths) * len(depths))
    return found
