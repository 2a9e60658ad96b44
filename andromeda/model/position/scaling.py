"""Frequency scaling: how rotary frequencies change so that a model reads further than it was trained.

Each rule is a pure function of the frequencies and knows nothing of the rotation that uses them.
Sources: linear (position interpolation) arXiv 2306.15595; NTK-aware and dynamic NTK as described in arXiv 2309.00071,
section 3; YaRN arXiv 2309.00071, equations 21 to 25.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from andromeda.config.model import RotaryConfig


@dataclass(frozen=True)
class Span:
    """What is rotated: `dim` dimensions of a head, over a sequence of `length` tokens, by a model trained on `original` tokens."""

    dim: int
    length: int
    original: int
    device: torch.device | None = None

    def frequencies(self, theta: float) -> Tensor:
        """theta^(-2i/dim) for i < dim/2, in float64, made on the device so that a pass copies nothing to it."""
        return theta ** (-torch.arange(0, self.dim, 2, dtype=torch.float64, device=self.device) / self.dim)


@dataclass(frozen=True)
class Scaled:
    """What a rule gives."""

    inverse: Tensor
    """Inverse frequency of each pair (dim/2,)."""
    extension: float = 1.0
    """How many times longer the context has become; xPos's decay is scaled by it too."""
    logit_factor: float = 1.0
    """Multiplies the softmax scale; it does not depend on the length."""


def unscaled(rotary: RotaryConfig, span: Span) -> Scaled:
    """The frequencies as trained."""
    return Scaled(span.frequencies(rotary.theta))


def linear(rotary: RotaryConfig, span: Span) -> Scaled:
    """Position interpolation: theta^(-2i/dim) / factor, which is positions divided by the factor (arXiv 2306.15595, equation 4)."""
    return Scaled(span.frequencies(rotary.theta) / rotary.scaling.factor, rotary.scaling.factor)


def ntk(rotary: RotaryConfig, span: Span) -> Scaled:
    """NTK-aware: the base theta * factor^(dim / (dim - 2)), which divides the slowest pair by the factor and leaves the fastest alone
    (arXiv 2309.00071, section 3.1)."""
    return _larger_base(rotary, span, rotary.scaling.factor)


def dynamic(rotary: RotaryConfig, span: Span) -> Scaled:
    """NTK whose factor follows the length: nothing changes for a sequence of at most the original context.

    The length must be the same for all passes over one sequence, or cached keys would be turned by other frequencies.
    """
    grown = max(span.length / span.original, 1.0)
    return _larger_base(rotary, span, rotary.scaling.factor * grown - (rotary.scaling.factor - 1))


def yarn(rotary: RotaryConfig, span: Span) -> Scaled:
    """Fast pairs are kept, slow pairs interpolated, with a ramp between; logits are multiplied by (0.1 ln factor + 1)^2
    (arXiv 2309.00071, equations 17 to 25)."""
    factor, inverse = rotary.scaling.factor, span.frequencies(rotary.theta)
    ramp = {"index": _index_ramp, "rotations": _rotation_ramp}[rotary.scaling.ramp]
    kept = ramp(rotary, span)
    return Scaled(inverse / factor * (1 - kept) + inverse * kept, factor, (0.1 * math.log(factor) + 1) ** 2)


def llama3(rotary: RotaryConfig, span: Span) -> Scaled:
    """Llama 3's rule: YaRN's ramp over rotations; logits stay (arXiv 2407.21783; the formula is that of the released code)."""
    factor, inverse = rotary.scaling.factor, span.frequencies(rotary.theta)
    kept = _rotation_ramp(rotary, span)
    return Scaled(inverse / factor * (1 - kept) + inverse * kept, factor)


def _larger_base(rotary: RotaryConfig, span: Span, factor: float) -> Scaled:
    # A single pair has frequency one whatever the base.
    exponent = span.dim / max(span.dim - 2, 1)
    return Scaled(span.frequencies(rotary.theta * factor**exponent), factor)


def _index_ramp(rotary: RotaryConfig, span: Span) -> Tensor:
    """Linear in the pair's index between the pairs that turn beta_fast and beta_slow times over the original context."""

    def index(rotations: float) -> float:
        return span.dim * math.log(span.original / (rotations * 2 * math.pi)) / (2 * math.log(rotary.theta))

    low = max(math.floor(index(rotary.scaling.beta_fast)), 0)
    high = min(math.ceil(index(rotary.scaling.beta_slow)), span.dim - 1)
    width = max(high - low, 1e-3)
    return 1 - ((torch.arange(span.dim // 2, dtype=torch.float64, device=span.device) - low) / width).clamp(0, 1)


def _rotation_ramp(rotary: RotaryConfig, span: Span) -> Tensor:
    """Linear in the number of rotations over the original context, as the paper's equation 23 has it."""
    rotations = span.original * span.frequencies(rotary.theta) / (2 * math.pi)
    slow, fast = rotary.scaling.beta_slow, rotary.scaling.beta_fast
    return ((rotations - slow) / (fast - slow)).clamp(0, 1)


RULES: dict[str, Callable[[RotaryConfig, Span], Scaled]] = {
    "none": unscaled,
    "linear": linear,
    "ntk": ntk,
    "dynamic": dynamic,
    "yarn": yarn,
    "llama3": llama3,
}
