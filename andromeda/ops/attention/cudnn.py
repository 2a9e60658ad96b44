"""cuDNN's fused attention through PyTorch: causal attention of whole sequences, on Hopper much faster than FlashAttention-2."""

from __future__ import annotations

import torch
from torch import Tensor

from andromeda.ops.attention.requirements import equal_heads, half_on_cuda, heads_of_eights, only_causal, trained
from andromeda.ops.attention.spec import Pattern

name = "cudnn"

_AVAILABLE = torch.backends.cudnn.is_available()  # asked here, since torch.compile cannot trace the question


def refuse(pattern: Pattern, q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Causal attention of whole sequences in 16 bits on Ampere and newer GPUs."""
    if q.shape[1] != k.shape[1]:
        return "it aligns its mask to the first key, so that queries must be as many as keys"
    if q.shape[1] == 1:
        return "it needs two tokens or more"
    if reason := only_causal(pattern) or half_on_cuda(q, capability=8) or equal_heads(q, v) or heads_of_eights(q, v, widest=128):
        return reason
    return None if _AVAILABLE else "this PyTorch has no cuDNN"


def attend(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> Tensor:
    """Same contract as `eager.attend`."""
    gradients = trained(q, k, v)
    # The operator itself: the public function may take another kernel, and asks again at every call.
    out = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), None, gradients, is_causal=True, scale=pattern.scale
    )
    return out[0].transpose(1, 2)
