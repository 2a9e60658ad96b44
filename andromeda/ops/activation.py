"""Activations on a GPU for inference: in the dtype of the input, or quantized to float8. There are no gradients.

`is_supported` says whether the Triton kernels can compute an activation; the reference is the activation in PyTorch, followed
by `float8_inference.quantize`.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

FLOAT8_DTYPE = torch.float8_e4m3fn
FLOAT8_MAX = torch.finfo(FLOAT8_DTYPE).max
ACTIVATIONS, MAX_COLUMNS = ("none", "gelu", "gelu_tanh", "relu", "relu2", "silu"), 32768
"""Activations that the kernels compute, and the longest row that one program holds in registers."""
TRITON = find_spec("triton") is not None


def is_supported(x: Tensor, activation: str) -> bool:
    """Whether `activate` and `activate_quantize` can compute this activation of x (..., K)."""
    return TRITON and x.is_cuda and activation in ACTIVATIONS and x.shape[-1] <= MAX_COLUMNS


@torch.library.custom_op("andromeda::activate", mutates_args=())
def activate(x: Tensor, activation: str) -> Tensor:
    """Activation of x (..., K), in 16 bits at memory bandwidth, where the erf that torch.compile generates takes twice as long."""
    from andromeda.ops.triton import activation as kernels

    return kernels.activate(x.contiguous(), activation)


@activate.register_fake
def _(x: Tensor, activation: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("andromeda::activate_quantize", mutates_args=())
def activate_quantize(x: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """`float8_inference.quantize` of an activation of x (N, K), read and computed once, where torch.compile does both twice."""
    from andromeda.ops.triton import activation as kernels

    return kernels.activate_quantize(x, activation, FLOAT8_MAX)


@activate_quantize.register_fake
def _(x: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=FLOAT8_DTYPE), x.new_empty(x.shape[0], 1, dtype=torch.float32)


@torch.library.custom_op("andromeda::residual_addmm", mutates_args=("residual",))
def residual_addmm(residual: Tensor, x: Tensor, weight: Tensor) -> None:
    """residual (M, N) += x (M, K) weight^T, weight (N, K): the matmul accumulates into the residual stream, without a pass for the sum."""
    residual.addmm_(x, weight.T)


@residual_addmm.register_fake
def _(residual: Tensor, x: Tensor, weight: Tensor) -> None:
    return None
