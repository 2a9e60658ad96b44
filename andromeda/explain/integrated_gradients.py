"""Integrated gradients (arXiv 1703.01365): attribution of a logit to the input tokens.

The path is straight from a text of end-of-text tokens to the text, in the looked-up vectors: the embedding, and the value embeddings
if the model has them. Both ends are texts that the model can read, so that completeness can be checked against two ordinary
passes: the attributions add up to the difference of the logits. (From zero vectors, a common baseline, a model that normalizes
its embedding sees a jump at the start and the same text along the rest of the path.)

The integral uses Gauss-Legendre quadrature; steps double until the attributions are complete to a tolerance.
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
"""Completeness gap, as a fraction of the sum of absolute attributions, below which no more steps are taken."""
MIN_STEPS, MAX_STEPS = 16, 512
STEPS_PER_PASS = 16
"""Quadrature steps per forward pass."""


@dataclass(frozen=True)
class TokenAttributions:
    """Attributions of one logit to the tokens of a text."""

    shares: Tensor
    """(T,) in float64."""
    logit: float
    """Logit with the text."""
    baseline: float
    """Logit with end-of-text tokens only."""
    steps: int
    """Quadrature steps."""

    @property
    def gap(self) -> float:
        """Difference between the sum of attributions and the difference of logits."""
        return abs(float(self.shares.sum()) - (self.logit - self.baseline))

    @property
    def allowed(self) -> float:
        """Tolerated gap. Relative to absolute attributions, since those of both signs can cancel in the difference of logits."""
        return TOLERANCE * float(self.shares.abs().sum()) + 1e-9

    @property
    def complete(self) -> bool:
        """Whether the gap is within the tolerance."""
        return self.gap <= self.allowed


def integrated_gradients(
    model: Transformer, ids: Tensor, position: int, target: int, baseline: Tensor, documents: Tensor | None = None
) -> TokenAttributions:
    """Attributions of the logit of `target` at `position` to ids (1, T). baseline (1, T): the text at the start of the path.

    Raises RequestError for a mixture of experts: routing is discontinuous along the path.
    """
    if model.config.feedforward.kind == "moe":
        raise RequestError(
            "Integrated gradients need a continuous model, and the routing of a mixture of experts is discontinuous: "
            "use the direct attribution instead."
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
    """Looked-up vectors of ids (1, T): the embedding (1, T, C), and the value embeddings of each layer."""
    return [model.embedding.tokens(ids), *(v for v in model.value_embedding(ids) if v is not None)]


def _integral(
    model: Transformer, ids: Tensor, position: int, target: int, ends: list[list[Tensor]], steps: int, documents: Tensor | None
) -> Tensor:
    """Integral along the path of (input - baseline) times the gradient, by token (T,)."""
    nodes, weights = (torch.from_numpy(x) for x in np.polynomial.legendre.leggauss(steps))
    path = [(low, high - low) for low, high in zip(*ends, strict=True)]
    shares = torch.zeros(ids.shape[1], dtype=torch.float64, device=ids.device)
    for at, share in zip(((nodes + 1) / 2).split(STEPS_PER_PASS), (weights / 2).split(STEPS_PER_PASS), strict=True):
        at, share = at.to(ids.device), share.to(ids.device)
        inputs = [(low + at.to(low).view(-1, *[1] * (low.ndim - 1)) * step).requires_grad_() for low, step in path]
        logits = _from_inputs(model, ids.expand(len(at), -1), inputs, documents)
        gradients = torch.autograd.grad(logits[:, position, target].sum(), inputs, allow_unused=True)
        for gradient, (_, step) in zip(gradients, path, strict=True):
            if gradient is not None:
                shares += ((gradient * step).flatten(2).sum(-1).double() * share[:, None]).sum(0)
    return shares.detach()


def _from_inputs(model: Transformer, ids: Tensor, inputs: list[Tensor], documents: Tensor | None) -> Tensor:
    """Logits (N, T, V) of the model with `inputs` in place of the looked-up vectors."""
    documents = None if documents is None else documents.expand(len(ids), -1)

    def values(module: Any, given: Any, output: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        left = iter(inputs[1:])
        return tuple(None if v is None else next(left) for v in output)

    with ExitStack() as hooks:
        hooks.enter_context(hooked(model.embedding.tokens, lambda *_: inputs[0]))
        hooks.enter_context(hooked(model.value_embedding, values))
        logits: Tensor = model(ids, documents=documents)
        return logits
