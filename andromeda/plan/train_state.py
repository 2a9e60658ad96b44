"""Bytes that training keeps between steps: weights, gradients, optimizer state and average, tensor by tensor.

Weights and gradients are float32 in every precision; what varies with it is computed in passing (see activations).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from andromeda.config.train import OptimizerConfig, TrainConfig
from andromeda.optim import roles
from andromeda.optim.adamw_8bit import BLOCK, quantizable

FLOAT = 4
"""Bytes of a float32, in which weights, gradients, moments and the optimizer's step counts are held."""
CODEBOOK = 256 * FLOAT
"""torchao keeps, with every quantized moment, the values that its 256 codes stand for."""


@dataclass(frozen=True)
class State:
    """Bytes by kind."""

    weights: int
    """Parameters and buffers."""
    gradients: int
    optimizer: int
    average: int
    """The moving average of the weights, if there is one."""

    @property
    def total(self) -> int:
        """All of it, as it is when an update begins."""
        return self.weights + self.gradients + self.optimizer + self.average


def state_bytes(model: nn.Module, train: TrainConfig) -> State:
    """The state of training a model (which may be on the meta device)."""
    trained = [p for p in model.parameters() if p.requires_grad]
    weights = _bytes(model.parameters()) + _bytes(model.buffers())
    average = sum(p.numel() * FLOAT for p in trained) if train.ema else 0
    return State(weights, _bytes(trained), optimizer_bytes(model, train.optim), average)


def optimizer_bytes(model: nn.Module, optim: OptimizerConfig) -> int:
    """State of the optimizer after its first step."""
    by_role = roles(model)
    return sum(_moments(p, by_role[name], optim) for name, p in model.named_parameters() if p.requires_grad)


def _moments(parameter: Tensor, role: str, optim: OptimizerConfig) -> int:
    """Bytes of one parameter's moments: one for Muon, two and a count of steps for AdamW, a byte an element each in 8 bits."""
    n = parameter.numel()
    if optim.kind == "muon" and role == "matrix":
        return n * FLOAT
    if optim.kind == "adamw8bit" and role != "embedding" and quantizable(parameter):
        return 2 * (n + n // BLOCK * FLOAT + CODEBOOK) + FLOAT
    return 2 * n * FLOAT + FLOAT


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
