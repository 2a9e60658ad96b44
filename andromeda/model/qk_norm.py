"""Normalisation of queries and keys before they are rotated (arXiv 2010.04245), which bounds the attention logits.

The norm comes first and the rotation second: a learned scale per dimension after xPos would make the logits depend on
absolute positions. Each part names the softmax scale that belongs to it.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from andromeda.config.model import ModelConfig
from andromeda.model.position import content_dim


class NoNorm(nn.Module):
    """Queries and keys as projected; the usual 1/sqrt(D)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.scale = 1 / math.sqrt(content_dim(config))

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """q (B, T, H, D), k (B, T, G, D)."""
        return q, k


class RMS(NoNorm):
    """Root mean square one, no gain; logits are at most sqrt(D)."""

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """q (B, T, H, D), k (B, T, G, D)."""
        return F.rms_norm(q, q.shape[-1:]), F.rms_norm(k, k.shape[-1:])


class L2(nn.Module):
    """Unit length and a fixed temperature: logits are cosines times 10, as x-transformers has it."""

    scale = 10.0

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """q (B, T, H, D), k (B, T, G, D)."""
        return F.normalize(q, dim=-1), F.normalize(k, dim=-1)


class L2HeadScale(nn.Module):
    """Unit length and a learned temperature for each query head, 10 at the start."""

    scale = 1.0

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.full((config.attention.heads, 1), 10.0))

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """q (B, T, H, D), k (B, T, G, D)."""
        return F.normalize(q, dim=-1) * self.temperature.to(q.dtype), F.normalize(k, dim=-1)


class L2DimScale(nn.Module):
    """Unit length and a learned scale for each head and dimension, D^(1/4) at the start, with 1/sqrt(D) (x-transformers).

    Logits are bounded by one at the start, so that attention begins nearly uniform.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        D = content_dim(config)
        self.scale = 1 / math.sqrt(D)
        self.query_scale = nn.Parameter(torch.full((config.attention.heads, D), D**0.25))
        self.key_scale = nn.Parameter(torch.full((config.attention.kv_heads, D), D**0.25))

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """q (B, T, H, D), k (B, T, G, D)."""
        return F.normalize(q, dim=-1) * self.query_scale.to(q.dtype), F.normalize(k, dim=-1) * self.key_scale.to(k.dtype)


QK_NORMS: dict[str, type[nn.Module]] = {"none": NoNorm, "rms": RMS, "l2": L2, "l2_head_scale": L2HeadScale, "l2_dim_scale": L2DimScale}


def build_qk_norm(config: ModelConfig) -> nn.Module:
    """The QK norm that the configuration asks for."""
    return QK_NORMS[config.attention.qk_norm](config)
