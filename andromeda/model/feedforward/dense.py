"""Position-wise networks: an activation between two projections, or a gated product (arXiv 2002.05202)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from andromeda.config.derived import intermediate_size
from andromeda.config.model import ModelConfig
from andromeda.model import fused_qkv
from andromeda.model.cached_cast_linear import CachedCastLinear
from andromeda.model.float8_linear import Float8TrainingLinear
from andromeda.model.layers import Linear
from andromeda.model.master_weight_linear import MasterWeightLinear, compute_weight
from andromeda.ops import mlp
from andromeda.ops.mlp import gelu_mlp_fp8


def relu2(x: Tensor) -> Tensor:
    """relu(x)^2 (arXiv 2109.08668)."""
    x = F.relu(x)
    # Not x.square(), which autocast would take in float32.
    return x * x


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "relu2": relu2,
    "silu": F.silu,
}
GATES: dict[str, Callable[[Tensor], Tensor]] = {"swiglu": F.silu, "geglu": F.gelu, "reglu": F.relu}


class MLP(nn.Module):
    """W_out act(W_in x)."""

    def __init__(self, width: int, hidden: int, kind: str, bias: bool) -> None:
        super().__init__()
        self.inner = Linear(width, hidden, bias=bias)
        self.out = Linear(hidden, width, bias=bias)
        self.activation = ACTIVATIONS[kind]
        self._whole = kind == "gelu" and bias

    def forward(self, x: Tensor) -> Tensor:
        """x (..., C)."""
        # As one step where it may be: layers that were exchanged for others keep their own products.
        inner, out = self.inner, self.out
        if self._whole and type(inner) is type(out) in (Linear, MasterWeightLinear) and mlp.is_supported(x, *self.parameters()):
            return mlp.gelu_mlp(x, compute_weight(inner, x), inner.weight, inner.bias, compute_weight(out, x), out.weight, out.bias)
        if self._whole and isinstance(inner, Float8TrainingLinear) and isinstance(out, Float8TrainingLinear) and inner.accepts(x):
            return gelu_mlp_fp8(x, inner.cached_weight(), inner.weight, inner.bias, out.cached_weight(), out.weight, out.bias, inner.bound)
        return out(self.activation(inner(x)))


class GatedMLP(nn.Module):
    """W_out (gate(W_gate x) * W_in x)."""

    def __init__(self, width: int, hidden: int, kind: str, bias: bool) -> None:
        super().__init__()
        self.gate = Linear(width, hidden, bias=bias)
        self.inner = Linear(width, hidden, bias=bias)
        self.out = Linear(hidden, width, bias=bias)
        self.activation = GATES[kind]

    def forward(self, x: Tensor) -> Tensor:
        """x (..., C)."""
        pair = (self.gate, self.inner)
        # Weights that are cast side by side anyway; others would have to be copied.
        together = isinstance(self.gate, CachedCastLinear) and fused_qkv.should_fuse(x, pair)
        gate, inner = fused_qkv.split(fused_qkv.project(x, pair), pair) if together else (part(x) for part in pair)
        return self.out(self.activation(gate) * inner)


def build_mlp(config: ModelConfig, kind: str, bias: bool) -> nn.Module:
    """A dense or gated network of the configured inner width."""
    return (GatedMLP if kind in GATES else MLP)(config.hidden_size, intermediate_size(config), kind, bias)
