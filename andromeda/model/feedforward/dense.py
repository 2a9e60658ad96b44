"""Position-wise networks: an activation between two projections, or a gated product (arXiv 2002.05202)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from andromeda.config.model import FeedForward, ModelConfig


def relu2(x: Tensor) -> Tensor:
    """relu(x)^2 (arXiv 2109.08668)."""
    return F.relu(x).square()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "relu2": relu2,
    "silu": F.silu,
}
GATES: dict[str, Callable[[Tensor], Tensor]] = {"swiglu": F.silu, "geglu": F.gelu, "reglu": F.relu}


def hidden_width(config: FeedForward, kind: str, width: int) -> int:
    """Inner width: `hidden`, or mult x width; gated kinds take two thirds of that, to a multiple of 64, for equal parameters."""
    if config.hidden:
        return config.hidden
    inner = config.mult * width
    return max(64, round(inner * 2 / 3 / 64) * 64) if kind in GATES else int(inner)


class Dense(nn.Module):
    """W_out act(W_in x)."""

    def __init__(self, width: int, hidden: int, kind: str, bias: bool) -> None:
        super().__init__()
        self.inner = nn.Linear(width, hidden, bias=bias)
        self.out = nn.Linear(hidden, width, bias=bias)
        self.activation = ACTIVATIONS[kind]

    def forward(self, x: Tensor) -> Tensor:
        """x (..., C)."""
        return self.out(self.activation(self.inner(x)))


class Gated(nn.Module):
    """W_out (gate(W_gate x) * W_in x)."""

    def __init__(self, width: int, hidden: int, kind: str, bias: bool) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=bias)
        self.inner = nn.Linear(width, hidden, bias=bias)
        self.out = nn.Linear(hidden, width, bias=bias)
        self.activation = GATES[kind]

    def forward(self, x: Tensor) -> Tensor:
        """x (..., C)."""
        return self.out(self.activation(self.gate(x)) * self.inner(x))


def build_dense(config: ModelConfig) -> nn.Module:
    """The dense or gated network that the configuration asks for."""
    ff = config.feedforward
    part = Gated if ff.kind in GATES else Dense
    return part(config.width, hidden_width(ff, ff.kind, config.width), ff.kind, ff.bias)
