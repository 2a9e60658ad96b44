"""What a model is made of, layer by layer, and which fused kernels were matched to its parts."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from torch import nn

from andromeda.model import add_norm_shift
from andromeda.model.specs import spec_of
from andromeda.model.transformer import Transformer


def describe(model: Transformer) -> list[str]:
    """One line for each run of equal layers: the token mixer, the network, and parts that no fused kernel computes."""
    lines = []
    blocks: Any = enumerate(model.decoder.blocks)
    for text, group in groupby(((index, _layer(block)) for index, block in blocks), key=lambda pair: pair[1]):
        numbers = [index for index, _ in group]
        which = f"layer {numbers[0]}" if len(numbers) == 1 else f"layers {numbers[0]} to {numbers[-1]}"
        lines.append(f"{which}: {text}")
    return lines


def part_name(part: nn.Module) -> str:
    """What a part says of itself, or its class."""
    said: Any = getattr(part, "describe", None)
    return str(said()) if said else type(part).__name__


def unmatched(block: Any) -> list[str]:
    """Parts of a layer that no fused kernel computes, by class."""
    found = []
    for name in ("attention", "feedforward"):
        norm, shift = getattr(block, f"{name}_norm", None), getattr(block, f"{name}_shift", None)
        if norm is not None and not add_norm_shift.matches(spec_of(norm), spec_of(shift)):
            found.append(f"{type(norm).__name__} with {type(shift).__name__}")
    mixer = block.attention
    if hasattr(mixer, "qk_kernel") and mixer.qk_kernel is None:
        found.append(f"{type(mixer.qk_norm).__name__} with its rotation")
    return list(dict.fromkeys(found))


def _layer(block: Any) -> str:
    without = unmatched(block)
    tail = f"; computed by their own forward passes: {', '.join(without)}" if without else ""
    return f"{part_name(block.attention)}, {part_name(block.feedforward)}{tail}"
