"""How much each task counts: fixed weights, or weights that follow the losses or the gradients.

A balance is asked for its weights before a step, and told afterwards the mean loss of each task over the whole step (and, if it asks,
the norm of its gradient). Weights are constants of a step: so any split of a step into micro-batches has the same gradient. Tasks
without a target in a step do not take part in what is learned from it. All state is in float64 and is saved with the run.

Kurin et al. (arXiv 2201.04122) found tuned fixed weights as good as the adaptive methods: compare with them first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from andromeda.config.loss import LossConfig

WIDE = torch.float64
MIN_WEIGHT = 1e-6
"""Bound of the weights of gradient normalization, which a step could otherwise take below zero."""
MAX_LOG_VARIANCE = 10.0
"""Bound of the learned log variances: a loss that goes to zero would send them to minus infinity."""


class FixedWeights:
    """The declared weights."""

    adapts: ClassVar[bool] = False
    """Whether the weights change during a run."""
    needs_gradients: ClassVar[bool] = False
    """Whether `update` must be told the norm of each task's gradient."""

    def __init__(self, declared: Sequence[float], squared: Sequence[bool], config: LossConfig) -> None:
        """declared: weights (T,). squared: which losses are squared or absolute errors and not those of classes."""
        del squared
        self._config = config
        self._declared = torch.tensor(declared, dtype=WIDE)

    @property
    def weights(self) -> Tensor:
        """Of the next step, (T,)."""
        return self._declared

    def update(self, losses: Tensor, present: Tensor, norms: Tensor | None = None) -> None:
        """Learn from a step. losses (T,): means over the step; present (T,): which tasks had targets; norms (T,): of their gradients."""

    def state_tensors(self) -> dict[str, Tensor]:
        """What is learned, by name; live, not copied."""
        return {}

    def load_state(self, saved: Mapping[str, Tensor]) -> None:
        """Restore what `state_tensors` returned. Raises KeyError where something is missing."""
        for name, value in self.state_tensors().items():
            value.copy_(saved[name])

    def to(self, device: torch.device) -> FixedWeights:
        """Moved to a device, in place."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value.to(device))
        return self


class _Adam:
    """Adam (arXiv 1412.6980) for a handful of numbers, with its state among the tensors of the balance that it belongs to."""

    BETAS, EPS = (0.9, 0.999), 1e-8

    @classmethod
    def step(cls, value: Tensor, gradient: Tensor, state: Tensor, lr: float, present: Tensor) -> None:
        """Update `value` (T,) in place where `present` holds. state (3, T): both moments and the number of updates."""
        first, second = cls.BETAS
        new = torch.stack([torch.lerp(gradient, state[0], first), torch.lerp(gradient.square(), state[1], second), state[2] + 1])
        state.copy_(torch.where(present, new, state))
        count = state[2].clamp(min=1)
        step = state[0] / (1 - first**count) / ((state[1] / (1 - second**count)).sqrt() + cls.EPS)
        value.sub_(torch.where(present, lr * step, 0.0))


class UncertaintyWeights(FixedWeights):
    """Homoscedastic uncertainty (Kendall et al., arXiv 1705.07115): sum of e^-s L + s/2 for classes and e^-s L/2 + s/2 for errors.

    The log variances s are learned with the model, by Adam without decay. At the optimum e^s = 2 L for classes and L for errors.
    """

    adapts = True

    def __init__(self, declared: Sequence[float], squared: Sequence[bool], config: LossConfig) -> None:
        super().__init__(declared, squared, config)
        self._factor = torch.tensor([0.5 if one else 1.0 for one in squared], dtype=WIDE)
        self.log_variance = torch.zeros(len(declared), dtype=WIDE)
        self.adam = torch.zeros(3, len(declared), dtype=WIDE)

    @property
    def weights(self) -> Tensor:
        """declared factor e^-s."""
        return self._declared * self._factor * torch.exp(-self.log_variance)

    def update(self, losses: Tensor, present: Tensor, norms: Tensor | None = None) -> None:
        """One step down d/ds: declared (1/2 - factor e^-s L)."""
        gradient = self._declared * (0.5 - self._factor * torch.exp(-self.log_variance) * losses)
        _Adam.step(self.log_variance, gradient, self.adam, self._config.weight_lr, present)
        self.log_variance.clamp_(-MAX_LOG_VARIANCE, MAX_LOG_VARIANCE)

    def state_tensors(self) -> dict[str, Tensor]:
        """Log variances and Adam's state."""
        return {"log_variance": self.log_variance, "adam": self.adam}


