"""Linear layers that train in 16 bits: weights cast once for all micro-batches of a step, gradients added up by their products."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Self

import torch
from torch import Tensor, nn

from andromeda.model.cached_cast_linear import CastLinear, exchange_linears
from andromeda.model.layers import Linear, aligned, biases_side_by_side
from andromeda.ops.compute_dtype import compute_dtype
from andromeda.ops.master_weight_linear import CastWeight, split_parts, cast_linear


class Linear16(CastLinear):
    """x W^T + b where products are of this type; elsewhere as it was."""

    FIELDS = CastWeight._fields
    rows: Tensor | None
    total: Tensor | None

    def __init__(self, linear: Linear, dtype: torch.dtype) -> None:
        super().__init__(linear)
        self.dtype = dtype

    def accepts(self, x: Tensor) -> bool:
        """Where products are of the type that was cast into."""
        return compute_dtype(x) == self.dtype

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) -> (..., O)."""
        if self.beside or not self.accepts(x):
            return super().forward(x)
        return cast_linear(x, self.cast(), [self.weight], self.bias)

    def project(self, x: Tensor) -> Tensor:
        """x (..., K), which must be accepted -> the outputs of this layer and of those beside it, zeros at the end."""
        return cast_linear(x, self.cast(), self.weights, biases_side_by_side(self.together))

    def cast(self) -> CastWeight:
        """The weight, with those of the layers beside, as it was cast; cast now if `refresh` never was called."""
        return CastWeight(self.joined().to(self.dtype) if self.rows is None else self.rows, self.total)

    @classmethod
    def fill(cls, layers: Sequence[Self]) -> None:
        """Into the memory that was taken first, in one operation for all."""
        parts: list[Tensor] = []
        for layer in layers:
            if layer.rows is None:
                layer.rows = layer.zeros(layer.dtype)
            parts += layer.apart(layer.rows)
        torch._foreach_copy_(parts, [weight for layer in layers for weight in layer.weights])

    def zeros(self, dtype: torch.dtype) -> Tensor:
        """As large as the weights of all together."""
        height = aligned(sum(linear.out_features for linear in self.together)) if self.beside else self.out_features
        return self.weight.new_zeros(height, self.in_features, dtype=dtype)

    def apart(self, whole: Tensor) -> tuple[Tensor, ...]:
        """The rows that belong to each layer's weight."""
        return split_parts(whole, [linear.out_features for linear in self.together])

    def begin(self) -> None:
        """Gradients of zeros, to which products add."""
        if not all(weight.requires_grad and weight.grad is None for weight in self.weights):
            return
        self.total = self.zeros(self.weight.dtype)
        for weight, part in zip(self.weights, self.apart(self.total), strict=True):
            weight.grad = part


@contextlib.contextmanager
def summed(layers: Sequence[Linear16]) -> Iterator[None]:
    """Within, backward passes add up the gradients of the layers' weights by the products that make them, in `.grad`.

    autograd does not see them: hooks of these parameters are given None. Of a layer that no pass uses the gradient is zero, not None.
    """
    for layer in layers:
        layer.begin()
    try:
        yield
    finally:
        for layer in layers:
            layer.total = None


def exchange(root: nn.Module, chosen: Callable[[str], bool], dtype: torch.dtype) -> list[Linear16]:
    """Exchange the linear layers below `root` whose paths are chosen; returns those that lead a product."""
    return exchange_linears(root, partial(Linear16, dtype=dtype), chosen, lambda linear: True)


def weight16(linear: nn.Linear, x: Tensor) -> CastWeight:
    """A layer's weight for products of x: as it was cast before, or cast now."""
    if isinstance(linear, Linear16) and linear.accepts(x):
        return linear.cast()
    return CastWeight(linear.weight.detach().to(compute_dtype(x)), None)
