"""FlashAttention-2 (arXiv 2307.08691) as PyTorch ships it for CUDA: causal attention only, also of a few queries over many keys."""

from __future__ import annotations

import torch
from torch import Tensor

from andromeda.ops.attention.requirements import (
    requires_causal_only,
    requires_equal_head_dims,
    requires_half_on_cuda,
    requires_head_dim_multiple_of_8,
)
from andromeda.ops.attention.spec import AttentionSpec

name = "flash"


def unsupported_reason(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Causal attention in 16 bits on Ampere and newer GPUs."""
    return (
        requires_causal_only(spec)
        or requires_half_on_cuda(q, capability=8)
        or requires_equal_head_dims(q, v)
        or requires_head_dim_multiple_of_8(q, v, widest=256)
    )


def attend(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
    """Same contract as `eager.attend`."""
    # The operator itself, because the public function does not support T < S: this kernel aligns its mask to the last key, as needed.
    out = torch.ops.aten._scaled_dot_product_flash_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, scale=spec.scale
    )
    return out[0].transpose(1, 2)
