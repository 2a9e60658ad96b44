"""ALiBi: heads that look less at what is further away, by a bias on the logits that is linear in the distance
(arXiv 2108.12409). Either as a bias, or folded into four dimensions of the queries and keys.

Softmax ignores what is constant along a row, so -m (i - j) may be m j; and m j is an inner product of the slope with
the base-256 digits of j: q' = (m/s) (65536, 256, 1), k' = digits of j, for softmax scale s. Digits up to 255 are exact
in bfloat16, and (m/s) 256^n rounds alike for every n, so that a head sees the one slope round(m/s) s. Three digits
reach 16.7 million positions; the fourth dimension keeps the rest a whole number of rotary pairs. Any causal kernel then
computes ALiBi at full speed. FlashBias (arXiv 2505.12044) describes the idea in general.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from andromeda.config.model import ModelConfig

RESERVED = 4
"""Head dimensions that a folded bias takes from the content."""


def slopes(heads: int) -> list[float]:
    """2^(-8h/heads) for h = 1..heads; between powers of two, the paper's interleaving of the next power's slopes."""
    closest = 2 ** math.floor(math.log2(heads))
    first = [2 ** (-8 * (h + 1) / closest) for h in range(closest)]
    return first + ([] if closest == heads else slopes(2 * closest)[0::2][: heads - closest])


def head_slopes(config: ModelConfig) -> Tensor:
    """Slope of every query head (H,) in float64: ALiBi on the first `alibi.heads`, zero on the rest."""
    biased = [slope / config.alibi.scale for slope in slopes(config.alibi.heads)]
    return torch.tensor(biased + [0.0] * (config.attention.heads - config.alibi.heads), dtype=torch.float64)


class NoAlibi(nn.Module):
    """No bias."""

    reserved = 0

    def fold(self, q: Tensor, k: Tensor, scale: float, start: int) -> tuple[Tensor, Tensor]:
        """Queries and keys as they came."""
        return q, k

    def slopes(self, device: torch.device) -> Tensor | None:
        """None: logits get no bias."""
        return None


class Alibi(NoAlibi):
    """The bias is given to the attention kernel as slopes."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config

    def slopes(self, device: torch.device) -> Tensor | None:
        """Slope of every query head (H,)."""
        return head_slopes(self.config).to(device)


class FoldedAlibi(NoAlibi):
    """The bias is carried by the last four dimensions of queries and keys."""

    reserved = RESERVED

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config

    def fold(self, q: Tensor, k: Tensor, scale: float, start: int) -> tuple[Tensor, Tensor]:
        """Append the slopes to q (B, T, H, D-4) and the digits of the key's index, from `start`, to k (B, T, G, D-4)."""
        powers = torch.tensor([65536.0, 256.0, 1.0, 0.0], dtype=torch.float64, device=q.device)
        query = head_slopes(self.config).to(q.device)[:, None] / scale
        # Rounded once, then multiplied by powers of 256, which is exact: every digit sees the same slope.
        query = query.to(q.dtype) * powers.to(q.dtype)
        index = torch.arange(start, start + k.shape[1], device=k.device)
        digits = torch.stack([index // 65536, index // 256 % 256, index % 256, torch.zeros_like(index)], -1).to(k.dtype)
        q = torch.cat([q, query.expand(*q.shape[:2], -1, -1)], -1)
        return q, torch.cat([k, digits[:, None].expand(k.shape[0], -1, k.shape[2], -1)], -1)
