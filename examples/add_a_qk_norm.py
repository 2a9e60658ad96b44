"""A QK norm of your own, with a key of its own, in one file: unit length times a temperature that is fixed for each head.

    [model.attention.qk_norm]
    kind = "add_a_qk_norm:HeadTemperatures"
    sharpest = 20.0

and train with `andromeda train my.toml --allow-code` in the folder that holds this file.

Because it states the spec of a built-in norm (unit
length, then learned or fixed factors), the fused kernel for norm, rotation and ALiBi computes it as well. A norm that computes
something else leaves `fused_spec` out; its own forward pass is then used, on every device.

Shapes: B batch, T time, H query heads, G key/value heads, D head dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import PositiveFloat
from torch import Tensor, nn

from andromeda.config.base import BaseConfig
from andromeda.config.model import ModelConfig
from andromeda.model.specs import QKNormSpec


class HeadTemperatures(nn.Module):
    """Cosines times a temperature between `gentlest` and `sharpest`, geometric over the query heads."""

    role = "scalar"
    scale = 1.0
    """The softmax scale that belongs to it."""

    class Config(BaseConfig):
        """Keys of `[model.attention.qk_norm]` besides `kind`."""

        gentlest: PositiveFloat = 5.0
        sharpest: PositiveFloat = 20.0

    def __init__(self, config: ModelConfig, own: Config) -> None:
        super().__init__()
        share = torch.linspace(0, 1, config.attention.num_heads)[:, None]
        self.temperature = nn.Parameter(own.gentlest * (own.sharpest / own.gentlest) ** share, requires_grad=False)

    @property
    def scales(self) -> tuple[Tensor | None, Tensor | None]:
        """Factors of queries (H, 1) and of keys after the norm, for the fused kernel."""
        return self.temperature, None

    def fused_spec(self) -> QKNormSpec:
        """Unit length, times the scales."""
        return QKNormSpec("l2")

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """q (B, T, H, D), k (B, T, G, D), before they are rotated."""
        return (F.normalize(q, dim=-1) * self.temperature).to(q.dtype), F.normalize(k, dim=-1).to(k.dtype)
