"""Rotary positions: pairs of each head's dimensions turn with the position (arXiv 2104.09864), with xPos they also decay
with the distance (arXiv 2212.10554). The angles are computed once a pass, in float64, and shared by all layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from andromeda.config.derived import original_max_seq_len, rotated_dims
from andromeda.config.model import ModelConfig
from andromeda.model.position.scaling import RULES, Scaled, Span
from andromeda.model.specs import RotarySpec

Table = tuple[Tensor, Tensor]
"""cos and sin (B, T, 1, R/2), each already times the xPos factor."""


@dataclass(frozen=True)
class Rotation:
    """How queries and keys of one pass are rotated; `rotate` is chosen once by the layout."""

    rotate: Callable[[Tensor, Table], Tensor]
    query: Table
    key: Table

    def fused_spec(self) -> RotarySpec | None:
        """Layout of the pairs; None where the heads are not all rotated alike."""
        return LAYOUTS[self.rotate]

    def __call__(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """q (B, T, H, D), k (B, T, G, D), rotated."""
        return self.rotate(q, self.query), self.rotate(k, self.key)


@dataclass(frozen=True)
class PartialHeadsRotation(Rotation):
    """One pass in which the first heads are not rotated: those that ALiBi has, or all but a share of them."""

    unrotated: tuple[int, int]
    """How many query heads and how many key heads are not rotated."""

    def fused_spec(self) -> RotarySpec | None:
        """None: heads differ."""
        return None

    def __call__(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """q (B, T, H, D), k (B, T, G, D): heads from `unrotated` on rotated."""
        return self._from(q, self.query, self.unrotated[0]), self._from(k, self.key, self.unrotated[1])

    def _from(self, x: Tensor, table: Table, unrotated: int) -> Tensor:
        return torch.cat([x[:, :, :unrotated], self.rotate(x[:, :, unrotated:], table)], 2)


def rotate_half(x: Tensor, table: Table) -> Tensor:
    """Rotate the pairs (i, i + R/2) of the first R dimensions of x (B, T, H, D)."""
    cos, sin = table
    rotated, rest = x.split([2 * cos.shape[-1], x.shape[-1] - 2 * cos.shape[-1]], -1)
    a, b = rotated.to(cos.dtype).chunk(2, -1)
    return torch.cat([(a * cos - b * sin).to(x.dtype), (b * cos + a * sin).to(x.dtype), rest], -1)


def rotate_interleaved(x: Tensor, table: Table) -> Tensor:
    """Rotate the pairs (2i, 2i + 1) of the first R dimensions of x (B, T, H, D)."""
    cos, sin = table
    rotated, rest = x.split([2 * cos.shape[-1], x.shape[-1] - 2 * cos.shape[-1]], -1)
    a, b = rotated.to(cos.dtype).unflatten(-1, (-1, 2)).unbind(-1)
    mixed = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
    return torch.cat([mixed.to(x.dtype), rest], -1)


def no_rotation(x: Tensor, table: Table) -> Tensor:
    """No rotation."""
    return x


ROTATIONS = {"half": rotate_half, "interleaved": rotate_interleaved}
LAYOUTS: dict[Callable[[Tensor, Table], Tensor], RotarySpec] = {
    no_rotation: RotarySpec("none"),
    rotate_half: RotarySpec("half"),
    rotate_interleaved: RotarySpec("interleaved"),
}


class Rotary(Protocol):
    """Rotary positions of a model: a module that gives the rotation of one pass."""

    logit_factor: float
    """What frequency scaling multiplies attention logits with."""

    def fused_spec(self) -> RotarySpec | None:
        """Layout of the pairs; None where the heads are not all rotated alike."""
        ...

    def __call__(self, positions: Tensor, span: int, dtype: torch.dtype) -> Rotation:
        """The rotation of tokens at `positions` (B, T); `span` is the length of the whole sequence."""
        ...


class NoRotary(nn.Module):
    """Positions are not rotated (NoPE, or ALiBi alone)."""

    logit_factor = 1.0

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()

    def fused_spec(self) -> RotarySpec | None:
        """No rotation."""
        return RotarySpec("none")

    def keep_heads(self, heads: range, kv_heads: range) -> None:
        """Nothing: all heads are alike."""

    def forward(self, positions: Tensor, span: int, dtype: torch.dtype) -> Rotation:
        """The identity."""
        nothing = (positions, positions)
        return Rotation(no_rotation, nothing, nothing)


def unrotated_heads(config: ModelConfig) -> tuple[int, int] | None:
    """How many query heads and how many key/value heads, from the first, are not rotated; None where all are."""
    a, rotary = config.attention, config.rotary
    if rotary.heads == "non_alibi":
        return config.alibi.num_heads, config.alibi.num_heads * a.num_kv_heads // a.num_heads
    still = a.num_kv_heads - round(rotary.head_fraction * a.num_kv_heads)
    return (still * a.num_heads // a.num_kv_heads, still) if still else None


class RoPE(NoRotary):
    """RoPE's table of angles for the rotated share of the head dimensions."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.config, self.context, self.dim = config.rotary, config.max_seq_len, rotated_dims(config)
        self.original = original_max_seq_len(config)
        self.rule = RULES[config.rotary.scaling.kind]
        self.rotate = ROTATIONS[config.rotary.layout]
        self.unrotated = unrotated_heads(config)
        # On the CPU also where the model is built on the meta device: there arithmetic would import the compiler, for a second.
        self.logit_factor = self.rule(self.config, Span(self.dim, self.context, self.original, torch.device("cpu"))).logit_factor

    def fused_spec(self) -> RotarySpec | None:
        """Layout of the pairs; None where only some of the heads are rotated."""
        return LAYOUTS[self.rotate] if self.unrotated is None else None

    def keep_heads(self, heads: range, kv_heads: range) -> None:
        """Rotate only these query heads and key/value heads from now on."""
        if self.unrotated is not None:
            kept = zip(self.unrotated, (heads, kv_heads), strict=True)
            query, key = (min(max(0, count - held.start), len(held)) for count, held in kept)
            self.unrotated = query, key

    def scaled(self, span: int, device: torch.device) -> Scaled:
        """Frequencies for a sequence of `span` tokens in all."""
        return self.rule(self.config, Span(self.dim, span, self.original, device))

    def rotation(self, query: Table, key: Table) -> Rotation:
        """Of all heads, or of the last ones."""
        return (
            Rotation(self.rotate, query, key) if self.unrotated is None else PartialHeadsRotation(self.rotate, query, key, self.unrotated)
        )

    def forward(self, positions: Tensor, span: int, dtype: torch.dtype) -> Rotation:
        """The rotation of tokens at `positions` (B, T); `span` is the length of the whole sequence."""
        angles = positions[..., None, None].double() * self.scaled(span, positions.device).inverse
        table = (angles.cos().to(dtype), angles.sin().to(dtype))
        return self.rotation(table, table)