class GradNormWeights(FixedWeights):
    """Gradient normalization (Chen et al., arXiv 1711.02257): tasks that have come less far get larger gradients.

    With G_i = |w_i grad_W L_i|, the relative inverse training rate r_i = (L_i(t) / L_i(0)) / mean and the target mean(G) r_i^alpha, held
    constant, the weights take a step down sum |G_i - mean(G) r_i^alpha| and are scaled so that they sum as the declared ones do.
    """

    adapts = needs_gradients = True

    def __init__(self, declared: Sequence[float], squared: Sequence[bool], config: LossConfig) -> None:
        super().__init__(declared, squared, config)
        self.task_weights = self._declared.clone()
        self.first_losses = torch.zeros(len(declared), dtype=WIDE)
        self.adam = torch.zeros(3, len(declared), dtype=WIDE)

    @property
    def weights(self) -> Tensor:
        """The learned ones."""
        return self.task_weights

    def update(self, losses: Tensor, present: Tensor, norms: Tensor | None = None) -> None:
        """One step of the weights; the first loss of each task is what later ones are compared with."""
        assert norms is not None
        self.first_losses.copy_(torch.where((self.first_losses == 0) & present, losses, self.first_losses))
        gradient = gradnorm_gradient(self.task_weights, norms, losses, self.first_losses, present, self._config.alpha)
        _Adam.step(self.task_weights, gradient, self.adam, self._config.weight_lr, present)
        self.task_weights.clamp_(min=MIN_WEIGHT)
        self.task_weights.mul_(self._declared.sum() / self.task_weights.sum())

    def state_tensors(self) -> dict[str, Tensor]:
        """Weights, first losses and Adam's state."""
        return {"task_weights": self.task_weights, "first_losses": self.first_losses, "adam": self.adam}


def gradnorm_gradient(weights: Tensor, norms: Tensor, losses: Tensor, first: Tensor, present: Tensor, alpha: float) -> Tensor:
    """d/dw of sum |G_i - mean(G) r_i^alpha| over the tasks that are present, all (T,); norms are those of unweighted losses."""
    count = present.sum().clamp(min=1)
    ratio = torch.where(present, losses / torch.where(first == 0, 1.0, first), 0.0)
    rate = ratio / (ratio.sum() / count).clamp(min=1e-300)
    sizes = torch.where(present, weights * norms, 0.0)
    target = sizes.sum() / count * rate.pow(alpha)
    return torch.where(present, torch.sign(sizes - target) * norms, 0.0)


class LossRateWeights(FixedWeights):
    """Equal loss rate, as dynamic weight average (Liu et al., arXiv 1803.10704): w_i proportional to exp(r_i / temperature).

    r_i = L_i(k - 1) / L_i(k - 2) compares the mean losses of the last two spans of `every` steps; the weights sum as declared.
    """

    adapts = True

    def __init__(self, declared: Sequence[float], squared: Sequence[bool], config: LossConfig) -> None:
        super().__init__(declared, squared, config)
        self.sums = torch.zeros(2, len(declared), dtype=WIDE)
        """Losses of the span that is under way, and its steps with targets."""
        self.means = torch.zeros(2, len(declared), dtype=WIDE)
        """Of the last two spans, the older one first; 0 where there is none."""
        self.steps = torch.zeros((), dtype=WIDE)

    @property
    def weights(self) -> Tensor:
        """The declared ones until two spans are known."""
        older, newer = self.means
        rate = torch.where((older > 0) & (newer > 0), newer / torch.where(older > 0, older, 1.0), 1.0)
        share = self._declared * torch.exp(rate / self._config.temperature)
        return self._declared.sum() * share / share.sum()

    def update(self, losses: Tensor, present: Tensor, norms: Tensor | None = None) -> None:
        """Count a step, and close the span after `every` steps."""
        self.sums += torch.stack([torch.where(present, losses, 0.0), present.to(WIDE)])
        self.steps += 1
        closed = self.steps >= self._config.every
        mean = self.sums[0] / self.sums[1].clamp(min=1)
        self.means.copy_(torch.where(closed, torch.stack([self.means[1], mean]), self.means))
        self.sums.mul_(~closed)
        self.steps.mul_(~closed)

    def state_tensors(self) -> dict[str, Tensor]:
        """Both spans and the one under way."""
        return {"sums": self.sums, "means": self.means, "steps": self.steps}


BALANCES: dict[str, type[FixedWeights]] = {
    "fixed": FixedWeights,
    "uncertainty": UncertaintyWeights,
    "gradnorm": GradNormWeights,
    "dwa": LossRateWeights,
}
"""By the name in `loss.balance`."""
