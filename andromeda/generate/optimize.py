"""A model made faster for inference: linear layers in 8 bits, compiled blocks. Its results differ by rounding only."""

from __future__ import annotations

import warnings

import torch
from torch import nn

from andromeda.generate.decode_kernels import use_decode_kernels
from andromeda.generate.fused_block import FusedBlock, can_fuse
from andromeda.model.transformer import Transformer
from andromeda.ops import float8_inference
from andromeda.utils.errors import ConfigError

UNPADDED = {"comprehensive_padding": False}
"""Products with gaps between their rows would have to be copied for kernels of our own, which want them as they are."""
VARIANTS = 64
"""Lengths, windows and kinds of layers that are compiled before torch gives up."""


def optimize_for_inference(
    model: Transformer, *, fp8: bool = False, compile: bool = True, autotune: bool = False, decode_kernels: bool = True
) -> Transformer:
    """Exchange parts of `model` in place and return it; it can be trained no more.

    Serial pre-norm layers are rearranged (`infer.fused`). eight_bits: quantize the blocks' linear layers once, weights by row,
    activations by token as they come; half the memory, and on GPUs with such units (compute capability 8.9) up to twice the speed
    of long prompts. compiled: torch.compile on every block, which costs up to a minute at first use. tuned: the compiler also
    writes the product of a matrix with one token's vector itself, with what comes before and after in the same kernel, and
    measures several forms of each: for writing, minutes more. kernels: on a GPU the rearranged layers take steps of one token by
    kernels of their own (`infer.fused_step`), which nothing compiles.
    Raises ConfigError where the device has no products of 8 bits.
    """
    if fp8:
        _check(model.head.weight.device)
    blocks = model.requires_grad_(False).decoder.blocks
    for index, block in enumerate(blocks):
        if can_fuse(block):
            blocks[index] = FusedBlock(block, fp8=fp8)
        elif fp8:
            _quantize(block)
    if compile:
        torch._dynamo.config.recompile_limit = max(VARIANTS, torch._dynamo.config.recompile_limit)
        warnings.filterwarnings("ignore", module="torch._inductor")
        # Of positions and bias a pass makes two dozen small kernels otherwise, a fortieth of a step's time.
        for part in (*blocks, model.rotary, model.alibi):
            part.compile(options={**UNPADDED, "coordinate_descent_tuning": autotune})
    if decode_kernels:
        use_decode_kernels(model)
    return model


def _check(device: torch.device) -> None:
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise ConfigError(f"{torch.cuda.get_device_name(device)} has no products of 8 bits (compute capability 8.9 or newer): use bf16.")


def _quantize(module: nn.Module) -> None:
    """Exchange the linear layers below `module`. A router's scores decide by small differences and are kept exact."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear) and float8_inference.has_aligned_shape(child):
            setattr(module, name, float8_inference.Float8DynamicLinear(child))
        elif name != "router":
            _quantize(child)
