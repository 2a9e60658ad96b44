"""Linear layers that train in 16 bits with float32 master weights: weights are cast once for all micro-batches of a step, and the
matmuls that give weight gradients accumulate them in float32."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Self

import torch
from torch import Tensor, nn

from andromeda.model.cached_cast_linear import CachedCastLinear, convert_linears
from andromeda.model.layers import Linear, aligned, concat_biases
from andromeda.model.specs import LinearSpec
from andromeda.ops.compute_dtype import compute_dtype
from andromeda.ops.master_weight_linear import CastWeight, cast_linear, split_parts


class MasterWeightLinear(CachedCastLinear):
    """x W^T + b in the compute dtype `dtype`; elsewhere as `Linear`."""

    CACHED = CastWeight._fields
    rows: Tensor | None
    total: Tensor | None

    def __init__(self, linear: Linear, dtype: torch.dtype) -> None:
        super().__init__(linear)
        self.dtype = dtype

    def fused_spec(self) -> LinearSpec | None:
        """By weights cast once a step."""
        return LinearSpec("master_weight")

    def compute_weight(self, x: Tensor) -> CastWeight:
        """The weight in the dtype of matmuls with x: as it was cast before, where it is of this dtype."""
        return self.cached_weight() if self.accepts(x) else super().compute_weight(x)

    def accepts(self, x: Tensor) -> bool:
        """Whether the compute dtype of x is the one that was cast into."""
        return compute_dtype(x) == self.dtype

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) -> (..., O)."""
        if self.fused_with or not self.accepts(x):
            return super().forward(x)
        return cast_linear(x, self.cached_weight(), [self.weight], self.bias)

    def project(self, x: Tensor) -> Tensor:
        """x (..., K), which must be accepted -> the outputs of this layer and of those beside it, zeros at the end."""
        return cast_linear(x, self.cached_weight(), self.weights, concat_biases(self.fused_group))

    def cached_weight(self) -> CastWeight:
        """The weights of the group as they were cast; cast now if `refresh` never was called."""
        return CastWeight(self.fused_weight().to(self.dtype) if self.rows is None else self.rows, self.total)

    @classmethod
    def cast_all(cls, layers: Sequence[Self]) -> None:
        """Into the buffers that were allocated first, in one operation for all."""
        parts: list[Tensor] = []
        for layer in layers:
            if layer.rows is None:
                layer.rows = layer.zeros(layer.dtype)
            parts += layer.split(layer.rows)
        torch._foreach_copy_(parts, [weight for layer in layers for weight in layer.weights])

    def zeros(self, dtype: torch.dtype) -> Tensor:
        """As large as the weights of the group, concatenated."""
        height = aligned(sum(linear.out_features for linear in self.fused_group)) if self.fused_with else self.out_features
        return self.weight.new_zeros(height, self.in_features, dtype=dtype)

    def split(self, whole: Tensor) -> tuple[Tensor, ...]:
        """The rows that belong to each layer's weight."""
        return split_parts(whole, [linear.out_features for linear in self.fused_group])

    def begin_accumulation(self) -> None:
        """Zero gradients, to which matmuls add."""
        if not all(weight.requires_grad and weight.grad is None for weight in self.weights):
            return
        self.total = self.zeros(self.weight.dtype)
        for weight, part in zip(self.weights, self.split(self.total), strict=True):
            weight.grad = part


@contextlib.contextmanager
def accumulate_weight_grads(layers: Sequence[MasterWeightLinear]) -> Iterator[None]:
    """Within, backward passes accumulate the gradients of the layers' weights in `.grad` by the matmuls that compute them.

    autograd does not see them: hooks of these parameters are given None. Of a layer that no pass uses the gradient is zero, not None.
    """
    for layer in layers:
        layer.begin_accumulation()
    try:
        yield
    finally:
        for layer in layers:
            layer.total = None


def convert_to_master_weights(
    root: nn.Module, chosen: Callable[[str], bool], dtype: torch.dtype, cached: bool = True
) -> list[MasterWeightLinear]:
    """Convert the linear layers below `root` whose paths are chosen; returns those that lead a group. cached: see `convert_linears`."""
    return convert_linears(root, partial(MasterWeightLinear, dtype=dtype), chosen, lambda linear: True, cached=cached)
