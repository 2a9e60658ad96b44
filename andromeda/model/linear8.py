"""Linear layers that train in 8 bits, with the same parameters: cast once for a step, not once for a product.

What was cast lies in buffers beside the parameters, which are filled outside of what is compiled and are not saved. It is made anew
when a parameter has changed, which its version counter tells: whatever writes into a parameter in place must count there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from andromeda.kernels import cast8, fp8
from andromeda.kernels.cast8 import Weight8
from andromeda.kernels.linear8 import linear8
from andromeda.model.layers import Linear, side_by_side

ROUNDING = 1.02
"""What roundings to bfloat16 add to a vector's norm at most, and more."""


class Linear8(Linear):
    """x W^T + b in 8-bit products, forward and backward, where they may be; elsewhere as it was."""

    FIELDS = Weight8._fields
    rows: Tensor | None
    columns: Tensor
    scale: Tensor
    norms: Tensor
    bound: Tensor | None

    def __init__(self, linear: Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.beside: tuple[Linear8, ...] = ()
        """Layers whose weights are cast below this one's, into one product."""
        self.source: tuple[nn.Module, float] | None = None
        """The norm whose output this layer reads, and the largest norm of a vector of it with gains of one."""
        self.key: Any = None
        for name in (*self.FIELDS, "bound"):
            self.register_buffer(name, None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) -> (..., O)."""
        if not (cast8.accepts(x) and fp8.fits(self)):
            return super().forward(x)
        return linear8(x, cast8.cast_weight(self.weight.detach()) if self.beside else self.cast(), [self.weight], self.bias, self.bound)

    def project(self, x: Tensor) -> Tensor:
        """x (..., K), which must be accepted -> the outputs of this layer and of those beside it, zeros at the end."""
        linears = (self, *self.beside)
        return linear8(x, self.cast(), [linear.weight for linear in linears], side_by_side(linears)[1], self.bound)

    def cast(self) -> Weight8:
        """The weight, with those of the layers beside, as it was cast; cast now if `refresh` never was called."""
        if self.rows is None:
            return cast8.cast_weight(self._joined())
        return Weight8(self.rows, self.columns, self.scale, self.norms)

    def _joined(self) -> Tensor:
        return (side_by_side((self, *self.beside))[0] if self.beside else self.weight).detach()

    def _now(self) -> list[tuple[int, int]]:
        """Which weights these are, and how often each was written."""
        held = [linear.weight for linear in (self, *self.beside)]
        gain = self._gain()
        return [(x._version, x.data_ptr()) for x in (held if gain is None else [*held, gain])]

    def _gain(self) -> Tensor | None:
        return getattr(self.source[0], "weight", None) if self.source else None


@torch.inference_mode(False)
@torch.no_grad()
def refresh(layers: Sequence[Linear8]) -> None:
    """Cast again what has changed, and take new bounds of inputs."""
    changed = [layer for layer in layers if layer.key != layer._now() and cast8.on_device(layer.weight)]
    if not changed:
        return
    for layer in changed:
        # Their memory is taken again.
        for name in Linear8.FIELDS:
            setattr(layer, name, None)
    for layer, held in zip(changed, cast8.cast_weights([layer._joined() for layer in changed]), strict=True):
        for name, tensor in zip(Linear8.FIELDS, held, strict=True):
            setattr(layer, name, tensor)
        layer.key = layer._now()
    read = [(layer, *layer.source) for layer in changed if layer.source is not None]
    if read:
        one = changed[0].weight.new_ones(1)
        gains = [getattr(norm, "weight", None) for _, norm, _ in read]
        largest = torch._foreach_norm([one if gain is None else gain.detach().float() for gain in gains], float("inf"))
        for (layer, _, norm_of_ones), gain in zip(read, largest, strict=True):
            layer.bound = gain * (norm_of_ones * ROUNDING)
