"""Many small matrix products at once: rows sorted by group, each group with a matrix of its own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ALIGNMENT = 16
"""Bytes to which PyTorch's grouped product wants rows aligned."""


def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """x (N, C) times weight (E, F, C) transposed: rows up to ends[0] with the first matrix, up to ends[1] with the second, ...

    ends (E,) int32, the last one N. Follows autocast, as `linear` does. Gives (N, F).
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, weight = x.to(dtype), weight.to(dtype)
    aligned = all(size * x.element_size() % ALIGNMENT == 0 for size in weight.shape[1:])
    if x.dtype == torch.bfloat16 and aligned:
        return F.grouped_mm(x, weight.transpose(1, 2), offs=ends)
    # PyTorch's kernel is for bfloat16; elsewhere the lengths must be known to the host.
    groups = x.split(ends.diff(prepend=ends.new_zeros(1)).tolist())
    return torch.cat([F.linear(rows, matrix) for rows, matrix in zip(groups, weight, strict=True)])
