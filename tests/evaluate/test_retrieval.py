"""Tasks of retrieval: exact lengths with every tokenizer, solvers at 100 %, chance by enumeration, depths where they are said to be."""

from __future__ import annotations

import itertools
from functools import cache
from random import Random

import pytest
import torch
from torch import Tensor

from andromeda.config.data import BuildConfig
from andromeda.config.model import AttentionConfig, ModelConfig, RotaryConfig
from andromeda.data.tokenizer import Tokenizer, train_tokenizer
from andromeda.evaluate.retrieval_problems import RETRIEVAL_TASKS, STYLES, chance_accuracy
from andromeda.evaluate.retrieval_scoring import (
    TokenizedProblem,
    answer_budget,
    count_correct,
    score_grid,
    score_problems,
    tokenize_problem,
)
from andromeda.evaluate.token_loss import PromptCache
from andromeda.model.transformer import Transformer
from andromeda.utils.errors import RequestError

TEXT = ["The secret number of the day is blue, and the sun is warm.", "def f(x):\n    return x + 1234\n"] * 40


@cache
def tokenizer(kind: str) -> Tokenizer:
    return train_tokenizer(TEXT, BuildConfig(tokenizer=kind, vocab_size={"bytes": 257, "bpe": 300, "unigram": 290}[kind]))


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("kind", ["bytes", "bpe", "unigram"])
@pytest.mark.parametrize("name", RETRIEVAL_TASKS)
def test_prompts_have_their_exact_length_and_the_solver_finds_every_answer(name: str, kind: str, style: str) -> None:
    task, words = RETRIEVAL_TASKS[name], tokenizer(kind)
    for length in (1800, 3001):
        for depth in (0.0, 0.3, 1.0):
            for seed in range(3):
                asked = tokenize_problem(task, STYLES[style], words, length, depth, Random(seed))
                assert len(asked.prompt) == length - answer_budget(task, STYLES[style])
                assert len(asked.prompt) + asked.whole <= length
                assert asked.prompt[0] == words.eos
                text = words.decode(asked.prompt)
                assert sorted(task.solve(text, STYLES[style])) == sorted(asked.answers)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", RETRIEVAL_TASKS)
def test_without_the_text_the_solver_finds_nothing(name: str, style: str) -> None:
    """Only the question, as after an empty context."""
    task = RETRIEVAL_TASKS[name]
    for seed in range(5):
        problem = task.draw(Random(seed), STYLES[style])
        found = task.solve(STYLES[style].header + "\n" + problem.question, STYLES[style])
        assert not set(found) & set(problem.answers)


@pytest.mark.parametrize("name", [name for name, task in RETRIEVAL_TASKS.items() if not task.everywhere])
def test_the_evidence_begins_at_its_depth(name: str) -> None:
    task, style, words = RETRIEVAL_TASKS[name], STYLES["prose"], tokenizer("bytes")
    for depth in (0.0, 0.25, 0.5, 0.75, 1.0):
        for seed in range(4):
            asked = tokenize_problem(task, style, words, 12000, depth, Random(seed))
            problem = task.draw(Random(seed), style)
            text = words.decode(asked.prompt)
            place = text.index(problem.evidence[0]) / len(text)
            # The question, the header and the other evidence take their share of the text.
            assert abs(place - depth) < 0.12
            places = [text.index(line) for line in problem.evidence]
            assert places == sorted(places)


@pytest.mark.parametrize("name", RETRIEVAL_TASKS)
def test_chance_is_the_share_of_all_rankings(name: str) -> None:
    """Every order of the candidates is equally likely to one who does not know the text; count the slots that are hit."""
    task = RETRIEVAL_TASKS[name]
    slots = []
    for j in range(task.answers):
        candidates = [True] * (task.answers - j) + [False] * task.others
        firsts = [order[0] for order in itertools.permutations(range(len(candidates)), 1)]
        slots.append(sum(candidates[first] for first in firsts) / len(firsts))
    assert chance_accuracy(task.answers, task.others) == pytest.approx(sum(slots) / len(slots), abs=1e-12)


def model_of_bytes() -> Transformer:
    config = ModelConfig(
        vocab_size=257,
        max_seq_len=4096,
        hidden_size=16,
        num_layers=2,
        rotary=RotaryConfig(kind="rope"),
        attention=AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=8),
    )
    return Transformer(config, seed=3).double().eval()


def test_an_untrained_model_scores_chance() -> None:
    """Its losses do not depend on which candidates are right, so that the mean over problems is chance to within four deviations."""
    task, samples = RETRIEVAL_TASKS["single"], 150
    cells = score_grid(
        model_of_bytes(), tokenizer("bytes"), task, STYLES["code"], lengths=[300], depths=[0.0, 1.0], samples=samples, seed=0
    )
    accuracy = sum(cell.accuracy for cell in cells[0]) / 2
    expected = chance_accuracy(task.answers, task.others)
    assert abs(accuracy - expected) < 4 * (expected * (1 - expected) / (2 * samples)) ** 0.5


class Oracle(PromptCache):
    """A reader of the text instead of a model: no loss for the right answers, in their order, and writes them."""

    def __init__(self, answers: list[str], wrong: bool = False) -> None:
        self._answers, self._wrong = answers, wrong

    def nats(self, continuations: list[list[int]], skip: list[int]) -> Tensor:  # type: ignore[override]
        words = tokenizer("bytes")
        said = [words.decode(ids[count:]) for ids, count in zip(continuations, skip, strict=True)]
        hit = [any(answer in text for answer in self._answers) for text in said]
        return torch.tensor([float(h == self._wrong) for h in hit])


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", RETRIEVAL_TASKS)
def test_the_solver_scores_all_of_the_ranking_and_its_opposite_none(name: str, style: str) -> None:
    task, words = RETRIEVAL_TASKS[name], tokenizer("bytes")
    asked: TokenizedProblem = tokenize_problem(task, STYLES[style], words, 1800, 0.5, Random(0))
    solved = task.solve(words.decode(asked.prompt), STYLES[style])
    for slot in asked.slots:
        assert count_correct(Oracle(solved), [slot]) == 1
        assert count_correct(Oracle(solved, wrong=True), [slot]) == 0


def test_scores_do_not_depend_on_the_batch_or_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    task, style, words, model = RETRIEVAL_TASKS["multiquery"], STYLES["code"], tokenizer("bytes"), model_of_bytes()
    problems = [tokenize_problem(task, style, words, 800, 0.5, Random(i)) for i in range(4)]
    whole = score_problems(model, words, problems)
    monkeypatch.setattr("andromeda.evaluate.token_loss.CHUNK", {"cpu": 37})
    monkeypatch.setattr("andromeda.evaluate.token_loss.BATCH_TOKENS", {"cpu": 1000})
    assert score_problems(model, words, problems) == whole


def test_a_length_without_room_is_a_sentence_with_the_least_one() -> None:
    with pytest.raises(RequestError, match=r"100 tokens is too short for multikey, which takes \d+ with this tokenizer"):
        tokenize_problem(RETRIEVAL_TASKS["multikey"], STYLES["prose"], tokenizer("bytes"), 100, 0.5, Random(0))
