"""A model's linear layers exchanged for those that train in 8 bits, and what is known of their inputs from how blocks are built."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from torch import nn

from andromeda.kernels import fp8
from andromeda.model.block import Parallel, Serial
from andromeda.model.layers import Linear
from andromeda.model.linear8 import Linear8, refresh
from andromeda.model.norm import LayerNorm, PlainRMSNorm, RMSNorm
from andromeda.model.token_shift import ChunkShift, NoShift

TOGETHER = (("query", "value", "key"), ("gate", "inner"))
"""Layers whose products are taken as one, in the order in which attention and gated networks ask for it."""


def exchange(root: nn.Module, chosen: Callable[[str], bool]) -> None:
    """Exchange the linear layers below `root` whose paths are chosen and whose sizes fit, alone or filled up beside others.

    The weights are cast before each forward pass of `root` that finds them changed.
    """
    for path, module in list(root.named_modules()):
        linears = {name: child for name, child in module.named_children() if type(child) is Linear and chosen(_below(path, name))}
        groups = [group for group in TOGETHER if linears.keys() >= set(group) and linears[group[0]].in_features % fp8.SIDES == 0]
        together = {name for group in groups for name in group}
        for name, linear in linears.items():
            if name in together or fp8.fits(linear):
                setattr(module, name, Linear8(linear))
        for first, *others in groups:
            getattr(module, first).beside = tuple(getattr(module, name) for name in others)
    layers = [module for module in root.modules() if isinstance(module, Linear8)]
    led = {id(other) for layer in layers for other in layer.beside}
    for module in root.modules():
        for reader, norm, shift in _read(module):
            _bound(reader, norm, shift)
    root.register_forward_pre_hook(partial(_refresh, [layer for layer in layers if id(layer) not in led]))


def _below(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


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
    refresh(layers)
