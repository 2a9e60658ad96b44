"""One product in place of several that read the same vectors: their matrices side by side.

A narrow matrix, such as the keys' with one key/value head, makes a product of its own that keeps a GPU waiting.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from andromeda.model.layers import Linear

ALIGNED = 64
"""The rows of the joined matrix are filled up to a multiple of this: 128 bytes in 16 bits, as fast products write best."""


def worth(x: Tensor, linears: Sequence[nn.Module]) -> bool:
    """Whether to join them for x: in training on a GPU, where copying the matrices is little beside the product; plain ones only."""
    plain = all(type(linear) is Linear and type(linear.weight) is nn.Parameter for linear in linears)
    return plain and x.is_cuda and torch.is_grad_enabled() and all(p.requires_grad for linear in linears for p in linear.parameters())


def project(x: Tensor, linears: Sequence[nn.Linear]) -> Tensor:
    """What all linear layers give for x (..., K), side by side, and zeros at the end: (..., N)."""
    return F.linear(x, *side_by_side(linears))


def side_by_side(linears: Sequence[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    """Their weights as one (N, K) and their biases as one (N,), zeros at the end."""
    padding = -sum(linear.out_features for linear in linears) % ALIGNED
    weights: list[Tensor] = [linear.weight for linear in linears]
    weight = F.pad(torch.cat(weights), (0, 0, 0, padding))
    biases: list[Tensor] = [linear.bias for linear in linears if linear.bias is not None]
    return weight, F.pad(torch.cat(biases), (0, padding)) if biases else None
