"""ALiBi: heads that look less at what is further away, by a bias on the logits that is linear in the distance
(arXiv 2108.12409). Either as a bias, or folded into four dimensions of the queries and keys.

Softmax ignores what is constant along a row, so -m (i - j) may be m j; and m j is an inner product of the slope with
the base-256 digits of j: q' = (m/s) (65536, 256, 1), k' = digits of j, for softmax scale s. Digits up to 255 are exact
in bfloat16, and (m/s) 256^n rounds alike for every n, so that a head sees the one slope round(m/s) s. Three digits
reach 16.7 million positions; the fourth dimension keeps the rest a whole number of rotary pairs. Any causal kernel then
computes ALiBi at full speed. FlashBias (arXiv 2505.12044) describes the idea in general.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from andromeda.config.model import ModelConfig


def slopes(heads: int, device: torch.device | None = None) -> Tensor:
    """2^(-8h/heads) for h = 1..heads in float64 (heads,); between powers of two, the rest lie between the first ones.

    The paper takes every other slope of the next power of two for the rest: for c = the power below, these are
    2^(-8 (i + 1/2) / c), i = 0, 1, ... Computed on the device, so that a pass copies nothing to it.
    """
    closest = 1 << (heads.bit_length() - 1)
    h = torch.arange(heads, dtype=torch.float64, device=device)
    return torch.exp2(torch.where(h < closest, h + 1, h - closest + 0.5) * (-8 / closest))


class PositionBias(Protocol):
    """What ALiBi adds in one pass: slopes that the attention kernel is given, or dimensions that queries and keys carry."""

    @property
    def slopes(self) -> Tensor | None:
        """Slope of every query head (H,), for the attention kernel; None is no bias there."""
        ...

    @property
    def digits(self) -> Tensor | None:
        """Base-256 digits of the keys (T, 4) where queries and keys carry the bias, else None."""
        ...

    def tails(self, scale: float, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """What `fold` appends: slopes over `scale` in `dtype` (H,) and digits of the keys (T, 4), or nothing."""
        ...

    def fold(self, q: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """q (B, T, H, D) and k (B, T, G, D) with the bias appended, if they carry it."""
        ...


class NoPositionBias:
    """One pass without ALiBi."""

    slopes: Tensor | None = None
    """Slope of every query head (H,), for the attention kernel; None is no bias."""
    digits: Tensor | None = None
    """Digits of the keys (T, 4) where queries and keys carry the bias."""

    def tails(self, scale: float, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """What `fold` appends: slopes over `scale` in `dtype` (H,) and digits of the keys (T, 4), or nothing."""
        return ()

    def fold(self, q: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """q (B, T, H, D) and k (B, T, G, D) as they are."""
        return q, k


class SlopeBias(NoPositionBias):
    """One pass in which the attention kernel is given slopes (H,)."""

    def __init__(self, slopes: Tensor) -> None:
        self.slopes = slopes


@dataclass(frozen=True)
class FoldedBias(NoPositionBias):
    """One pass in which queries and keys carry the bias."""

    weights: Tensor
    """Slope of every query head (H,) in float64."""
    digits: Tensor
    """Base-256 digits of the index of every key of this pass (T, 4), the highest first; the fourth is zero. (B, T, 4) where the
    sequences of a pass begin at different indices."""

    def tails(self, scale: float, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Slopes, rounded once, then to be multiplied by powers of 256, which is exact: every digit sees the same slope."""
        return (self.weights / scale).to(dtype), self.digits

    def fold(self, q: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Append the slopes over `scale` to q (B, T, H, D-4) and the digits to k (B, T, G, D-4)."""
        slope, _ = self.tails(scale, q.dtype)
        tail = torch.stack([slope * 65536, slope * 256, slope, slope * 0], -1)
        digits = self.digits.to(k.dtype)[..., None, :]
        return (
            torch.cat([q, tail.expand(*q.shape[:2], -1, -1)], -1),
            torch.cat([k, digits.expand(k.shape[0], -1, k.shape[2], -1)], -1),
        )


class NoAlibi(nn.Module):
    """No bias."""

    def keep_heads(self, heads: range) -> None:
        """Nothing: no head has a bias."""

    def forward(self, start: int | Tensor, length: int, device: torch.device) -> PositionBias:
        """The bias of a pass over `length` tokens, the first of which has index `start` in its sequence: one number, or (B, 1)."""
        return NoPositionBias()


class Alibi(NoAlibi):
    """A bias on the first `alibi.num_heads` heads, which the kernel adds."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.biased, self.plain, self.scale = (
            config.alibi.num_heads,
            config.attention.num_heads - config.alibi.num_heads,
            config.alibi.scale,
        )
        self.kept = slice(None)

    def keep_heads(self, heads: range) -> None:
        """Give the slopes of these query heads only from now on."""
        self.kept = slice(heads.start, heads.stop)

    def head_slopes(self, device: torch.device) -> Tensor:
        """Slope of every query head that is computed (H,) in float64, zero where there is no bias."""
        return nn.functional.pad(slopes(self.biased, device) / self.scale, (0, self.plain))[self.kept]

    def forward(self, start: int | Tensor, length: int, device: torch.device) -> PositionBias:
        """Slopes for the kernel."""
        return SlopeBias(self.head_slopes(device))


class FoldedAlibi(Alibi):
    """The same bias, carried by the last four dimensions of queries and keys."""

    def forward(self, start: int | Tensor, length: int, device: torch.device) -> PositionBias:
        """Slopes and digits."""
        index = start + torch.arange(length, device=device)
        digits = torch.stack([index // 65536, index // 256 % 256, index % 256, torch.zeros_like(index)], -1)
        return FoldedBias(self.head_slopes(device), digits)
