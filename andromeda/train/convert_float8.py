"""A model's linear layers exchanged for those that train in 8 bits, and what is known of their inputs from how blocks are built."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import nn

from andromeda.model.block import Parallel, Serial
from andromeda.model.cached_cast_linear import exchange_linears
from andromeda.model.float8_linear import Linear8
from andromeda.model.norm import LayerNorm, PlainRMSNorm, RMSNorm
from andromeda.model.token_shift import ChunkShift, NoShift
from andromeda.ops import float8_inference


def exchange(root: nn.Module, chosen: Callable[[str], bool]) -> None:
    """Exchange the linear layers below `root` whose paths are chosen and whose sizes fit, alone or filled up beside others."""
    exchange_linears(root, Linear8, chosen, float8_inference.has_aligned_shape, float8_inference.ALIGNMENT)
    for module in root.modules():
        for reader, norm, shift in _read(module):
            _bound(reader, norm, shift)


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
