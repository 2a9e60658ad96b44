"""Normalizations of the residual stream: RMS norm with or without a gain, and layer norm without a bias."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from andromeda.config.model import ModelConfig
from andromeda.model.specs import NormSpec


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight for x (..., C) (arXiv 1910.07467)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def fused_spec(self) -> NormSpec | None:
        """RMS norm with a gain."""
        return NormSpec("rms", self.eps, gain=True)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., C) -> (..., C)."""
        return F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.eps)


class RMSNormNoGain(nn.Module):
    """RMS norm without a learned gain."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def fused_spec(self) -> NormSpec | None:
        """RMS norm."""
        return NormSpec("rms", self.eps, gain=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., C) -> (..., C)."""
        return F.rms_norm(x, x.shape[-1:], None, self.eps)


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(variance + eps) * weight for x (..., C), without a bias."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def fused_spec(self) -> NormSpec | None:
        """Layer norm with a gain."""
        return NormSpec("layer", self.eps, gain=True)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., C) -> (..., C)."""
        return F.layer_norm(x, x.shape[-1:], self.weight.to(x.dtype), None, self.eps)


NORMS: dict[str, Callable[[int, float], nn.Module]] = {"rms": RMSNorm, "layer": LayerNorm, "rms_plain": RMSNormNoGain}


def build_norm(config: ModelConfig) -> nn.Module:
    """A norm over the residual stream."""
    return NORMS[config.block.norm](config.hidden_size, config.block.eps)
