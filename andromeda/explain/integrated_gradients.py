"""Integrated gradients (arXiv 1703.01365): which words of the text a logit rests on.

The way goes straight from a text of nothing but separators to the text, in the vectors that its tokens are looked up as: the
embedding, and the value embeddings where the model has them. Both ends are texts that the model can read, so that completeness
can be checked against two ordinary passes: the shares add up to the difference of the logits. (From zero vectors, as many take
the way, a model that normalizes its embedding sees a jump at the very beginning and the same text from then on.)

The integral is taken by Gauss-Legendre quadrature, whose steps double until the shares are complete to a tolerance.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from andromeda.explain.trace import hooked
from andromeda.model.transformer import Transformer
from andromeda.utils.errors import RequestError

TOLERANCE = 1e-3
"""Gap of completeness, as a share of all that is summed (the sizes of the shares), below which no more steps are taken."""
MIN_STEPS, MAX_STEPS = 16, 512
STEPS_PER_PASS = 16
"""Steps computed at once."""


@dataclass(frozen=True)
class TokenAttributions:
    """Shares of the tokens of one text in one logit."""

    shares: Tensor
    """(T,) in float64."""
    logit: float
    """With the text."""
    baseline: float
    """With nothing but separators."""
    steps: int
    """Of the quadrature."""

    @property
    def gap(self) -> float:
        """How far the shares are from adding up."""
        return abs(float(self.shares.sum()) - (self.logit - self.baseline))

    @property
    def allowed(self) -> float:
        """The gap that is tolerated. Shares of both signs can cancel, so that the difference of the logits is no measure of them."""
        return TOLERANCE * float(self.shares.abs().sum()) + 1e-9

    @property
    def complete(self) -> bool:
        """Whether they add up to the tolerance."""
        return self.gap <= self.allowed


def integrated_gradients(
    model: Transformer, ids: Tensor, position: int, target: int, baseline: Tensor, documents: Tensor | None = None
) -> TokenAttributions:
    """Shares of the tokens ids (1, T) in the logit of `target` at `position`. baseline (1, T): the text of nothing.

    Raises RequestError for a mixture of experts: routing jumps on the way, and a jump has no gradient.
    """
    if model.config.feedforward.kind == "moe":
        raise RequestError(
            "Integrated gradients need a model without jumps, and a mixture of experts sends a token to another expert at a "
            "jump that no gradient sees: look at its direct attribution instead."
        )
    with torch.no_grad():
        here, there = (float(model(x, documents=documents)[0, position, target]) for x in (ids, baseline))
        ends = [_inputs(model, x) for x in (baseline, ids)]
    steps = MIN_STEPS
    while True:
        shares = _integral(model, ids, position, target, ends, steps, documents)
        found = TokenAttributions(shares, here, there, steps)
        if found.complete or steps >= MAX_STEPS:
            return found
        steps *= 2


def _inputs(model: Transformer, ids: Tensor) -> list[Tensor]:
    """What ids (1, T) are looked up as: the embedding (1, T, C), and the value embeddings of each layer."""
    return [model.embedding.tokens(ids), *(v for v in model.value_embedding(ids) if v is not None)]


def _integral(
    model: Transformer, ids: Tensor, position: int, target: int, ends: list[list[Tensor]], steps: int, documents: Tensor | None
) -> Tensor:
    """Sum over the way of (input - baseline) times the gradient there, by token (T,)."""
    nodes, weights = (torch.from_numpy(x) for x in np.polynomial.legendre.leggauss(steps))
    way = [(low, high - low) for low, high in zip(*ends, strict=True)]
    shares = torch.zeros(ids.shape[1], dtype=torch.float64, device=ids.device)
    for at, share in zip(((nodes + 1) / 2).split(STEPS_PER_PASS), (weights / 2).split(STEPS_PER_PASS), strict=True):
        at, share = at.to(ids.device), share.to(ids.device)
        inputs = [(low + at.to(low).view(-1, *[1] * (low.ndim - 1)) * step).requires_grad_() for low, step in way]
        logits = _from_inputs(model, ids.expand(len(at), -1), inputs, documents)
        gradients = torch.autograd.grad(logits[:, position, target].sum(), inputs, allow_unused=True)
        for gradient, (_, step) in zip(gradients, way, strict=True):
            if gradient is not None:
                shares += ((gradient * step).flatten(2).sum(-1).double() * share[:, None]).sum(0)
    return shares.detach()


def _from_inputs(model: Transformer, ids: Tensor, inputs: list[Tensor], documents: Tensor | None) -> Tensor:
    """Logits (N, T, V) of the model when its tokens are looked up as `inputs`."""
    documents = None if documents is None else documents.expand(len(ids), -1)

    def values(module: Any, given: Any, output: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        left = iter(inputs[1:])
        return tuple(None if v is None else next(left) for v in output)

    with ExitStack() as hooks:
        hooks.enter_context(hooked(model.embedding.tokens, lambda *_: inputs[0]))
        hooks.enter_context(hooked(model.value_embedding, values))
        return model(ids, documents=documents)
