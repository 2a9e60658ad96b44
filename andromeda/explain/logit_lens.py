"""The logit lens (nostalgebraist, 2020): what the model would say if it stopped after each layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from andromeda.explain.trace import Trace
from andromeda.model.transformer import Transformer


@dataclass(frozen=True)
class Lens:
    """For the embedding and after each of L layers; N = L + 1, K likeliest tokens."""

    tokens: Tensor
    """(N, T, K), the likeliest first."""
    probabilities: Tensor
    """(N, T, K)."""
    target: Tensor
    """(N, T): probability of the target token."""
    entropy: Tensor
    """(N, T) in bits."""
    error: float
    """Largest difference between the logits of the last layer and the model's."""


@torch.no_grad()
def lens(model: Transformer, seen: Trace, target: int, *, row: int = 0, likeliest: int = 5) -> Lens:
    """Final norm and head on the stream after every layer.

    With DeepNorm the stream is normalized already and the final norm is the identity; with U-net skips a layer of the first
    half is shown without the skips that it will take part in.
    """
    found: list[tuple[Tensor, ...]] = []
    logits = seen.logits[row]
    for x in (seen.embedded, *(layer.output for layer in seen.layers)):
        logits = model.head(model.norm(x[row]))
        log_p = logits.log_softmax(-1)
        top = log_p.topk(min(likeliest, log_p.shape[-1]), -1)
        entropy = -(log_p.exp() * log_p).sum(-1) / torch.log(torch.tensor(2.0, dtype=log_p.dtype))
        found.append((top.indices, top.values.exp(), log_p[:, target].exp(), entropy))
    tokens, probabilities, on_target, entropy = (torch.stack(parts) for parts in zip(*found, strict=True))
    return Lens(tokens, probabilities, on_target, entropy, float((logits - seen.logits[row]).abs().max()))
