"""Each filter against transformers' own, the draw against exact probabilities, and the seeds."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from andromeda.generate import sampling
from andromeda.generate.generation_config import GenerationConfig
from andromeda.generate.sampling import Sampler

CPU = torch.device("cpu")


def random_logits(rows: int = 5, vocab: int = 97, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def same_distribution(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours.softmax(-1), theirs.softmax(-1), rtol=1e-12, atol=1e-15)
    assert torch.equal(ours.isneginf(), theirs.isneginf())


@pytest.mark.parametrize("temperature", [0.1, 0.7, 1.9])
def test_temperature_is_that_of_transformers(temperature: float) -> None:
    logits = random_logits()
    same_distribution(sampling.apply_temperature(logits, temperature), TemperatureLogitsWarper(temperature)(None, logits))


@pytest.mark.parametrize("k", [1, 2, 50, 97, 1000])
def test_top_k_is_that_of_transformers(k: int) -> None:
    logits = random_logits()
    logits[:, 7] = logits[:, 3]  # a tie
    same_distribution(sampling.top_k(logits, k), TopKLogitsWarper(k)(None, logits))


@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.9, 0.999])
def test_top_p_is_that_of_transformers(p: float) -> None:
    logits = random_logits()
    same_distribution(sampling.top_p(logits, p), TopPLogitsWarper(p)(None, logits))


def test_top_p_after_top_k_is_that_of_transformers() -> None:
    logits = TopKLogitsWarper(10)(None, random_logits())
    same_distribution(sampling.top_p(logits, 0.8), TopPLogitsWarper(0.8)(None, logits))


@pytest.mark.parametrize("share", [1e-3, 0.05, 0.5, 1.0])
def test_min_p_is_that_of_transformers(share: float) -> None:
    logits = random_logits()
    same_distribution(sampling.min_p(logits, share), MinPLogitsWarper(share)(None, logits))


@pytest.mark.parametrize("penalty", [0.5, 1.3, 3.0])
def test_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    logits, ids = random_logits(), torch.randint(0, 97, (5, 30), generator=torch.Generator().manual_seed(1))
    seen = torch.zeros(5, 97, dtype=torch.bool).scatter_(1, ids, True)
    ours = sampling.penalize_repetition(logits, seen, penalty)
    torch.testing.assert_close(ours, RepetitionPenaltyLogitsProcessor(penalty)(ids, logits.clone()), rtol=0, atol=0)


def test_the_whole_chain_is_that_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order matters: what reaches the draw is what transformers' list of processors makes of the same logits."""
    settings = GenerationConfig(temperature=0.7, top_k=20, top_p=0.8, min_p=0.02, repetition_penalty=1.4)
    theirs = LogitsProcessorList(
        [
            RepetitionPenaltyLogitsProcessor(1.4),
            TemperatureLogitsWarper(0.7),
            TopKLogitsWarper(20),
            TopPLogitsWarper(0.8),
            MinPLogitsWarper(0.02),
        ]
    )
    reached: list[torch.Tensor] = []
    real_sample = sampling.sample
    monkeypatch.setattr(sampling, "sample", lambda logits, uniform: (reached.append(logits), real_sample(logits, uniform))[1])
    prompts = [[1, 2, 3], [90, 4], [5]]
    sampler = Sampler(settings, prompts, [0, 1, 2], 97, CPU)
    for step in range(4):
        logits = random_logits(3, seed=step)
        ids = sampler(logits)
        for row, prompt in enumerate(prompts):
            expected = theirs(torch.tensor([prompt]), logits[row : row + 1].clone())
            same_distribution(reached[-1][row : row + 1], expected)
            prompt.append(int(ids[row]))


@pytest.mark.parametrize("temperature", [1e-310, 1e-40, 1e300])
def test_extreme_temperatures_stay_probabilities(temperature: float) -> None:
    probability = sampling.apply_temperature(random_logits(), temperature).softmax(-1)
    torch.testing.assert_close(probability.sum(-1), torch.ones(5, dtype=torch.float64))
    wanted = 1.0 if temperature < 1 else 1 / 97
    torch.testing.assert_close(probability.amax(-1), torch.full((5,), wanted, dtype=torch.float64))


def test_drawn_frequencies_pass_a_chi_square_test() -> None:
    """30,000 draws from 12 tokens; the statistic's 99.9 % quantile at 11 degrees of freedom is 31.3."""
    draws, logits = 30_000, random_logits(1, 12)
    uniform = torch.rand(draws, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    counts = sampling.sample(logits.expand(draws, -1), uniform).bincount(minlength=12)
    expected = draws * logits[0].softmax(-1)
    assert ((counts - expected) ** 2 / expected).sum() < 31.3


@given(st.floats(0, 1, exclude_max=True), st.integers(0, 10_000))
def test_what_is_excluded_is_never_drawn(uniform: float, seed: int) -> None:
    logits = sampling.top_k(random_logits(1, 40, seed), 3)
    drawn = int(sampling.sample(logits, torch.tensor([uniform], dtype=torch.float64)))
    assert logits[0, drawn] > -math.inf


def test_draw_inverts_the_cumulative_distribution() -> None:
    logits = torch.tensor([[0.2, 0.0, 0.5, 0.3]], dtype=torch.float64).log()
    edges = torch.tensor([0.0, 0.1999, 0.2001, 0.6999, 0.7001, 1 - 2**-53], dtype=torch.float64)
    assert sampling.sample(logits.expand(6, -1), edges).tolist() == [0, 0, 2, 2, 3, 3]


def test_zero_temperature_takes_the_likeliest_whatever_else_is_set() -> None:
    logits = random_logits()
    sampler = Sampler(GenerationConfig(temperature=0, top_k=3, top_p=0.1), [[0]] * 5, range(5), 97, CPU)
    assert torch.equal(sampler(logits), logits.argmax(-1))


def tokens(sampler: Sampler, rows: int, steps: int = 20) -> list[list[int]]:
    return torch.stack([sampler(random_logits(1, 50, step).expand(rows, -1)) for step in range(steps)], 1).tolist()


def test_a_sequence_draws_the_same_in_any_company() -> None:
    """Equal seeds draw alike, whatever row they stand in and whoever leaves the batch; other seeds draw otherwise."""
    settings = GenerationConfig(temperature=1.0, top_k=0)
    alone = tokens(Sampler(settings, [[1]], [7], 50, CPU), 1)[0]
    company = Sampler(settings, [[1]] * 3, [8, 7, 7], 50, CPU)
    first = tokens(company, 3, 10)
    company.keep(torch.tensor([2]))
    later = torch.stack([company(random_logits(1, 50, step)) for step in range(10, 20)], 1).tolist()
    assert first[1] == first[2] == alone[:10]
    assert later == [alone[10:]]
    assert first[0] != alone[:10]


def test_the_penalty_follows_the_sequences_that_stay() -> None:
    sampler = Sampler(GenerationConfig(temperature=0, repetition_penalty=100.0), [[0], [1], [2]], [0, 0, 0], 4, CPU)
    sampler.keep(torch.tensor([2]))
    logits = torch.tensor([[1.0, 2.0, 3.0, 0.5]])
    assert [int(sampler(logits)) for _ in range(3)] == [1, 0, 3]
