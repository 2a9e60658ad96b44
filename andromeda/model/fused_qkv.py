"""One matmul in place of several that read the same vectors, with their matrices concatenated.

A narrow matrix, such as the keys' with one key/value head, is a matmul of its own that leaves a GPU waiting. How linear layers
are fused is matched to their specs once (`match`); the matched function decides by the tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from andromeda.model.layers import concat_weights
from andromeda.model.specs import LinearSpec, spec_of
from andromeda.ops.master_weight_linear import split_parts

Project = Callable[[Tensor, Sequence[Any]], Tensor | None]
"""(x (..., K), linears) -> what all of them give, concatenated, zeros at the end (..., N); None where each is better computed alone."""


def match(linears: Sequence[nn.Module], concat: bool = True) -> Project:
    """How these layers are computed together. concat: whether to concatenate plain matrices at each pass."""
    first = linears[0]
    if getattr(first, "fused_with", None) and first.fused_with == tuple(linears[1:]):
        return cached
    plain = all(spec_of(linear) == LinearSpec("plain") for linear in linears)
    return concatenated if concat and plain else separate


def separate(x: Tensor, linears: Sequence[Any]) -> Tensor | None:
    """Never fused."""
    return None


def cached(x: Tensor, linears: Sequence[Any]) -> Tensor | None:
    """By the weights that were cast as one matrix."""
    return linears[0].project(x) if linears[0].accepts(x) else None


def concatenated(x: Tensor, linears: Sequence[Any]) -> Tensor | None:
    """In training on a GPU, where copying the matrices is little compared with the matmul."""
    return F.linear(x, *concat_weights(linears)) if should_fuse(x, linears) else None


def should_fuse(x: Tensor, linears: Sequence[nn.Module]) -> bool:
    """Whether all matrices are plain parameters (not sharded) that are trained on a GPU."""
    if not (x.is_cuda and torch.is_grad_enabled()):
        return False
    return all(type(linear.weight) in (Tensor, nn.Parameter) and all(p.requires_grad for p in linear.parameters()) for linear in linears)


def split(whole: Tensor, linears: Sequence[nn.Linear]) -> tuple[Tensor, ...]:
    """The output of each linear layer: views (..., N_i) of the fused output."""
    return split_parts(whole, [linear.out_features for linear in linears], -1)
