"""A model's linear layers exchanged for those that train in 8 bits, and what is known of their inputs from how blocks are built."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import nn

from andromeda.model.block import ParallelBlock, SerialBlock
from andromeda.model.cached_cast_linear import convert_linears
from andromeda.model.float8_linear import Float8TrainingLinear
from andromeda.model.norm import LayerNorm, RMSNorm, RMSNormNoGain
from andromeda.model.token_shift import ChunkShift, NoShift
from andromeda.ops import float8_inference


def convert_to_float8(root: nn.Module, chosen: Callable[[str], bool]) -> None:
    """Exchange the linear layers below `root` whose paths are chosen and whose sizes fit, alone or filled up beside others."""
    convert_linears(root, Float8TrainingLinear, chosen, float8_inference.has_aligned_shape, float8_inference.ALIGNMENT)
    for module in root.modules():
        for reader, norm, shift in _norm_readers(module):
            _set_input_bound(reader, norm, shift)


def _norm_readers(block: nn.Module) -> Iterator[tuple[nn.Module, nn.Module, nn.Module]]:
    """Parts of a block that read what a norm gives, after a shift, and nothing else."""
    if type(block) is SerialBlock:
        yield block.attention, block.attention_norm, block.attention_shift
        yield block.feedforward, block.feedforward_norm, block.feedforward_shift
    if type(block) is ParallelBlock:
        yield block.attention, block.norm, block.shift
        yield block.feedforward, block.norm, block.shift


def _set_input_bound(reader: nn.Module, norm: nn.Module, shift: nn.Module) -> None:
    """Tell the layers that read first what bounds their input, where norm and shift leave a bound."""
    if type(norm) not in (LayerNorm, RMSNorm, RMSNormNoGain) or type(shift) not in (NoShift, ChunkShift):
        return
    # A vector out of parts of several tokens' vectors is no longer than they are together.
    tokens = shift.tokens + 1 if isinstance(shift, ChunkShift) else 1
    for name in ("query", "key", "value", "gate", "inner"):
        linear = getattr(reader, name, None)
        if isinstance(linear, Float8TrainingLinear):
            linear.source = norm, (tokens * linear.in_features) ** 0.5
