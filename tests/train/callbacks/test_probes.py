"""Probes: they can be solved, guessing scores what they say, and one forward pass scores what decoding would."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from andromeda.config.run import RunConfig
from andromeda.data.loader import open_stream
from andromeda.train.callbacks.probes import PROBE_TASKS, AnswerBatch, build_probes, ordinary_tokens
from andromeda.train.precision import build_precision
from andromeda.utils.errors import ConfigError

CPU = torch.device("cpu")
ALPHABET = range(1000, 1400)


@pytest.mark.parametrize("name", PROBE_TASKS)
def test_solver_scores_everything(name: str) -> None:
    draw = Random(1)
    problems = [PROBE_TASKS[name].draw(draw, ALPHABET) for _ in range(500)]
    assert all(PROBE_TASKS[name].solve(problem.prompt) == problem.answer for problem in problems)
    assert len({problem.prompt for problem in problems}) == 500


def digits(prompt: str, draw: Random) -> str:
    """The sum that most pairs of digits have."""
    return f" {9}"


def seen_value(prompt: str, draw: Random) -> str:
    """A digit that stands somewhere in the problem."""
    return f" {draw.choice(re.findall(r'= ([0-9])', prompt))}"


def recalled(prompt: tuple[int, ...], draw: Random) -> tuple[int, ...]:
    """One of the values."""
    return (draw.choice(prompt[1:-1:2]),)


def repeated(prompt: tuple[int, ...], draw: Random) -> tuple[int, ...]:
    """One of the sixteen tokens."""
    return (draw.choice(prompt[:16]),)


GUESSERS: dict[str, Callable[[Any, Random], Any]] = {
    "arithmetic": digits,
    "multihop": seen_value,
    "recall": recalled,
    "induction": repeated,
}


@pytest.mark.parametrize("name", PROBE_TASKS)
def test_guessing_scores_the_chance_level(name: str) -> None:
    """A guesser that knows the form of the answer, over 4,000 problems: within four standard deviations of `chance`."""
    draw, guess, n = Random(2), Random(3), 4000
    problems = [PROBE_TASKS[name].draw(draw, ALPHABET) for _ in range(n)]
    score = sum(GUESSERS[name](problem.prompt, guess) == problem.answer for problem in problems) / n
    chance = PROBE_TASKS[name].chance
    assert abs(score - chance) < 4 * math.sqrt(chance * (1 - chance) / n)


class Oracle(nn.Module):
    """A model whose next token is a fixed random function of all tokens so far, and right with a probability of 0.8."""

    def __init__(self, rows: list[tuple[list[int], list[int]]]) -> None:
        super().__init__()
        self._right = {tuple(prompt + answer[:i]): token for prompt, answer in rows for i, token in enumerate(answer)}

    def next(self, prefix: tuple[int, ...]) -> int:
        draw = Random(repr(prefix))
        return self._right[prefix] if prefix in self._right and draw.random() < 0.8 else draw.randrange(50)

    def hidden(self, ids: Tensor) -> Tensor:
        return torch.tensor([[[self.next(tuple(row[: t + 1]))] for t in range(len(row))] for row in ids.tolist()])

    def head(self, hidden: Tensor) -> Tensor:
        return nn.functional.one_hot(hidden[..., 0], 50).float()


@pytest.mark.parametrize("seed", range(5))
def test_one_pass_scores_what_greedy_decoding_would(seed: int) -> None:
    """Prompts and answers of different lengths; decoded token by token without looking at the answer."""
    draw = random.Random(seed)
    rows = [(draw.choices(range(50), k=draw.randint(1, 9)), draw.choices(range(50), k=draw.randint(1, 4))) for _ in range(40)]
    model = Oracle(rows)
    right = 0
    for prompt, answer in rows:
        decoded = tuple(prompt)
        for _ in answer:
            decoded += (model.next(decoded),)
        right += decoded[len(prompt) :] == tuple(answer)
    assert 0 < right < 40
    score = AnswerBatch(rows).score(model, build_precision("fp32", CPU))  # type: ignore[arg-type]
    assert float(score) == pytest.approx(right / 40)


def test_a_run_scores_the_same_problems_and_draws_nothing_global(tiny: Callable[..., RunConfig]) -> None:
    config = tiny(model__max_seq_len=160, train__seq_len=32, train__probes={"every": 1, "samples": 16})
    stream = open_stream(config.data, 32, config.seed)
    torch.manual_seed(0)
    random.seed(0)
    before = torch.get_rng_state(), random.getstate()
    first, second = build_probes(config, stream), build_probes(config, stream)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    for name in PROBE_TASKS:
        assert torch.equal(first._batches[name].ids, second._batches[name].ids)
    other = build_probes(config.model_copy(update={"seed": 1}), stream)
    assert not torch.equal(first._batches["recall"].ids, other._batches["recall"].ids)


def test_text_problems_read_as_text(tiny: Callable[..., RunConfig]) -> None:
    """Decoded by the tokenizer, prompt and answer are the problem, after the separator that begins a document."""
    config = tiny(model__max_seq_len=160, train__seq_len=32, train__probes={"every": 1, "samples": 3})
    stream = open_stream(config.data, 32, config.seed)
    assert stream.tokenizer is not None
    batch = build_probes(config, stream)._batches["arithmetic"]
    for ids, targets in zip(batch.ids.tolist(), batch.targets.tolist(), strict=True):
        asked = [i for i, target in enumerate(targets) if target != -100]
        assert ids[0] == stream.tokenizer.eos
        text = stream.tokenizer.decode(ids[1 : asked[0] + 1] + [targets[i] for i in asked])
        assert re.fullmatch(r"(\d \+ \d = \d+\n){4}\d \+ \d = \d+", text)
        assert all(eval(line.replace("=", "==")) for line in text.splitlines())


def test_only_ordinary_tokens_are_drawn(tiny: Callable[..., RunConfig]) -> None:
    stream = open_stream(tiny().data, 32, 0)
    assert stream.tokenizer is not None
    assert ordinary_tokens(stream) == [i for i in range(257) if i != stream.tokenizer.eos]


def test_text_probes_need_a_tokenizer(tiny: Callable[..., RunConfig]) -> None:
    bare: Any = SimpleNamespace(tokenizer=None, vocab_size=300)
    with pytest.raises(ConfigError, match=r"no tokenizer to spell text probes with: set train\.probes\.tasks to recall and induction"):
        build_probes(tiny(train__probes={"every": 1}), bare)
    build_probes(tiny(model__max_seq_len=64, train__probes={"every": 1, "tasks": ["recall", "induction"]}), bare)


@pytest.mark.slow
def test_a_trained_model_beats_chance_on_recall(tiny: Callable[..., RunConfig]) -> None:
    """With shifted tokens two layers learn associative recall when the text consists of it; the probe says so."""
    from andromeda.data.reasoning_tasks import AssociativeRecall
    from andromeda.model.transformer import Transformer

    config = tiny(model__max_seq_len=64, model__hidden_size=64, model__shift={"kind": "chunks"})
    model, draw = Transformer(config.model), Random(5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    batches = [
        AnswerBatch([(list(p.prompt), list(p.answer)) for p in (AssociativeRecall().draw(draw, range(64)) for _ in range(64))])
        for _ in range(600)
    ]
    for batch in batches[:-1]:
        logits = model(batch.ids)
        nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=-100).backward()
        optimizer.step()
        optimizer.zero_grad()
    precision = build_precision("fp32", CPU)
    assert float(batches[-1].score(Transformer(config.model), precision)) < 0.1
    assert float(batches[-1].score(model, precision)) > 3 * AssociativeRecall.chance
