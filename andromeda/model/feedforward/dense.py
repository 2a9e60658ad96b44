"""Position-wise networks: an activation between two linear layers, or a gated one (arXiv 2002.05202).

Shapes: C width, H inner width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from andromeda.config.derived import intermediate_size
from andromeda.config.model import ModelConfig
from andromeda.model import fused_qkv
from andromeda.model.layers import Linear
from andromeda.model.specs import FusableModule, MLPSpec, spec_of
from andromeda.model.tensor_plan import TensorPlan, check_divides
from andromeda.ops import mlp
from andromeda.ops.mlp import gelu_mlp_fp8


def relu2(x: Tensor) -> Tensor:
    """relu(x)^2 (arXiv 2109.08668)."""
    x = F.relu(x)
    # Not x.square(), which autocast would compute in float32.
    return x * x


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "relu2": relu2,
    "silu": F.silu,
}
GATES: dict[str, Callable[[Tensor], Tensor]] = {"swiglu": F.silu, "geglu": F.gelu, "geglu_tanh": ACTIVATIONS["gelu_tanh"], "reglu": F.relu}


def reference(net: Any, x: Tensor) -> Tensor:
    """W_out act(W_in x), by the linear layers themselves."""
    out: Tensor = net.out(net.activation(net.inner(x)))
    return out


def gelu_16bit(net: Any, x: Tensor) -> Tensor:
    """By the kernel for GELU with biases in 16 bits, where it takes x."""
    inner, out = net.inner, net.out
    if not mlp.is_supported(x, inner.weight, inner.bias, out.weight, out.bias):
        return reference(net, x)
    return mlp.gelu_mlp(x, inner.compute_weight(x), inner.weight, inner.bias, out.compute_weight(x), out.weight, out.bias)


def gelu_float8(net: Any, x: Tensor) -> Tensor:
    """By the kernel for GELU with biases in 8 bits, where it takes x."""
    inner, out = net.inner, net.out
    if not inner.accepts(x):
        return reference(net, x)
    return gelu_mlp_fp8(x, inner.cached_weight(), inner.weight, inner.bias, out.cached_weight(), out.weight, out.bias, inner.bound)


KERNELS: dict[str, Callable[[Any, Tensor], Tensor]] = {"plain": gelu_16bit, "master_weight": gelu_16bit, "float8": gelu_float8}
"""For GELU with biases, by how both linear layers compute (LinearSpec)."""


def split_inner(out: Linear, count: int, *readers: str) -> TensorPlan:
    """The plan of a network whose layers `readers` give the features that `out` reads."""
    check_divides(count, out.in_features, "the inner features of the feed-forward network")
    return TensorPlan({f"{name}.{kind}": 0 for name in readers for kind in ("weight", "bias")} | {"out.weight": 1}, ("out.bias",))


class MLP(FusableModule):
    """W_out act(W_in x)."""

    supports_cuda_graph = True

    def __init__(self, width: int, hidden: int, kind: str, bias: bool) -> None:
        super().__init__()
        self.inner = Linear(width, hidden, bias=bias)
        self.out = Linear(hidden, width, bias=bias, init="output")
        self.kind, self.bias = kind, bias
        self.activation = ACTIVATIONS[kind]
        self.match_kernels()

    def match_kernels(self) -> None:
        """The kernel for both linear layers and the activation, if there is one."""
        inner, out = spec_of(self.inner), spec_of(self.out)
        matched = self.kind == "gelu" and self.bias and inner is not None and inner == out
        self.compute = KERNELS[inner.compute] if matched else reference

    def fused_spec(self) -> MLPSpec | None:
        """Two linear layers with an activation between them."""
        return MLPSpec(self.kind)

    def tensor_plan(self, count: int) -> TensorPlan:
        """By inner features."""
        return split_inner(self.out, count, "inner")

    def input_layers(self) -> tuple[Linear, ...]:
        """Layers that read the input of the part itself."""
        return (self.inner,)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., C) -> (..., C)."""
        return self.compute(self, x)

    def flops(self, keys: Callable[[int], float]) -> dict[str, float]:
        """Of one token."""
        return {"feed-forward": self.inner.flops() + self.out.flops()}

    def saved_per_token(self) -> int:
        """Numbers that the backward pass keeps at least: the inner activations."""
        return self.inner.out_features


class GatedMLP(FusableModule):
    """W_out (gate(W_gate x) * W_in x)."""

    supports_cuda_graph = True

    def __init__(self, width: int, hidden: int, kind: str, bias: bool) -> None:
        super().__init__()
        self.gate = Linear(width, hidden, bias=bias)
        self.inner = Linear(width, hidden, bias=bias)
        self.out = Linear(hidden, width, bias=bias, init="output")
        self.activation = GATES[kind]
        self.match_kernels()

    def match_kernels(self) -> None:
        """Whether both inner matrices are one matmul: those that were cast as one; others would have to be copied."""
        self.project_pair = fused_qkv.match((self.gate, self.inner), concat=False)

    def tensor_plan(self, count: int) -> TensorPlan:
        """By inner features."""
        return split_inner(self.out, count, "gate", "inner")

    def input_layers(self) -> tuple[Linear, ...]:
        """Layers that read the input of the part itself."""
        return self.gate, self.inner

    def forward(self, x: Tensor) -> Tensor:
        """x (..., C) -> (..., C)."""
        pair = (self.gate, self.inner)
        fused = self.project_pair(x, pair)
        gate, inner = (self.gate(x), self.inner(x)) if fused is None else fused_qkv.split(fused, pair)
        return self.out(self.activation(gate) * inner)

    def flops(self, keys: Callable[[int], float]) -> dict[str, float]:
        """Of one token."""
        return {"feed-forward": self.gate.flops() + self.inner.flops() + self.out.flops()}

    def saved_per_token(self) -> int:
        """Numbers that the backward pass keeps at least: the inner activations."""
        return self.inner.out_features


def build_mlp(config: ModelConfig, kind: str, bias: bool) -> MLP | GatedMLP:
    """A dense or gated network of the configured inner width."""
    return (GatedMLP if kind in GATES else MLP)(config.hidden_size, intermediate_size(config), kind, bias)
