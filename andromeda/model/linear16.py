"""Linear layers that train in 16 bits: weights cast once for all micro-batches of a step, gradients added up by their products."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Self

import torch
from torch import Tensor, nn

from andromeda.kernels.linear16 import Weight16, linear16
from andromeda.kernels.precision import product_dtype
from andromeda.model.cast_linear import CastLinear
from andromeda.model.cast_linear import exchange as exchange_any
from andromeda.model.layers import Linear, side_by_side


class Linear16(CastLinear):
    """x W^T + b where gradients are wanted and products are of this type; elsewhere as it was."""

    FIELDS = Weight16._fields
    rows: Tensor | None
    total: Tensor | None

    def __init__(self, linear: Linear, dtype: torch.dtype) -> None:
        super().__init__(linear)
        self.dtype = dtype

    def accepts(self, x: Tensor) -> bool:
        """Without gradients there is one product, and nothing that is gained."""
        return torch.is_grad_enabled() and product_dtype(x) == self.dtype

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) -> (..., O)."""
        if self.beside or not self.accepts(x):
            return super().forward(x)
        return linear16(x, self.cast(), [self.weight], self.bias)

    def project(self, x: Tensor) -> Tensor:
        """x (..., K), which must be accepted -> the outputs of this layer and of those beside it, zeros at the end."""
        return linear16(x, self.cast(), [linear.weight for linear in self.together], side_by_side(self.together)[1])

    def cast(self) -> Weight16:
        """The weight, with those of the layers beside, as it was cast; cast now if `refresh` never was called."""
        return Weight16(self.joined().to(self.dtype) if self.rows is None else self.rows, self.total)

    @classmethod
    def fill(cls, layers: Sequence[Self]) -> None:
        """Into the memory that was taken first, in one operation for all."""
        for layer in layers:
            if layer.rows is None:
                layer.rows = layer.joined().to(layer.dtype)
        parts = [part for layer in layers for part in layer.parts(layer.rows)]
        torch._foreach_copy_(parts, [linear.weight for layer in layers for linear in layer.together])

    def parts(self, whole: Tensor | None) -> list[Tensor]:
        """Of the whole, the rows that belong to each layer's weight."""
        assert whole is not None
        sizes = [linear.out_features for linear in self.together]
        return list(whole.split([*sizes, len(whole) - sum(sizes)]))[: len(sizes)]

    def begin(self) -> None:
        """Gradients of zeros, to which products add."""
        weights = [linear.weight for linear in self.together]
        if not all(weight.requires_grad and weight.grad is None for weight in weights):
            return
        height = len(self.joined() if self.rows is None else self.rows)
        self.total = self.weight.new_zeros(height, self.in_features)
        for weight, part in zip(weights, self.parts(self.total), strict=True):
            weight.grad = part


@contextlib.contextmanager
def summed(layers: Sequence[Linear16]) -> Iterator[None]:
    """Within, backward passes add up the gradients of the layers' weights by the products that make them, in `.grad`.

    autograd does not see them: no hook of these parameters is called.
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
    return exchange_any(root, partial(Linear16, dtype=dtype), chosen, lambda linear: True)


def weight16(linear: nn.Linear, x: Tensor) -> Weight16:
    """A layer's weight for products of x: as it was cast before, or cast now."""
    if isinstance(linear, Linear16) and linear.accepts(x):
        return linear.cast()
    return Weight16(linear.weight.detach().to(product_dtype(x)), None)
