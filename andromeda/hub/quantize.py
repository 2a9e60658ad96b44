"""Weights in 8 bits: matrices of the layers by rows, each with a scale of its own; everything else as it was."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

KINDS = ("int8", "fp8")
LINEAR = r"(?:self_attn\.[qkvo]_proj|mlp\.(?:shared_experts\.\d+\.)?(?:gate|up|down)_proj)\.weight"
EXPERTS = r"mlp\.experts\.(?:gate|up|down)_proj"
MATRIX = re.compile(rf"model\.layers\.\d+\.(?:{LINEAR}|{EXPERTS})")
"""What is quantized, by its name in the modeling file. The embedding, the head and routers stay."""
INT8_MAX, FP8_MAX = 127.0, torch.finfo(torch.float8_e4m3fn).max


def quantize_rows(weight: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """weight (..., N, K) as int8, or as the bytes of float8 (e4m3) in uint8, and the scale of each row (..., N, 1) in float32."""
    weight = weight.float()
    limit = INT8_MAX if kind == "int8" else FP8_MAX
    scale = weight.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / limit
    scaled = weight / scale
    if kind == "int8":
        return scaled.round().to(torch.int8), scale
    return scaled.to(torch.float8_e4m3fn).view(torch.uint8), scale


def dequantize_rows(stored: Tensor, scale: Tensor) -> Tensor:
    """The inverse, in float32."""
    values = stored.view(torch.float8_e4m3fn) if stored.dtype == torch.uint8 else stored
    return values.float() * scale


def quantize_tensors(tensors: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    """Tensors of an exported model with its matrices quantized, and their scales: NAME.weight with NAME.scale, NAME with NAME_scale."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if MATRIX.fullmatch(name):
            scale = name.removesuffix("weight") + "scale" if name.endswith(".weight") else f"{name}_scale"
            found[name], found[scale] = quantize_rows(tensor, kind)
        else:
            found[name] = tensor
    return found


def rounding(kind: str, named: Callable[[str], str | None]) -> Callable[[str, Tensor], Tensor]:
    """What becomes of a weight (by the run's name) in an export of this kind. named: its name in the modeling file."""

    def rounded(name: str, tensor: Tensor) -> Tensor:
        matrix = MATRIX.fullmatch(named(name) or "")
        return dequantize_rows(*quantize_rows(tensor, kind)).to(tensor.dtype) if matrix else tensor

    return rounded
