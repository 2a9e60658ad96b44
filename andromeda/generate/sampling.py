"""From logits to tokens: pure functions on logits (B, V), and the order in which they are applied.

Order: repetition penalty, temperature, top-k, top-p, min-p, draw. A filter sets what it excludes to minus infinity and
never excludes the most likely token. Filters that are off are left out when the sampler is built.

Shapes: B batch, V vocabulary size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from andromeda.generate.generation_config import GenerationConfig

EXCLUDED = float("-inf")


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Tokens that `seen` (B, V) marks: positive logits divided by the penalty, negative ones multiplied (arXiv 1909.05858, 4.1)."""
    penalized = torch.where(logits > 0, logits / penalty, logits * penalty)
    # Finite, or a penalty near the ends of the range would leave no distribution.
    limits = torch.finfo(logits.dtype)
    return torch.where(seen, penalized.clamp(limits.min, limits.max), logits)


def apply_temperature(logits: Tensor, temperature: float) -> Tensor:
    """Logits over the temperature (> 0), shifted so that the largest is 0 and nothing overflows."""
    return (logits - logits.amax(-1, keepdim=True)) / temperature


def top_k(logits: Tensor, k: int) -> Tensor:
    """The k largest logits; those equal to the k-th stay too."""
    kth = logits.topk(min(k, logits.shape[-1])).values[:, -1:]
    return logits.masked_fill(logits < kth, EXCLUDED)


def top_p(logits: Tensor, p: float) -> Tensor:
    """The smallest set of most likely tokens whose probability reaches p (arXiv 1904.09751, 3.1)."""
    ordered, order = logits.sort(descending=True, stable=True)
    probability = ordered.softmax(-1)
    # A token goes when those before it already reach p; the first has none before it.
    reached = probability.cumsum(-1) - probability >= p
    reached[:, 0] = False
    return logits.masked_fill(torch.empty_like(reached).scatter_(-1, order, reached), EXCLUDED)


def min_p(logits: Tensor, share: float) -> Tensor:
    """Tokens with at least `share` times the probability of the most likely one (arXiv 2407.01082)."""
    probability = logits.softmax(-1)
    return logits.masked_fill(probability < share * probability.amax(-1, keepdim=True), EXCLUDED)


def greedy(logits: Tensor, uniform: Tensor) -> Tensor:
    """The most likely token (B,), independent of `uniform`."""
    return logits.argmax(-1)


def sample(logits: Tensor, uniform: Tensor) -> Tensor:
    """A token (B,) by its probability: where the cumulative distribution passes `uniform` (B,) in [0, 1).

    One number a token, drawn elsewhere, so that a sequence's text depends neither on its neighbors nor on the device.
    """
    cumulative = logits.softmax(-1).cumsum(-1)
    target = uniform[:, None].to(cumulative) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1).clamp(max=logits.shape[-1] - 1)


def logits_processors(settings: GenerationConfig) -> list[Callable[[Tensor], Tensor]]:
    """The filters between penalty and draw that the settings enable, in order. Greedy decoding needs none."""
    if settings.temperature == 0:
        return []
    steps = [
        (settings.temperature != 1, partial(apply_temperature, temperature=settings.temperature)),
        (settings.top_k > 0, partial(top_k, k=settings.top_k)),
        (settings.top_p < 1, partial(top_p, p=settings.top_p)),
        (settings.min_p > 0, partial(min_p, share=settings.min_p)),
    ]
    return [step for on, step in steps if on]


class NoRepetitionPenalty:
    """Tokens may repeat freely."""

    def __call__(self, logits: Tensor) -> Tensor:
        """Logits (B, V) as they came."""
        return logits

    def note(self, ids: Tensor) -> None:
        """Nothing to remember."""

    def keep(self, rows: Tensor) -> None:
        """Nothing to drop."""


class RepetitionPenalty(NoRepetitionPenalty):
    """Remembers which tokens each sequence holds, its prompt included, and penalizes them."""

    def __init__(self, penalty: float, prompts: Sequence[Sequence[int]], vocab: int, device: torch.device) -> None:
        self._penalty = penalty
        self._seen = torch.zeros(len(prompts), vocab, dtype=torch.bool)
        for seen, prompt in zip(self._seen, prompts, strict=True):
            # A prompt of ids may hold some of a padded vocabulary that the tokenizer does not have, which are never sampled.
            seen[[token for token in prompt if token < vocab]] = True
        self._seen = self._seen.to(device)

    def __call__(self, logits: Tensor) -> Tensor:
        """Logits (B, V) with the penalty."""
        return penalize_repetition(logits, self._seen, self._penalty)

    def note(self, ids: Tensor) -> None:
        """Tokens (B,) that were chosen."""
        self._seen.scatter_(-1, ids[:, None], True)

    def keep(self, rows: Tensor) -> None:
        """Keep only the sequences at the indices `rows`."""
        self._seen = self._seen[rows]


class Sampler:
    """Samples the next token of every sequence of a batch, each with its own seeded random generator."""

    def __init__(
        self, settings: GenerationConfig, prompts: Sequence[Sequence[int]], seeds: Sequence[int], vocab: int, device: torch.device
    ) -> None:
        off = settings.repetition_penalty == 1
        self._penalty = NoRepetitionPenalty() if off else RepetitionPenalty(settings.repetition_penalty, prompts, vocab, device)
        self._steps = logits_processors(settings)
        self._choose = sample if settings.temperature else greedy
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, logits: Tensor) -> Tensor:
        """Next tokens (B,) for logits (B, V), computed in float64."""
        logits = self._penalty(logits.double())
        for step in self._steps:
            logits = step(logits)
        # Drawn on the CPU, so that a seed gives the same numbers on every device.
        uniform = torch.stack([torch.rand((), generator=generator, dtype=torch.float64) for generator in self._generators])
        ids = self._choose(logits, uniform.to(logits.device))
        self._penalty.note(ids)
        return ids

    def keep(self, rows: Tensor) -> None:
        """Keep only the sequences at the indices `rows`."""
        self._penalty.keep(rows)
        self._generators = [self._generators[row] for row in rows.tolist()]
