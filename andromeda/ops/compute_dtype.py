"""The dtype in which work is done."""

from __future__ import annotations

import torch
from torch import Tensor

HALF_DTYPES = (torch.bfloat16, torch.float16)
"""Of 16 bits."""


def compute_dtype(x: Tensor) -> torch.dtype:
    """What a linear layer would compute in with x: autocast's dtype where that is on (it leaves float64 alone), else that of x."""
    device = x.device.type
    if x.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def residual_dtype(x: Tensor) -> torch.dtype:
    """What the residual stream is carried in: bfloat16 where products are, which has float32's range and half its traffic, else x's own.

    Not float16, whose range a sum over many layers can leave.
    """
    return torch.bfloat16 if compute_dtype(x) == torch.bfloat16 else x.dtype
