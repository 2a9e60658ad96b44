"""A model's linear layers exchanged for those that train in 8 bits, and what is known of their inputs from how blocks are built."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from torch import nn

from andromeda.kernels import fp8
from andromeda.model.block import Parallel, Serial
from andromeda.model.layers import Linear
from andromeda.model.linear8 import Linear8
from andromeda.model.norm import LayerNorm, PlainRMSNorm, RMSNorm
from andromeda.model.token_shift import ChunkShift, NoShift

TOGETHER = (("query", "value", "key"), ("gate", "inner"))
"""Layers whose products are taken as one, in the order in which attention and gated networks ask for it."""


def exchange(root: nn.Module, chosen: Callable[[str], bool]) -> None:
    """Exchange the linear layers below `root` whose paths are chosen and whose sizes fit.

    The weights are cast before each forward pass of `root` that finds them changed.
    """
    for path, module in list(root.named_modules()):
        for name, child in list(module.named_children()):
            if type(child) is Linear and fp8.fits(child) and chosen(f"{path}.{name}" if path else name):
                setattr(module, name, Linear8(child))
        for group in TOGETHER:
            _join([getattr(module, name, None) for name in group])
    layers = [module for module in root.modules() if isinstance(module, Linear8)]
    led = {id(other) for layer in layers for other in layer.beside}
    for module in root.modules():
        for reader, norm, shift in _read(module):
            _bound(reader, norm, shift)
    root.register_forward_pre_hook(partial(_refresh, [layer for layer in layers if id(layer) not in led]))


def _join(linears: Sequence[nn.Module | None]) -> None:
    exchanged = [linear for linear in linears if isinstance(linear, Linear8)]
    if len(exchanged) == len(linears):
        exchanged[0].beside = tuple(exchanged[1:])


def _read(block: nn.Module) -> Iterator[tuple[nn.Module, nn.Module, nn.Module]]:
    """Parts of a block that read what a norm gives, after a shift, and nothing else."""
    if type(block) is Serial:
        yield block.attention, block.attention_norm, block.attention_shift
        yield block.feedforward, block.feedforward_norm, block.feedforward_shift
    if type(block) is Parallel:
        yield block.attention, block.norm, block.shift
        yield block.feedforward, block.norm, block.shift


def _bound(reader: nn.Module, norm: nn.Module, shift: nn.Module) -> None:
    """Tell the layers that read first what bounds their input, where norm and shift leave a bound."""
    if type(norm) not in (LayerNorm, RMSNorm, PlainRMSNorm) or type(shift) not in (NoShift, ChunkShift):
        return
    # A vector out of parts of several tokens' vectors is no longer than they are together.
    tokens = shift.tokens + 1 if isinstance(shift, ChunkShift) else 1
    for name in ("query", "key", "value", "gate", "inner"):
        linear = getattr(reader, name, None)
        if isinstance(linear, Linear8):
            linear.source = norm, (tokens * linear.in_features) ** 0.5


def _refresh(layers: Sequence[Linear8], root: nn.Module, args: Any) -> None:
    for layer in layers:
        layer.refresh()
