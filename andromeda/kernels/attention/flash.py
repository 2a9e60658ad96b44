"""FlashAttention-2 (arXiv 2307.08691) as PyTorch has it in CUDA: causal attention only, also of a few queries over many keys."""

from __future__ import annotations

import torch
from torch import Tensor

from andromeda.kernels.attention.pattern import Pattern

name = "flash"


def refuse(pattern: Pattern, q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Causal attention in 16 bits on Ampere and newer GPUs."""
    return needs_plain(pattern) or needs_half_on_cuda(q, capability=8) or needs_equal_heads(q, v, widest=256)


def attend(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> Tensor:
    """Same contract as `eager.attend`."""
    # The operator itself, since the public function refuses T < S: this kernel aligns its mask to the last key, as we do.
    out = torch.ops.aten._scaled_dot_product_flash_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, scale=pattern.scale
    )
    return out[0].transpose(1, 2)


def needs_plain(pattern: Pattern) -> str | None:
    """Refusal of all but causal attention."""
    for given, what in (
        (pattern.window, "no window"),
        (pattern.documents is not None, "no document mask"),
        (pattern.slopes is not None, "no ALiBi slopes (alibi.fold = true needs none)"),
        (pattern.softcap, "no soft cap"),
    ):
        if given:
            return f"it has {what}"
    return None


def needs_half_on_cuda(q: Tensor, capability: int) -> str | None:
    """Refusal of other devices and types than 16 bits on a GPU of at least this major compute capability."""
    if q.device.type != "cuda":
        return "it runs on CUDA GPUs only"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"it has no kernels in {str(q.dtype).removeprefix('torch.')}"
    if torch.cuda.get_device_capability(q.device)[0] < capability:
        return f"it needs a GPU of compute capability {capability}.0 or newer"
    return None


def needs_equal_heads(q: Tensor, v: Tensor, widest: int) -> str | None:
    """Refusal of head dimensions that differ between keys and values, are no multiple of eight, or too wide."""
    D, Dv = q.shape[-1], v.shape[-1]
    if D != Dv:
        return "it needs values as wide as keys"
    return f"it needs heads of 8, 16, ... or {widest} dimensions" if D % 8 or D > widest else None
