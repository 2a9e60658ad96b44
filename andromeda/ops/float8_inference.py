"""Linear layers in float8 for inference: weights are quantized once, activations dynamically.

Each row of the activations (a token) and each row of the weight (an output) has its own float32 scale, its largest absolute
value over the largest e4m3 value (448), so that an outlier token does not cost the others precision. torch.compile fuses the
row maxima into the operation before. Sources: the format arXiv 2209.05433; scales per row arXiv 2208.07339 (LLM.int8).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from andromeda.ops.activation import FLOAT8_DTYPE, FLOAT8_MAX

ALIGNMENT = 16
"""Both dimensions of a float8 weight must be multiples of this."""
SPLIT_K_OUTPUTS = 2**22
"""For fewer outputs (M N) cuBLAS may split K (seen up to 48 x 2,560 outputs with K = 10,240), and its split-K kernels add no bias."""


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (..., K) in float8, and the float32 scale that each row was divided by (..., 1)."""
    scale = x.abs().amax(-1, keepdim=True).float().clamp(min=1e-12) / FLOAT8_MAX
    return (x * scale.reciprocal()).clamp(-FLOAT8_MAX, FLOAT8_MAX).to(FLOAT8_DTYPE), scale


class Float8DynamicLinear(nn.Module):
    """x W^T + b with x and W in float8 and float32 accumulation."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight, scale = quantize(linear.weight.detach())
        self.weight: Tensor
        self.scale: Tensor
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale.T.contiguous())
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) -> (..., N) in the dtype of x."""
        out = self.matmul(*quantize(x.flatten(0, -2)))
        return out.to(x.dtype).unflatten(0, x.shape[:-1])

    def matmul(self, x: Tensor, scale: Tensor) -> Tensor:
        """x (M, K) in float8 with its scales (M, 1), as `quantize` returns them -> (M, N) in bfloat16."""
        bias = None if self.bias is None else self.bias.to(torch.bfloat16)
        if x.device.type == "cpu":
            # Emulated: PyTorch 2.11 has no row-wise scaled matmul on CPUs, and no CPU would be faster with it.
            weight = self.weight.float() * self.scale.T
            return F.linear(x.float() * scale, weight, None if bias is None else bias.float()).to(torch.bfloat16)
        may_split_k = x.shape[0] * self.weight.shape[0] < SPLIT_K_OUTPUTS
        fused_bias = None if may_split_k else bias
        out = torch._scaled_mm(x, self.weight.T, scale, self.scale, bias=fused_bias, out_dtype=torch.bfloat16, use_fast_accum=True)
        return out + bias if may_split_k and bias is not None else out


def has_aligned_shape(linear: nn.Linear) -> bool:
    """Whether both dimensions of the weight are multiples of `ALIGNMENT`, as float8 matmuls need."""
    return linear.in_features % ALIGNMENT == 0 and linear.out_features % ALIGNMENT == 0
