"""Rotary positions: pairs of each head's dimensions turn with the position (arXiv 2104.09864), with xPos they also decay
with the distance (arXiv 2212.10554). The angles are computed once a pass, in float64, and shared by all layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from andromeda.config.model import ModelConfig
from andromeda.model.position.scaling import RULES

Table = tuple[Tensor, Tensor]
"""cos and sin (B, T, 1, R/2), each already times the xPos factor."""


@dataclass(frozen=True)
class Rotation:
    """How queries and keys of one pass are turned; `turn` is chosen once by the layout."""

    turn: Callable[[Tensor, Table], Tensor]
    query: Table
    key: Table

    def __call__(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """q (B, T, H, D), k (B, T, G, D), turned."""
        return self.turn(q, self.query), self.turn(k, self.key)


def turn_halves(x: Tensor, table: Table) -> Tensor:
    """Turn the pairs (i, i + R/2) of the first R dimensions of x (B, T, H, D)."""
    cos, sin = table
    rotated, rest = x.split([2 * cos.shape[-1], x.shape[-1] - 2 * cos.shape[-1]], -1)
    a, b = rotated.to(cos.dtype).chunk(2, -1)
    return torch.cat([(a * cos - b * sin).to(x.dtype), (b * cos + a * sin).to(x.dtype), rest], -1)


def turn_interleaved(x: Tensor, table: Table) -> Tensor:
    """Turn the pairs (2i, 2i + 1) of the first R dimensions of x (B, T, H, D)."""
    cos, sin = table
    rotated, rest = x.split([2 * cos.shape[-1], x.shape[-1] - 2 * cos.shape[-1]], -1)
    a, b = rotated.to(cos.dtype).unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
    return torch.cat([turned.to(x.dtype), rest], -1)


def stay(x: Tensor, table: Table) -> Tensor:
    """No rotation."""
    return x


TURNS = {"half": turn_halves, "interleaved": turn_interleaved}


class NoRotary(nn.Module):
    """Positions are not rotated (NoPE, or ALiBi alone)."""

    logit_factor = 1.0

    def forward(self, positions: Tensor, span: int, dtype: torch.dtype) -> Rotation:
        """The identity."""
        nothing = (positions, positions)
        return Rotation(stay, nothing, nothing)


class Rotary(nn.Module):
    """RoPE's table of angles for the first `fraction` of `dim` head dimensions."""

    def __init__(self, config: ModelConfig, dim: int) -> None:
        super().__init__()
        self.config, self.context = config.rotary, config.context
        self.dim = rotated_dims(config.rotary.fraction, dim)
        self.rule = RULES[config.rotary.scaling.kind]
        self.turn = TURNS[config.rotary.layout]

    @property
    def logit_factor(self) -> float:
        """What YaRN multiplies the softmax scale with (it does not depend on the length)."""
        return self.rule(self.config.theta, self.dim, self.config.scaling, self.context, self.context)[1]

    def angles(self, positions: Tensor, span: int) -> Table:
        """cos and sin (B, T, 1, R/2) in float64."""
        inverse, _ = self.rule(self.config.theta, self.dim, self.config.scaling, self.context, span)
        angles = positions[..., None, None].double() * inverse.to(positions.device)
        return angles.cos(), angles.sin()

    def forward(self, positions: Tensor, span: int, dtype: torch.dtype) -> Rotation:
        """The rotation of tokens at `positions` (B, T); `span` is the length of the whole sequence."""
        cos, sin = self.angles(positions, span)
        table = (cos.to(dtype), sin.to(dtype))
        return Rotation(self.turn, table, table)


class XPos(Rotary):
    """RoPE with a decay: a pair's share of the logit shrinks by zeta^(distance / scale_base).

    zeta_i = (2i/R + 0.4) / 1.4 lies between 0.286 and 1. Queries carry zeta^(+(t - c)/base), keys the inverse, and c
    cancels; it is half the context, once and for all, so that cached keys stay valid and the factors span the least
    range. With scale_base >= context / 4 no factor exceeds 12.3; float32 and bfloat16 overflow beyond about
    72,000 tokens at base 512, which reading the configuration refuses. Interpolation stretches the decay with the angles.
    """

    def forward(self, positions: Tensor, span: int, dtype: torch.dtype) -> Rotation:
        """The rotation of tokens at `positions` (B, T), with the decay folded into cos and sin."""
        cos, sin = self.angles(positions, span)
        index = torch.arange(0, self.dim, 2, dtype=torch.float64, device=positions.device)
        zeta = (index / self.dim + 0.4) / 1.4
        base = self.config.scale_base * self.config.scaling.factor
        power = (positions[..., None, None].double() - self.context // 2) / base
        grow, shrink = zeta**power, zeta**-power
        return Rotation(
            self.turn,
            ((cos * grow).to(dtype), (sin * grow).to(dtype)),
            ((cos * shrink).to(dtype), (sin * shrink).to(dtype)),
        )


def rotated_dims(fraction: float, dim: int) -> int:
    """Dimensions of a head that are rotated: `fraction` of dim, rounded down to a whole number of pairs."""
    return round(dim * fraction) // 2 * 2
