"""Normalizations of the residual stream: RMS with or without a gain, and layer norm without a bias."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from andromeda.config.model import ModelConfig


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight (arXiv 1910.07467)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., C)."""
        return F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.eps)


class RMSNormNoGain(nn.Module):
    """RMS norm without a gain."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x (..., C)."""
        return F.rms_norm(x, x.shape[-1:], None, self.eps)


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(variance + eps) * weight, without a bias."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., C)."""
        return F.layer_norm(x, x.shape[-1:], self.weight.to(x.dtype), None, self.eps)


NORMS: dict[str, Callable[[int, float], nn.Module]] = {"rms": RMSNorm, "layer": LayerNorm, "rms_plain": RMSNormNoGain}


def build_norm(config: ModelConfig) -> nn.Module:
    """A norm over the model's width."""
    return NORMS[config.block.norm](config.hidden_size, config.block.eps)
