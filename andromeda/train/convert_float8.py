"""Conversion of a model's linear layers to those that train in 8 bits, with bounds of their inputs that follow from the blocks."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from andromeda.model.block import DecoderBlock
from andromeda.model.cached_cast_linear import convert_linears
from andromeda.model.float8_linear import Float8TrainingLinear
from andromeda.model.specs import spec_of
from andromeda.ops import float8_inference


def convert_to_float8(root: nn.Module, chosen: Callable[[str], bool], cached: bool = True) -> None:
    """Convert the linear layers below `root` whose paths are chosen and whose sizes fit, alone or padded as part of a fused group."""
    convert_linears(root, Float8TrainingLinear, chosen, float8_inference.has_aligned_shape, float8_inference.ALIGNMENT, cached)
    for block in root.modules():
        if isinstance(block, DecoderBlock):
            for reader, norm, shift in block.normalized_readers():
                _bound(reader, norm, shift)


def _bound(reader: nn.Module, norm: nn.Module, shift: nn.Module) -> None:
    """Tell the layers that read first what bounds their input, where the specs of norm and shift give a bound."""
    norm_spec, shift_spec = spec_of(norm), spec_of(shift)
    if norm_spec is None or shift_spec is None or not hasattr(reader, "input_layers"):
        return
    for linear in reader.input_layers():  # type: ignore[operator]
        if isinstance(linear, Float8TrainingLinear):
            # A vector made of parts of several tokens' vectors is no longer than they are together.
            linear.source = norm, ((shift_spec.tokens + 1) * linear.in_features) ** 0.5
