"""One product in place of several that read the same vectors: their matrices side by side.

A narrow matrix, such as the keys' with one key/value head, makes a product of its own that keeps a GPU waiting.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from andromeda.model.cached_cast_linear import CachedCastLinear
from andromeda.model.layers import Linear, concat_weights
from andromeda.ops.master_weight_linear import split_parts


def should_fuse(x: Tensor, linears: Sequence[nn.Module]) -> bool:
    """Whether to join them for x: in training on a GPU, where copying the matrices is little beside the product; or those that were
    cast as one."""
    first = linears[0]
    if isinstance(first, CachedCastLinear):
        return first.fused_with == tuple(linears[1:]) and first.accepts(x)
    plain = all(type(linear) is Linear and type(linear.weight) is nn.Parameter for linear in linears)
    return plain and x.is_cuda and torch.is_grad_enabled() and all(p.requires_grad for linear in linears for p in linear.parameters())


def project(x: Tensor, linears: Sequence[nn.Linear]) -> Tensor:
    """What all linear layers give for x (..., K), side by side, and zeros at the end: (..., N)."""
    return linears[0].project(x) if isinstance(linears[0], CachedCastLinear) else F.linear(x, *concat_weights(linears))


def split(whole: Tensor, linears: Sequence[nn.Linear]) -> tuple[Tensor, ...]:
    """What each linear layer gives: views (..., N_i) of what `project` does."""
    return split_parts(whole, [linear.out_features for linear in linears], -1)
