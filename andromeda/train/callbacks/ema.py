"""An exponential moving average of the weights: e <- decay e + (1 - decay) w after every update taken.

From the first step on e would lean on the random start for about 1/(1-decay) steps; as in TensorFlow's
ExponentialMovingAverage the decay of update n is therefore min(decay, (1 + n) / (10 + n)).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn


class NoAverage:
    """Off."""

    def update(self) -> None:
        """Nothing."""

    def tensors(self) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def load(self, tensors: dict[str, Tensor], updates: int) -> None:
        """Nothing."""

    updates = 0

    def figures(self, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
        """Nothing."""
        return {}


class Average(NoAverage):
    """Float32 copies of all trained weights."""

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]], decay: float) -> None:
        self._decay, self.updates = decay, 0
        self._live = dict(parameters)
        self._mean = {name: p.detach().float().clone() for name, p in self._live.items()}

    @torch.no_grad()
    def update(self) -> None:
        """After an update of the weights."""
        self.updates += 1
        decay = min(self._decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(list(self._mean.values()), [p.detach().float() for p in self._live.values()], 1.0 - decay)

    def tensors(self) -> dict[str, Tensor]:
        """The averages by parameter name; live, not copied."""
        return self._mean

    def load(self, tensors: dict[str, Tensor], updates: int) -> None:
        """Take back what `tensors` gave."""
        self.updates = updates
        for name, mean in self._mean.items():
            mean.copy_(tensors[name])

    @torch.no_grad()
    def figures(self, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
        """What `measure` says of the averaged weights, each name with `_average` at its end; the weights are then put back."""
        held = [p.detach().clone() for p in self._live.values()]
        for p, mean in zip(self._live.values(), self._mean.values(), strict=True):
            p.copy_(mean)
        try:
            return {f"{name}_average": figure for name, figure in measure().items()}
        finally:
            for p, own in zip(self._live.values(), held, strict=True):
                p.copy_(own)


def build_average(model: nn.Module, decay: float) -> NoAverage:
    """The average that `train.ema` asks for; 0 is none."""
    return Average(model.named_parameters(), decay) if decay else NoAverage()
