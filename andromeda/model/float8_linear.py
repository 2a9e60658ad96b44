"""Linear layers that train in 8 bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn

from andromeda.model.cached_cast_linear import CachedCastLinear
from andromeda.model.layers import Linear, concat_biases
from andromeda.model.specs import LinearSpec
from andromeda.ops import float8, float8_inference
from andromeda.ops.float8 import Float8Weight, float8_linear

ROUNDING = 1.02
"""More than rounding to bfloat16 can add to a vector's norm."""


class Float8TrainingLinear(CachedCastLinear):
    """x W^T + b by 8-bit matmuls, forward and backward, for x that `accepts` takes; elsewhere as `Linear`."""

    CACHED = (*Float8Weight._fields, "bound")
    rows: Tensor | None
    columns: Tensor
    scale: Tensor
    norms: Tensor
    bound: Tensor | None

    def __init__(self, linear: Linear) -> None:
        super().__init__(linear)
        self.source: tuple[nn.Module, float] | None = None
        """The norm whose output this layer reads, and the largest norm of a vector of it with gains of one."""

    def fused_spec(self) -> LinearSpec | None:
        """In 8 bits."""
        return LinearSpec("float8")

    def accepts(self, x: Tensor) -> bool:
        """As many vectors as matmuls in 8 bits can have, on a GPU."""
        return float8.is_supported(x)

    def can_cast(self) -> bool:
        """On a GPU."""
        return float8.has_kernels(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) -> (..., O)."""
        if not (self.accepts(x) and float8_inference.has_aligned_shape(self)):
            return super().forward(x)
        return float8_linear(
            x,
            float8.quantize_weight(self.weight.detach()) if self.fused_with else self.cached_weight(),
            [self.weight],
            self.bias,
            self.bound,
        )

    def project(self, x: Tensor) -> Tensor:
        """x (..., K), which must be accepted -> the outputs of this layer and of those fused with it, zeros at the end."""
        return float8_linear(x, self.cached_weight(), self.weights, concat_biases(self.fused_group), self.bound)

    def cached_weight(self) -> Float8Weight:
        """The weights of the group as they were cast; cast now if `refresh` never was called."""
        if self.rows is None:
            return float8.quantize_weight(self.fused_weight())
        return Float8Weight(self.rows, self.columns, self.scale, self.norms)

    def sources(self) -> Sequence[Tensor]:
        """The weights, and the gain that bounds their input."""
        gain = self._gain()
        return [*self.weights, *([] if gain is None else [gain])]

    @classmethod
    def cast_all(cls, layers: Sequence[Self]) -> None:
        """Cast the weights of all, and take new bounds of inputs."""
        for layer in layers:
            # Their memory is used again.
            for name in Float8Weight._fields:
                setattr(layer, name, None)
        for layer, held in zip(layers, float8.quantize_weights([layer.fused_weight() for layer in layers]), strict=True):
            for name, tensor in zip(Float8Weight._fields, held, strict=True):
                setattr(layer, name, tensor)
        _bound_inputs(layers)

    @classmethod
    def note_inputs(cls, layers: Sequence[Self]) -> None:
        """Take new bounds of inputs."""
        _bound_inputs(layers)

    def input_version(self) -> tuple[int, int] | None:
        """Of the gain that bounds the input; a norm without one gives the same bound always."""
        if self.source is None:
            return None
        gain = self._gain()
        return (0, 0) if gain is None else (gain._version, id(gain))

    def _gain(self) -> Tensor | None:
        return getattr(self.source[0], "weight", None) if self.source else None


def _bound_inputs(layers: Sequence[Float8TrainingLinear]) -> None:
    """By the gains of the norms that they read."""
    read = [(layer, *layer.source) for layer in layers if layer.source is not None]
    if not read:
        return
    one = layers[0].weight.new_ones(1)
    gains = [getattr(norm, "weight", None) for _, norm, _ in read]
    largest = torch._foreach_norm([one if gain is None else gain.detach().float() for gain in gains], float("inf"))
    for (layer, _, norm_of_ones), gain in zip(read, largest, strict=True):
        layer.bound = gain * (norm_of_ones * ROUNDING)
