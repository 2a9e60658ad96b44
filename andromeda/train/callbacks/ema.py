"""Exponential moving average of the weights: e <- d e + (1 - d) w after every update taken, d = min(decay, (1 + n) / (10 + n)).

The warm-up of d is that of TensorFlow's ExponentialMovingAverage: with a constant decay, e would depend on the random initial
weights for about 1 / (1 - decay) steps.

Not torch.optim.swa_utils.AveragedModel: it deep-copies the module, whose checkpointed and compiled block forwards would stay bound to
the original's weights, and its first update copies the weights where this one averages them with the initial ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from andromeda.utils.dtensor import as_sharded, local


class ExponentialMovingAverage:
    """Float32 averages of all trained weights, by parameter name."""

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]], decay: float) -> None:
        self._decay, self.updates = decay, 0
        self._parameters = dict(parameters)
        self._averages = {name: p.detach().float().clone() for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Call after every update of the weights."""
        self.updates += 1
        decay = min(self._decay, (1 + self.updates) / (10 + self.updates))
        weights = [local(p.detach()).float() for p in self._parameters.values()]
        torch._foreach_lerp_([local(average) for average in self._averages.values()], weights, 1.0 - decay)

    def state_tensors(self) -> dict[str, Tensor]:
        """The averages by parameter name; live, not copied."""
        return self._averages

    def load_state(self, tensors: Mapping[str, Tensor], updates: int) -> None:
        """Restore what `state_tensors` returned after `updates` updates."""
        self.updates = updates
        for name, average in self._averages.items():
            average.copy_(as_sharded(tensors[name], average))

    @torch.no_grad()
    def evaluate(self, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
        """The metrics that `measure` returns with the averaged weights in the model, `_average` appended to each name.

        The weights are restored afterwards, also when `measure` raises.
        """
        weights = [p.detach().clone() for p in self._parameters.values()]
        for p, average in zip(self._parameters.values(), self._averages.values(), strict=True):
            p.copy_(average)
        try:
            return {f"{name}_average": value for name, value in measure().items()}
        finally:
            for p, weight in zip(self._parameters.values(), weights, strict=True):
                p.copy_(weight)


def build_ema(model: nn.Module, decay: float) -> ExponentialMovingAverage | None:
    """The average that `train.ema` asks for; None for a decay of 0."""
    return ExponentialMovingAverage(model.named_parameters(), decay) if decay else None