class XPos(RoPE):
    """RoPE with a decay: a pair's share of the logit shrinks by zeta^(distance / scale_base).

    zeta_i = (2i/R + 0.4) / 1.4 lies between 0.286 and 1. Queries carry zeta^(+(t - c)/base), keys the inverse, and c
    cancels; it is half the context, once and for all, so that cached keys stay valid and the factors span the least
    range. With scale_base >= context / 4 no factor exceeds 12.3; float32 and bfloat16 overflow beyond about
    68,000 tokens at base 512, which reading the configuration refuses. Interpolation scales the decay like the angles.
    """

    def fused_spec(self) -> RotarySpec | None:
        """As RoPE: the decay is part of the tables."""
        return super().fused_spec()

    def forward(self, positions: Tensor, span: int, dtype: torch.dtype) -> Rotation:
        """The rotation of tokens at `positions` (B, T), with the decay folded into cos and sin."""
        scaled = self.scaled(span, positions.device)
        t = positions[..., None, None].double()
        cos, sin = (t * scaled.inverse).cos(), (t * scaled.inverse).sin()
        index = torch.arange(0, self.dim, 2, dtype=torch.float64, device=positions.device)
        zeta = (index / self.dim + 0.4) / 1.4
        grow = zeta ** ((t - self.context // 2) / (self.config.scale_base * scaled.extension))
        return self.rotation(((cos * grow).to(dtype), (sin * grow).to(dtype)), ((cos / grow).to(dtype), (sin / grow).to(dtype)))
