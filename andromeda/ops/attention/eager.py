"""The reference implementation: every spec, on any device, in any floating dtype, with T x S memory. It defines what attention means."""

from __future__ import annotations

import torch
from torch import Tensor

from andromeda.ops.attention.spec import AttentionSpec

name = "eager"


def unsupported_reason(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """None: every call is supported."""
    return None


def attention_logits(q: Tensor, k: Tensor, spec: AttentionSpec) -> Tensor:
    """Logits (B, H, T, S) of q (B, T, H, D) and k (B, S, G, D) in at least float32, minus infinity where a key is not visible."""
    wide = torch.promote_types(q.dtype, torch.float32)
    T, (S, G) = q.shape[1], k.shape[1:3]
    logits = _einsum("btgrd,bsgd->bgrts", q.to(wide).unflatten(2, (G, -1)), k.to(wide)).flatten(1, 2) * spec.scale
    if spec.softcap:
        logits = spec.softcap * torch.tanh(logits / spec.softcap)
    bias = spec.bias(T, S, q.device)
    if bias is not None:
        logits = logits + bias.to(wide)
    return logits.masked_fill(~spec.mask(T, S, q.device), float("-inf"))


def weighted_values(weights: Tensor, v: Tensor) -> Tensor:
    """Attention output (B, T, H, Dv) of weights (B, H, T, S) and v (B, S, G, Dv)."""
    grouped = weights.unflatten(1, (v.shape[2], -1))
    return _einsum("bgrts,bsgd->btgrd", grouped, v.to(weights.dtype)).flatten(2, 3).to(v.dtype)


def _einsum(equation: str, a: Tensor, b: Tensor) -> Tensor:
    """einsum in the dtype of the operands, even under autocast."""
    with torch.autocast(a.device.type, enabled=False):
        return torch.einsum(equation, a, b)


def attend(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
    """Softmax attention in at least float32. q (B, T, H, D), k (B, S, G, D), v (B, S, G, Dv) -> (B, T, H, Dv)."""
    return weighted_values(attention_logits(q, k, spec).softmax(-1), v)
