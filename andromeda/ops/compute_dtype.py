"""The dtypes of matmuls and of the residual stream."""

from __future__ import annotations

import torch
from torch import Tensor

HALF_DTYPES = (torch.bfloat16, torch.float16)
"""16-bit dtypes."""


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a linear layer computes with x: autocast's where it is enabled (not for float64), else that of x."""
    device = x.device.type
    if x.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def residual_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the residual stream: bfloat16 where matmuls are in bfloat16 (float32's range, half its traffic), else that of x.

    Not float16, in which a sum over many layers can overflow.
    """
    return torch.bfloat16 if compute_dtype(x) == torch.bfloat16 else x.dtype
