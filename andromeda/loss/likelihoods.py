"""Likelihoods of targets that are not classes: how the outputs of a head are compared with the truth, in nats.

Each is the negative logarithm of a density, constants included, so that losses of different heads are in one unit. A target that
does not count is -100 for classes, NaN for numbers and 255 for labels that are there or not. Outputs are computed in float32 at
least, also under autocast.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from andromeda.loss.loss_task import LossHead, LossSums

NOT_LABELED = 255
"""A label of which it is not known whether it is there."""
LOG_TWO_PI = math.log(2 * math.pi)
MAX_LOG_SCALE = 20.0
"""Bound of a learned log scale: at a perfect fit the likelihood is without bound."""


def head_outputs(head: LossHead, hidden: Tensor) -> Tensor:
    """Outputs of a head for hidden states (..., C), in float32 at least."""
    with torch.autocast(hidden.device.type, enabled=False):
        return head(hidden.to(torch.promote_types(hidden.dtype, torch.float32)))


def masked_sums(loss: Tensor, counted: Tensor) -> LossSums:
    """Sums of `loss` where `counted` holds, of one shape."""
    total = torch.where(counted, loss, 0.0).sum()
    return LossSums(total, total.detach(), counted.sum())


@dataclass(frozen=True)
class Bernoulli:
    """Labels that are there or not: binary cross entropy of K logits; target (B, T, K), 0 or 1, or shares in between.

    Integer targets are 255 where a label is unknown, floating ones NaN.
    """

    def count(self, target: Tensor) -> Tensor:
        """Labels that are known, shape ()."""
        return self._counted(target).sum()

    def __call__(self, head: LossHead, hidden: Tensor, target: Tensor) -> LossSums:
        """The sums over the labels that are known."""
        counted, logits = self._counted(target), head_outputs(head, hidden)
        truth = torch.where(counted, target, torch.zeros_like(target)).to(logits.dtype)
        return masked_sums(F.binary_cross_entropy_with_logits(logits, truth, reduction="none"), counted)

    def _counted(self, target: Tensor) -> Tensor:
        return ~target.isnan() if target.is_floating_point() else target != NOT_LABELED


@dataclass(frozen=True)
class SoftCategorical:
    """Shares of K classes that sum to one: cross entropy; target (B, T, K), NaN where it does not count."""

    def count(self, target: Tensor) -> Tensor:
        """Distributions that are known, shape ()."""
        return (~target.isnan().any(-1)).sum()

    def __call__(self, head: LossHead, hidden: Tensor, target: Tensor) -> LossSums:
        """The sums over the distributions that are known."""
        counted = ~target.isnan().any(-1)
        log_p = F.log_softmax(head_outputs(head, hidden), -1)
        return masked_sums(-(torch.where(counted[..., None], target, 0.0).to(log_p.dtype) * log_p).sum(-1), counted)


Density = Callable[[Tensor, Tensor, Tensor], Tensor]


def gaussian_nll(truth: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """-log N(truth; mean, exp(log_scale)^2)."""
    return 0.5 * ((truth - mean) * torch.exp(-log_scale)).square() + log_scale + 0.5 * LOG_TWO_PI


def laplace_nll(truth: Tensor, median: Tensor, log_scale: Tensor) -> Tensor:
    """-log Laplace(truth; median, exp(log_scale))."""
    return (truth - median).abs() * torch.exp(-log_scale) + log_scale + math.log(2)


def poisson_nll(truth: Tensor, log_rate: Tensor) -> Tensor:
    """-log Poisson(truth; exp(log_rate))."""
    return torch.exp(log_rate) - truth * log_rate + torch.lgamma(truth + 1)


@dataclass(frozen=True)
class Numeric:
    """Numbers, target (B, T) with NaN where there is none; the head gives one output, or location and log scale.

    gaussian and laplace compare (target - shift) / scale with the outputs, and have scale one where it is not learned. poisson compares
    the target, a count, with the rate exp(output).
    """

    likelihood: str = "gaussian"
    shift: float = 0.0
    scale: float = 1.0
    learn_scale: bool = False

    def count(self, target: Tensor) -> Tensor:
        """Numbers that are known, shape ()."""
        return (~target.isnan()).sum()

    def __call__(self, head: LossHead, hidden: Tensor, target: Tensor) -> LossSums:
        """The sums over the numbers that are known."""
        counted, outputs = ~target.isnan(), head_outputs(head, hidden)
        truth = torch.where(counted, target, 0.0).to(torch.promote_types(outputs.dtype, target.dtype))
        if self.likelihood == "poisson":
            return masked_sums(poisson_nll(truth, outputs[..., 0]).to(outputs.dtype), counted)
        truth = ((truth - self.shift) / self.scale).to(outputs.dtype)
        nll = gaussian_nll if self.likelihood == "gaussian" else laplace_nll
        return masked_sums(nll(truth, outputs[..., 0], self.log_scale(outputs)), counted)

    def log_scale(self, outputs: Tensor) -> Tensor:
        """Log scale of outputs (..., K), in units of `scale`, shape (...)."""
        if not self.learn_scale:
            return torch.zeros_like(outputs[..., 0])
        return outputs[..., 1].clamp(-MAX_LOG_SCALE, MAX_LOG_SCALE)

    def predict(self, outputs: Tensor) -> Tensor:
        """The number that outputs (..., K) stand for, shape (...): the mean, or the median of laplace."""
        return outputs[..., 0].exp() if self.likelihood == "poisson" else outputs[..., 0] * self.scale + self.shift
