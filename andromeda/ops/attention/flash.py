"""FlashAttention-2 (arXiv 2307.08691) as PyTorch has it in CUDA: causal attention only, also of a few queries over many keys."""

from __future__ import annotations

import torch
from torch import Tensor

from andromeda.ops.attention.requirements import equal_heads, half_on_cuda, heads_of_eights, only_causal
from andromeda.ops.attention.spec import Pattern

name = "flash"


def refuse(pattern: Pattern, q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Causal attention in 16 bits on Ampere and newer GPUs."""
    return only_causal(pattern) or half_on_cuda(q, capability=8) or equal_heads(q, v) or heads_of_eights(q, v, widest=256)


def attend(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> Tensor:
    """Same contract as `eager.attend`."""
    # The operator itself, since the public function refuses T < S: this kernel aligns its mask to the last key, as we do.
    out = torch.ops.aten._scaled_dot_product_flash_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, scale=pattern.scale
    )
    return out[0].transpose(1, 2)
