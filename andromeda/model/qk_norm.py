"""Normalization of queries and keys before they are rotated (arXiv 2010.04245), which bounds the attention logits.

The norm comes first and the rotation second: a learned scale per dimension after xPos would make the logits depend on
absolute positions. Each part states the softmax scale that belongs to it. All keep the dtype of their input.

Shapes: B batch, T time, H query heads, G key/value heads, D head dimensions that are projected.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from andromeda.config.derived import content_dim
from andromeda.config.model import ModelConfig
from andromeda.config.parts import own_qk_norm, qk_norm_name
from andromeda.model.specs import QKNormSpec
from andromeda.model.tensor_plan import TensorPlan, splits_kv_heads

RMS_EPS = torch.finfo(torch.float32).eps
"""As PyTorch's default for float32 and bfloat16, but the same in float64, so that all precisions compute one function."""


def rms(x: Tensor) -> Tensor:
    """x (..., D) with a root mean square of one."""
    return F.rms_norm(x, x.shape[-1:], None, RMS_EPS).to(x.dtype)


def unit_length(x: Tensor) -> Tensor:
    """x (..., D) with length one."""
    return F.normalize(x, dim=-1).to(x.dtype)


class QKNorm(Protocol):
    """Normalization of queries and keys: a module built as `Class(config)`, or `Class(config, own)` for a class with a `Config`."""

    scale: float
    """Softmax scale that belongs to the norm."""

    def __call__(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """q (B, T, H, D), k (B, T, G, D) -> the same, normalized."""
        ...


class NoQKNorm(nn.Module):
    """Queries and keys as projected; the usual softmax scale 1/sqrt(D)."""

    role = "scalar"

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.scale = 1 / math.sqrt(content_dim(config))

    @property
    def scales(self) -> tuple[Tensor | None, Tensor | None]:
        """Learned factors of queries (H, 1 or D) and of keys (G, 1 or D) after the norm."""
        return None, None

    def fused_spec(self) -> QKNormSpec | None:
        """No normalization."""
        return QKNormSpec("none")

    def tensor_plan(self, count: int) -> TensorPlan:
        """No parameters."""
        return TensorPlan()

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """q (B, T, H, D), k (B, T, G, D) as they are."""
        return q, k


class RMSQKNorm(NoQKNorm):
    """Root mean square one, no gain; logits are at most sqrt(D)."""

    def fused_spec(self) -> QKNormSpec | None:
        """RMS norm."""
        return QKNormSpec("rms")

    def tensor_plan(self, count: int) -> TensorPlan:
        """No parameters."""
        return TensorPlan()

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """q (B, T, H, D), k (B, T, G, D) of root mean square one."""
        return rms(q), rms(k)


class RMSDimScaleQKNorm(NoQKNorm):
    """Root mean square one and a learned scale for each dimension that all heads share, one at the start (as in Qwen3)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.eps = config.block.eps
        self.query_scale = nn.Parameter(torch.ones(content_dim(config)))
        self.key_scale = nn.Parameter(torch.ones(content_dim(config)))

    def fused_spec(self) -> QKNormSpec | None:
        """No kernel adds its eps."""
        return None

    def tensor_plan(self, count: int) -> TensorPlan:
        """All heads share the scales."""
        return TensorPlan()

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """q (B, T, H, D), k (B, T, G, D) of root mean square one, times the scales."""
        return self._scaled(q, self.query_scale), self._scaled(k, self.key_scale)

    def _scaled(self, x: Tensor, scale: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], scale.to(x.dtype), self.eps).to(x.dtype)


class L2QKNorm(NoQKNorm):
    """Unit length and a fixed temperature: logits are cosines times 10, as in x-transformers."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.scale = 10.0

    def fused_spec(self) -> QKNormSpec | None:
        """Unit length."""
        return QKNormSpec("l2")

    def tensor_plan(self, count: int) -> TensorPlan:
        """No parameters."""
        return TensorPlan()

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """q (B, T, H, D), k (B, T, G, D) of unit length."""
        return unit_length(q), unit_length(k)


class L2HeadScaleQKNorm(NoQKNorm):
    """Unit length and a learned temperature for each query head, 10 at the start."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.scale = 1.0
        self.temperature = nn.Parameter(torch.full((config.attention.num_heads, 1), 10.0))

    @property
    def scales(self) -> tuple[Tensor | None, Tensor | None]:
        """Temperatures (H, 1) of the queries."""
        return self.temperature, None

    def fused_spec(self) -> QKNormSpec | None:
        """Unit length, times the scales."""
        return QKNormSpec("l2")

    def tensor_plan(self, count: int) -> TensorPlan:
        """Each head has its own."""
        return TensorPlan({"temperature": 0})

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """q (B, T, H, D) of the heads' temperatures, k (B, T, G, D) of unit length."""
        return unit_length(q) * self.temperature.to(q.dtype), unit_length(k)


class L2DimScaleQKNorm(NoQKNorm):
    """Unit length and a learned scale for each head and dimension, D^(1/4) at the start, with 1/sqrt(D) (x-transformers).

    Logits are bounded by one at the start, so that attention begins nearly uniform.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        D = content_dim(config)
        self.query_scale = nn.Parameter(torch.full((config.attention.num_heads, D), D**0.25))
        self.key_scale = nn.Parameter(torch.full((config.attention.num_kv_heads, D), D**0.25))

    @property
    def scales(self) -> tuple[Tensor | None, Tensor | None]:
        """Factors (H, D) and (G, D)."""
        return self.query_scale, self.key_scale

    def fused_spec(self) -> QKNormSpec | None:
        """Unit length, times the scales."""
        return QKNormSpec("l2")

    def tensor_plan(self, count: int) -> TensorPlan:
        """Each head has its own."""
        return TensorPlan({"query_scale": 0} | ({"key_scale": 0} if splits_kv_heads(count, len(self.key_scale)) else {}))

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """q (B, T, H, D), k (B, T, G, D) of unit length, times the scales."""
        return unit_length(q) * self.query_scale.to(q.dtype), unit_length(k) * self.key_scale.to(k.dtype)


REGISTERED: dict[str, type[NoQKNorm]] = {
    "none": NoQKNorm,
    "rms": RMSQKNorm,
    "l2": L2QKNorm,
    "l2_head_scale": L2HeadScaleQKNorm,
    "l2_dim_scale": L2DimScaleQKNorm,
    "rms_dim_scale": RMSDimScaleQKNorm,
}


def build_qk_norm(config: ModelConfig) -> Any:
    """The QK norm that the configuration names, a `QKNorm`. Raises ConfigError."""
    own = own_qk_norm(config)
    if own is None:
        return REGISTERED[qk_norm_name(config)](config)
    norm = own.build(config)
    if not hasattr(norm, "role"):
        # Factors of a norm are not matrices: they keep the values of the constructor, and no matrix optimizer updates them.
        norm.role = "scalar"
    return norm
