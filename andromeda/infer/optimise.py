"""A model made faster for inference: linear layers in 8 bits, compiled blocks. Its results differ by rounding only."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from andromeda.errors import ConfigError
from andromeda.kernels import fp8
from andromeda.model.feedforward.dense import ACTIVATIONS, Dense
from andromeda.model.transformer import Transformer

VARIANTS = 64
"""Lengths, windows and kinds of layers that are compiled before torch gives up."""


def optimise(model: Transformer, *, eight_bits: bool = False, compiled: bool = True, tuned: bool = False) -> Transformer:
    """Exchange parts of `model` in place and return it; it can be trained no more.

    eight_bits: quantise the blocks' linear layers once, weights by row, activations by token as they come; half the memory, and on
    GPUs with such units (compute capability 8.9) up to twice the speed of long prompts. compiled: torch.compile on every
    block, which costs up to a minute at first use. tuned: the compiler also writes the product of a matrix with one token's vector
    itself, with what comes before and after in the same kernel, and measures several forms of each: for writing, minutes more.
    Raises ConfigError where the device has no products of 8 bits.
    """
    if eight_bits:
        _check(model.head.weight.device)
        for block in model.trunk.blocks:
            _quantise(block)
    if compiled:
        torch._dynamo.config.recompile_limit = max(VARIANTS, torch._dynamo.config.recompile_limit)
        warnings.filterwarnings("ignore", module="torch._inductor")
        for block in model.trunk.blocks:
            block.compile(options={"coordinate_descent_tuning": True} if tuned else None)
    return model


def _check(device: torch.device) -> None:
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise ConfigError(f"{torch.cuda.get_device_name(device)} has no products of 8 bits (compute capability 8.9 or newer): use bf16.")


def _quantise(module: nn.Module) -> None:
    """Exchange the linear layers below `module`. A router's scores decide by small differences and are kept exact."""
    for name, child in module.named_children():
        if isinstance(child, Dense) and fp8.fits(child.inner) and fp8.fits(child.out):
            setattr(module, name, Dense8(child))
        elif isinstance(child, nn.Linear) and fp8.fits(child):
            setattr(module, name, fp8.Linear8(child))
        elif name != "router":
            _quantise(child)


class Dense8(nn.Module):
    """`Dense` with both products in 8 bits, the activation quantised as it is computed."""

    def __init__(self, dense: Dense) -> None:
        super().__init__()
        self.inner, self.out, self.activation = fp8.Linear8(dense.inner), fp8.Linear8(dense.out), dense.activation
        self.name = next(name for name, function in ACTIVATIONS.items() if function is dense.activation)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., C)."""
        hidden = self.inner(x)
        if not fp8.activates(hidden, self.name):
            return self.out(self.activation(hidden))
        rows, scale = fp8.activate_quantise(hidden.flatten(0, -2), self.name)
        return self.out.product(rows, scale).to(x.dtype).unflatten(0, x.shape[:-1])
