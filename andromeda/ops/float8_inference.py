"""Linear layers in 8 bits for inference: weights quantized once, activations as they come.

A row of activations and a row of the weight each have a scale of their own, their largest absolute value over the largest number
that the format holds (e4m3: 448), so that one large token costs the others nothing. A compiler fuses the rows' maxima into
whatever made them. Sources of the format: arXiv 2209.05433; of scales by row: arXiv 2208.07339 (LLM.int8).
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FLOAT8_DTYPE = torch.float8_e4m3fn
FLOAT8_MAX = torch.finfo(FLOAT8_DTYPE).max
ALIGNMENT = 16
"""Both sizes of a matrix must be multiples of this."""
SPLIT_K_OUTPUTS = 2**22
"""Numbers of a product that do not keep a GPU busy: cuBLAS cuts the sums of such into parts (seen up to 48 x 2,560 of 10,240 terms),
and has none then that also adds a bias."""
ACTIVATIONS, MAX_COLUMNS = ("none", "gelu", "gelu_tanh", "relu", "relu2", "silu"), 32768
"""What the fused kernel knows, and the longest row that it holds."""
TRITON = find_spec("triton") is not None


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (..., K) in 8 bits, and what each row was divided by (..., 1) in float32."""
    scale = x.abs().amax(-1, keepdim=True).float().clamp(min=1e-12) / FLOAT8_MAX
    return (x * scale.reciprocal()).clamp(-FLOAT8_MAX, FLOAT8_MAX).to(FLOAT8_DTYPE), scale


@torch.library.custom_op("andromeda::activate_quantize", mutates_args=())
def activate_quantize(x: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """`quantize` of an activation of x (N, K) on a GPU: read and computed once, where a compiler does both twice."""
    from andromeda.ops.triton import float8_activation as kernels

    return kernels.activate_quantize(x, activation, FLOAT8_MAX)


@activate_quantize.register_fake
def _(x: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=FLOAT8_DTYPE), x.new_empty(x.shape[0], 1, dtype=torch.float32)


def is_supported(x: Tensor, activation: str) -> bool:
    """Whether `activate_quantize` and `activation.activate` compute this."""
    return TRITON and x.is_cuda and activation in ACTIVATIONS and x.shape[-1] <= MAX_COLUMNS


class Float8DynamicLinear(nn.Module):
    """x W^T + b with both factors in 8 bits and the sum in float32."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight, scale = quantize(linear.weight.detach())
        self.weight: Tensor
        self.scale: Tensor
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale.T.contiguous())
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) -> (..., N) in the type of x."""
        out = self.product(*quantize(x.flatten(0, -2)))
        return out.to(x.dtype).unflatten(0, x.shape[:-1])

    def product(self, rows: Tensor, scale: Tensor) -> Tensor:
        """rows (M, K) and scale (M, 1), as `quantize` gives them -> (M, N) in bfloat16."""
        bias = None if self.bias is None else self.bias.to(torch.bfloat16)
        if rows.device.type == "cpu":
            # Emulated: PyTorch 2.11 has no product with a scale a row here, and no CPU is faster for it.
            x, weight = rows.float() * scale, self.weight.float() * self.scale.T
            return F.linear(x, weight, None if bias is None else bias.float()).to(torch.bfloat16)
        splits_k = rows.shape[0] * self.weight.shape[0] < SPLIT_K_OUTPUTS
        fused_bias = None if splits_k else bias
        out = torch._scaled_mm(rows, self.weight.T, scale, self.scale, bias=fused_bias, out_dtype=torch.bfloat16, use_fast_accum=True)
        return out + bias if splits_k and bias is not None else out


def has_aligned_shape(linear: nn.Linear) -> bool:
    """Whether its sizes can be a product of 8 bits."""
    return linear.in_features % ALIGNMENT == 0 and linear.out_features % ALIGNMENT == 0
