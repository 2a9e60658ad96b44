"""Frequency scaling: how rotary frequencies are stretched so that a model reads further than it was trained.

Each rule is a pure function to `(inverse frequencies, logit factor)` and knows nothing of the rotation that uses them.
Sources: linear (position interpolation) arXiv 2306.15595; NTK-aware and dynamic NTK as described in arXiv 2309.00071,
section 3; YaRN arXiv 2309.00071, equations 21 to 25.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from andromeda.config.model import Scaling

Frequencies = tuple[Tensor, float]


def frequencies(theta: float, dim: int) -> Tensor:
    """theta^(-2i/dim) for i < dim/2, in float64."""
    return theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)


def unscaled(theta: float, dim: int, scaling: Scaling, context: int, span: int) -> Frequencies:
    """The frequencies as trained."""
    return frequencies(theta, dim), 1.0


def linear(theta: float, dim: int, scaling: Scaling, context: int, span: int) -> Frequencies:
    """Positions divided by the factor."""
    return frequencies(theta, dim) / scaling.factor, 1.0


def ntk(theta: float, dim: int, scaling: Scaling, context: int, span: int) -> Frequencies:
    """A larger base: the slowest pair is stretched by the whole factor, the fastest not at all."""
    return frequencies(theta * scaling.factor ** (dim / (dim - 2)), dim), 1.0


def dynamic(theta: float, dim: int, scaling: Scaling, context: int, span: int) -> Frequencies:
    """NTK whose factor follows the length: nothing changes for a sequence of at most the original context.

    `span` is the length the sequence will have in the end; it must be the same for all passes over one sequence.
    """
    original = _original(scaling, context)
    if span <= original:
        return frequencies(theta, dim), 1.0
    factor = scaling.factor * span / original - (scaling.factor - 1)
    return frequencies(theta * factor ** (dim / (dim - 2)), dim), 1.0


def yarn(theta: float, dim: int, scaling: Scaling, context: int, span: int) -> Frequencies:
    """Fast pairs stay, slow pairs are interpolated, a ramp between; logits grow by (0.1 ln factor + 1)^2."""
    inverse = frequencies(theta, dim)
    ramp = _index_ramp if scaling.ramp == "index" else _rotation_ramp
    kept = ramp(theta, dim, scaling, _original(scaling, context))
    return inverse / scaling.factor * (1 - kept) + inverse * kept, (0.1 * math.log(scaling.factor) + 1) ** 2


def _index_ramp(theta: float, dim: int, scaling: Scaling, original: int) -> Tensor:
    """Linear in the pair's index between the pairs that turn beta_fast and beta_slow times over the original context."""

    def index(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(index(scaling.beta_fast)), 0)
    high = min(math.ceil(index(scaling.beta_slow)), dim - 1)
    width = max(high - low, 1e-3)
    return 1 - ((torch.arange(dim // 2, dtype=torch.float64) - low) / width).clamp(0, 1)


def _rotation_ramp(theta: float, dim: int, scaling: Scaling, original: int) -> Tensor:
    """Linear in the number of rotations over the original context, as the paper's equation 23 has it."""
    rotations = original * frequencies(theta, dim) / (2 * math.pi)
    return ((rotations - scaling.beta_slow) / (scaling.beta_fast - scaling.beta_slow)).clamp(0, 1)


def _original(scaling: Scaling, context: int) -> int:
    return scaling.original_context or round(context / scaling.factor)


RULES: dict[str, Callable[[float, int, Scaling, int, int], Frequencies]] = {
    "none": unscaled,
    "linear": linear,
    "ntk": ntk,
    "dynamic": dynamic,
    "yarn": yarn,
}
