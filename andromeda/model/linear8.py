"""Linear layers that train in 8 bits, with the same parameters: cast once for a step, not once for a product.

What was cast lies in buffers beside the parameters, which are filled outside of what is compiled and are not saved. It is made anew
when a parameter has changed, which its version counter tells: whatever writes into a parameter in place must count there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from andromeda.kernels import cast8
from andromeda.kernels.cast8 import SIDES, Weight8
from andromeda.kernels.linear8 import linear8
from andromeda.model.layers import Linear, side_by_side


class Linear8(Linear):
    """x W^T + b in 8-bit products, forward and backward, where they may be; elsewhere as it was."""

    FIELDS = Weight8._fields
    rows: Tensor | None
    columns: Tensor
    scale: Tensor
    norms: Tensor

    def __init__(self, linear: Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.beside: tuple[Linear8, ...] = ()
        """Layers whose weights are cast below this one's, into one product."""
        self.key: Any = None
        for name in self.FIELDS:
            self.register_buffer(name, None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) -> (..., O)."""
        if not cast8.accepts(x):
            return super().forward(x)
        return linear8(x, cast8.cast_weight(self.weight) if self.beside else self.cast(), [self.weight], self.bias)

    def project(self, x: Tensor) -> Tensor:
        """x (..., K), which must be accepted -> the outputs of this layer and of those beside it, zeros at the end."""
        linears = (self, *self.beside)
        return linear8(x, self.cast(), [linear.weight for linear in linears], side_by_side(linears)[1])

    def cast(self) -> Weight8:
        """The weight, with those of the layers beside, as it was cast; cast now if `refresh` never was called."""
        if self.rows is None:
            return cast8.cast_weight(self._joined())
        return Weight8(self.rows, self.columns, self.scale, self.norms)

    @torch.inference_mode(False)
    @torch.no_grad()
    def refresh(self) -> None:
        """Cast again what has changed."""
        weights = [linear.weight for linear in (self, *self.beside)]
        key = [(weight._version, weight.data_ptr()) for weight in weights]
        if key != self.key and cast8.on_device(self.weight):
            for name, tensor in zip(self.FIELDS, cast8.cast_weight(self._joined()), strict=True):
                setattr(self, name, tensor)
            self.key = key

    def _joined(self) -> Tensor:
        return side_by_side((self, *self.beside))[0] if self.beside else self.weight


def fits(linear: nn.Module) -> bool:
    """Whether its sizes can be a product of 8 bits."""
    return type(linear) is Linear and linear.in_features % SIDES == 0 and linear.out_features % SIDES == 0


def exchange(root: nn.Module, chosen: Callable[[str], bool], together: Iterable[tuple[str, ...]]) -> None:
    """Exchange the linear layers below `root` whose paths are chosen and whose sizes fit.

    together: names of layers in one module that read the same input, first the one that is asked for the product of all.
    The weights are cast before each forward pass of `root` that finds them changed.
    """
    groups = list(together)
    for path, module in list(root.named_modules()):
        for name, child in list(module.named_children()):
            if fits(child) and chosen(f"{path}.{name}" if path else name):
                assert isinstance(child, Linear)
                setattr(module, name, Linear8(child))
        for group in groups:
            _join([getattr(module, name, None) for name in group])
    led = {id(other) for module in root.modules() if isinstance(module, Linear8) for other in module.beside}
    casting = [module for module in root.modules() if isinstance(module, Linear8) and id(module) not in led]
    root.register_forward_pre_hook(partial(_refresh, casting))


def _join(linears: Sequence[nn.Module | None]) -> None:
    if all(isinstance(linear, Linear8) for linear in linears):
        first, *rest = linears
        assert isinstance(first, Linear8)
        first.beside = tuple(linear for linear in rest if isinstance(linear, Linear8))


def _refresh(linears: Sequence[Linear8], root: nn.Module, args: Any) -> None:
    for linear in linears:
        linear.refresh()
