"""Retrieval problems as prompts of an exact number of tokens, and a model's scores on them.

Lines are encoded one by one, so that lengths add up; the text that the tokens spell is the same. What is missing to the exact
length is noise, of which the first line loses its beginning.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, cycle
from random import Random

import torch

from andromeda.data.tokenizer import Tokenizer
from andromeda.evaluate.retrieval_problems import PromptStyle, RetrievalProblem, RetrievalTask, WordExtraction
from andromeda.evaluate.token_loss import PromptCache, batch_size_for
from andromeda.generate.engine import eval_mode
from andromeda.model.transformer import Transformer
from andromeda.utils.errors import RequestError
from andromeda.utils.progress_callback import ProgressCallback, no_progress

Ids = list[int]


def build_prompt(
    task: RetrievalTask, problem: RetrievalProblem, style: PromptStyle, tokenizer: Tokenizer, length: int, depth: float, random: Random
) -> Ids:
    """The prompt, `length` tokens: the separator, the text, the question. depth: where the evidence begins, 0 to 1.

    Raises PromptTooLong when it does not fit.
    """
    if isinstance(task, WordExtraction):
        return _list(task, problem, style, tokenizer, length, random)
    head, tail = [tokenizer.bos, *tokenizer.encode_start(style.header)], tokenizer.encode(problem.question)
    evidence, distractors = (tokenizer.encode_batch(lines) for lines in (problem.evidence, problem.distractors))
    needed = sum(map(len, [head, tail, *evidence, *distractors]))
    if needed > length:
        raise PromptTooLong(needed)
    noise = _noise(problem.noise or cycle(style.noise), tokenizer, length - needed)
    return head + flatten(_hidden(noise, evidence, distractors, depth, random)) + tail


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


def _list(task: WordExtraction, problem: RetrievalProblem, style: PromptStyle, tokenizer: Tokenizer, length: int, random: Random) -> Ids:
    """A list of words that fills the prompt."""
    head = [tokenizer.bos, *tokenizer.encode_start(style.list_header)]
    tail = tokenizer.encode(style.list_end) + tokenizer.encode(problem.question)
    room = length - len(head) - len(tail)
    spelt = tokenizer.encode_batch([f" {word}" for word in problem.words])

    def tokens(size: int) -> int:
        return sum(count * len(word) for count, word in zip(task.counts(size), spelt, strict=False))

    if tokens(0) > room:
        raise PromptTooLong(length - room + tokens(0))
    low, high = 0, room + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if tokens(middle) <= room else (low, middle)
    listed = [word for count, word in zip(task.counts(low), spelt, strict=False) for _ in range(count)]
    random.shuffle(listed)
    return head + flatten(_noise(cycle(style.noise), tokenizer, room - tokens(low))) + flatten(listed) + tail


class PromptTooLong(Exception):
    """The problem takes more tokens than there are."""

    def __init__(self, needed: int) -> None:
        super().__init__(needed)
        self.needed = needed


def flatten(lines: Iterable[Ids]) -> Ids:
    """Tokens of lines one after the other."""
    return list(chain.from_iterable(lines))


EXTRA_TOKENS = 4
"""Tokens that a greedy answer may be longer than the right one."""


@dataclass(frozen=True)
class RetrievalScore:
    """Scores at one length and depth."""

    accuracy: float
    match: float


@dataclass(frozen=True)
class TokenizedProblem:
    """A problem as tokens."""

    prompt: list[int]
    slots: list[tuple[list[int], list[list[int]], int]]
    """For each answer: the tokens of those before it, the candidates, and how many of the first candidates are right."""
    whole: int
    """Tokens of all answers."""
    answers: tuple[str, ...]


def answer_budget(task: RetrievalTask, style: PromptStyle) -> int:
    """Tokens to keep free for the answers: no tokenizer needs more tokens than bytes."""
    unit = 7 + max(len(style.lead), len(style.comma))
    return task.answers * unit + EXTRA_TOKENS


def tokenize_problem(
    task: RetrievalTask, style: PromptStyle, tokenizer: Tokenizer, length: int, depth: float, random: Random
) -> TokenizedProblem:
    """A problem that takes `length` tokens with its answers. Raises RequestError when it does not fit."""
    problem = task.draw(random, style)
    free = answer_budget(task, style)
    try:
        prompt = build_prompt(task, problem, style, tokenizer, length - free, depth, random)
    except PromptTooLong as error:
        raise RequestError(
            f"A length of {length} tokens is too short for {task.name}, which takes {error.needed + free} with this tokenizer."
        ) from None
    spelt = [tokenizer.encode((style.comma if i else style.lead) + answer) for i, answer in enumerate(problem.answers)]
    slots = [(flatten(spelt[:j]), _candidates(problem, j, style, tokenizer), len(problem.answers) - j) for j in range(len(spelt))]
    return TokenizedProblem(prompt, slots, sum(map(len, spelt)), problem.answers)


def _candidates(problem: RetrievalProblem, slot: int, style: PromptStyle, tokenizer: Tokenizer) -> list[list[int]]:
    """What may stand in a slot: the answers that are missing, then the wrong ones."""
    before = style.comma if slot else style.lead
    return tokenizer.encode_batch([before + answer for answer in (*problem.answers[slot:], *problem.others)])


def score_problems(model: Transformer, tokenizer: Tokenizer, problems: Sequence[TokenizedProblem]) -> RetrievalScore:
    """Score problems of equal length, as many at once as fit."""
    batch = batch_size_for(model, len(problems[0].prompt))
    hits, matches = 0.0, 0.0
    for start in range(0, len(problems), batch):
        group = problems[start : start + batch]
        prompts = PromptCache(
            model, torch.tensor([asked.prompt for asked in group]), max(asked.whole for asked in group) + 2 * EXTRA_TOKENS
        )
        for slot in range(len(group[0].slots)):
            hits += count_correct(prompts, [asked.slots[slot] for asked in group]) / len(group[0].slots)
        written = prompts.greedy(max(asked.whole for asked in group) + EXTRA_TOKENS, tokenizer.vocab_size)
        for asked, ids in zip(group, written, strict=True):
            text = tokenizer.decode(ids)
            matches += sum(answer in text for answer in asked.answers) / len(asked.answers)
    return RetrievalScore(hits / len(problems), matches / len(problems))


def count_correct(prompts: PromptCache, slots: Sequence[tuple[list[int], list[list[int]], int]]) -> int:
    """In how many problems the most likely candidate is a right one."""
    losses = []
    for number in range(len(slots[0][1])):
        continuations = [before + candidates[number] for before, candidates, _ in slots]
        losses.append(prompts.nats(continuations, [len(before) for before, _, _ in slots]))
    best = torch.stack(losses).argmin(0)
    return int((best < slots[0][2]).sum())


def score_grid(
    model: Transformer,
    tokenizer: Tokenizer,
    task: RetrievalTask,
    style: PromptStyle,
    *,
    lengths: Sequence[int],
    depths: Sequence[float],
    samples: int,
    seed: int,
    report: ProgressCallback = no_progress,
) -> list[list[RetrievalScore]]:
    """Scores by length and depth. Raises RequestError for a length that is too short."""
    found: list[list[RetrievalScore]] = []
    with eval_mode(model):
        for row, length in enumerate(lengths):
            found.append([])
            for column, depth in enumerate(depths):
                draws = [Random(f"{seed} {task.name} {length} {depth} {i}") for i in range(samples)]
                problems = [tokenize_problem(task, style, tokenizer, length, depth, random) for random in draws]
                found[-1].append(score_problems(model, tokenizer, problems))
                report(task.name, row * len(depths) + column + 1, len(lengths) * len(depths))
    return found
