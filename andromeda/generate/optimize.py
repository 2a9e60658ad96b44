"""Optimization of a model for inference: float8 linear layers, fused and compiled blocks. Results differ by rounding only."""

from __future__ import annotations

import warnings

import torch
from torch import nn

from andromeda.generate.decode_kernels import use_decode_kernels
from andromeda.generate.fused_block import FusedBlock, can_fuse
from andromeda.model.transformer import Transformer
from andromeda.ops import float8_inference
from andromeda.utils.compile_cache import remove_torn_files
from andromeda.utils.errors import ConfigError

UNPADDED = {"comprehensive_padding": False}
"""Inductor options: padded strides would have to be copied for our own kernels, which need contiguous tensors."""
VARIANTS = 64
"""Recompilations (lengths, windows, kinds of layers) before torch.compile gives up."""


def optimize_for_inference(
    model: Transformer, *, fp8: bool = False, compile: bool = True, autotune: bool = False, decode_kernels: bool = True
) -> Transformer:
    """Replace parts of `model` in place and return it; afterwards it cannot be trained.

    Serial pre-norm blocks are fused (`fused_block`). fp8: quantize the blocks' linear layers, weights once per row and activations
    dynamically per token; half the memory, and up to twice the speed of long prompts on GPUs with float8 matmuls (compute
    capability 8.9). compile: torch.compile every block, up to a minute at first use. autotune: coordinate-descent tuning of the
    compiled kernels, minutes more. decode_kernels: on a GPU, fused blocks compute decoding steps of one token with Triton kernels
    (`decode_kernels`). Raises ConfigError where the device has no float8 matmuls.
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
        remove_torn_files()
        torch._dynamo.config.recompile_limit = max(VARIANTS, torch._dynamo.config.recompile_limit)
        warnings.filterwarnings("ignore", module="torch._inductor")
        # Uncompiled, positions and bias are two dozen small kernels per pass, 1/40 of a step's time.
        for part in (*blocks, model.rotary, model.alibi):
            part.compile(options={**UNPADDED, "coordinate_descent_tuning": autotune})
    if decode_kernels:
        use_decode_kernels(model)
    return model


def _check(device: torch.device) -> None:
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise ConfigError(f"{torch.cuda.get_device_name(device)} has no float8 matmuls (compute capability 8.9 or newer): use bf16.")


def _quantize(module: nn.Module) -> None:
    """Replace the linear layers below `module`, except a router's: small differences of its scores change the selected experts."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear) and float8_inference.has_aligned_shape(child):
            setattr(module, name, float8_inference.Float8DynamicLinear(child))
        elif name != "router":
            _quantize(child)
