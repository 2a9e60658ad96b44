"""cuDNN's fused attention through PyTorch: causal attention of whole sequences, much faster than FlashAttention-2 on Hopper."""

from __future__ import annotations

import torch
from torch import Tensor

from andromeda.ops.attention.requirements import (
    needs_grad,
    requires_causal_only,
    requires_equal_head_dims,
    requires_half_on_cuda,
    requires_head_dim_multiple_of_8,
)
from andromeda.ops.attention.spec import AttentionSpec

name = "cudnn"

_AVAILABLE = torch.backends.cudnn.is_available()  # at import, because torch.compile cannot trace this call


def unsupported_reason(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Causal attention of whole sequences in 16 bits on Ampere and newer GPUs."""
    if q.shape[1] != k.shape[1]:
        return "it aligns its mask to the first key, so that there must be as many queries as keys"
    if q.shape[1] == 1:
        return "it needs at least two tokens"
    if (
        reason := requires_causal_only(spec)
        or requires_half_on_cuda(q, capability=8)
        or requires_equal_head_dims(q, v)
        or requires_head_dim_multiple_of_8(q, v, widest=128)
    ):
        return reason
    return None if _AVAILABLE else "this PyTorch has no cuDNN"


def attend(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
    """Same contract as `eager.attend`."""
    gradients = needs_grad(q, k, v)
    # The operator itself: the public function may select another kernel, and selects again in every call.
    out = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), None, gradients, is_causal=True, scale=spec.scale
    )
    return out[0].transpose(1, 2)
