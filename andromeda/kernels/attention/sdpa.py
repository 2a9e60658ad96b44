"""PyTorch's scaled_dot_product_attention: its own flash kernel for plain causal attention, a mask for the rest."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from andromeda.kernels.attention.pattern import Pattern

name = "sdpa"


def refuse(pattern: Pattern, q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Cannot cap logits: the function has no place for it."""
    return "it has no soft cap" if pattern.softcap else None


def attend(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> Tensor:
    """Same contract as `eager.attend`; anything but plain causal attention costs a T x S mask."""
    T, S = q.shape[1], k.shape[1]
    square = T == S and pattern.plain
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=None if square or T == 1 and pattern.plain else _mask(pattern, q, S),
        is_causal=square and T > 1,
        scale=pattern.scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)


def _mask(pattern: Pattern, q: Tensor, S: int) -> Tensor:
    """A boolean mask, or with ALiBi an additive one, broadcastable to (B, H, T, S)."""
    T = q.shape[1]
    visible = pattern.visible(T, S, q.device)
    bias = pattern.bias(T, S, q.device)
    if bias is None:
        return visible
    return torch.where(visible, bias.to(q.dtype), float("-inf"))
