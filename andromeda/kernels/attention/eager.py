"""The reference: every pattern, any device, any floating type, T x S memory. Nothing else defines what attention means."""

from __future__ import annotations

import torch
from torch import Tensor

from andromeda.kernels.attention.pattern import Pattern

name = "eager"


def refuse(pattern: Pattern, q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Never refuses."""
    return None


def attend(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> Tensor:
    """Softmax attention in at least float32. q (B, T, H, D), k (B, S, G, D), v (B, S, G, Dv) -> (B, T, H, Dv)."""
    wide = torch.promote_types(q.dtype, torch.float32)
    (B, T, H, _), (S, G) = q.shape, k.shape[1:3]
    q_grouped = q.to(wide).unflatten(2, (G, H // G))
    logits = torch.einsum("btgrd,bsgd->bgrts", q_grouped, k.to(wide)).flatten(1, 2) * pattern.scale
    if pattern.softcap:
        logits = pattern.softcap * torch.tanh(logits / pattern.softcap)
    bias = pattern.bias(T, S, q.device)
    if bias is not None:
        logits = logits + bias.to(wide)
    logits = logits.masked_fill(~pattern.visible(T, S, q.device), float("-inf"))
    weights = logits.softmax(-1).unflatten(1, (G, H // G))
    return torch.einsum("bgrts,bsgd->btgrd", weights, v.to(wide)).flatten(2, 3).to(v.dtype)
