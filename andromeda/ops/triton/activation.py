"""Activations on a GPU: functions for other kernels to call, and a kernel that applies one to a whole tensor.

erf is what makes GELU expensive: a compiler's takes more time than reading and writing the numbers does. In 16 bits the tail of
the normal distribution is computed as exp(-z^2 / 2) t P(t) with t = 1 / (1 + p z), the form of Abramowitz and Stegun 7.1.26,
whose P and p were fitted anew for the least relative error.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from andromeda.ops.triton.ptx import exp2, reciprocal

ACTIVATION_BLOCK, ACTIVATION_WARPS = 4096, 8


@triton.jit
def _tanh(x):
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


@triton.jit
def _normal_tail(z):
    """P(Z > z) of a standard normal Z for z >= 0, within a share of 4e-6 of itself."""
    t = reciprocal(1.0 + 0.307134860145706 * z)
    p = 0.19416815390876732 - 0.07625058741335031 * t
    p = 0.0028918696777637184 + p * t
    p = 0.13827156724870207 + p * t
    p = 0.1181038681131909 + p * t
    p = 0.1228133815178368 + p * t
    return exp2(z * z * -0.7213475204444817) * t * p


@triton.jit
def _normal_cdf(x):
    """P(Z < x) of a standard normal Z."""
    tail = _normal_tail(tl.abs(x))
    return tl.where(x < 0, tail, 1.0 - tail)


@triton.jit
def gelu_fast(x):
    """GELU of x in float32, to the accuracy that 16 bits can show."""
    return x * _normal_cdf(x)


@triton.jit
def gelu_and_derivative(x):
    """The same, and its derivative P(Z < x) + x phi(x); phi's exponential is the one in the tail, which is raised once."""
    size, below = tl.abs(x), _normal_cdf(x)
    return x * below, below + x * (0.3989422804014327 * exp2(size * size * -0.7213475204444817))


@triton.jit
def apply_activation(x, NAME: tl.constexpr, EXACT: tl.constexpr):
    """The activation NAME of x in float32. EXACT: to the last bits of float32."""
    if NAME == "none":
        return x
    if NAME == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476)) if EXACT else gelu_fast(x)
    if NAME == "gelu_tanh":
        return 0.5 * x * (1.0 + _tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    if NAME == "silu":
        return x / (1.0 + tl.exp(-x))
    x = tl.maximum(x, 0.0)
    return x * x if NAME == "relu2" else x


@triton.jit
def _activation_kernel(x, y, N, NAME: tl.constexpr, EXACT: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * ACTIVATION_BLOCK + tl.arange(0, ACTIVATION_BLOCK)
    mask = offsets < N
    value = apply_activation(tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32), NAME, EXACT)
    tl.store(y + offsets, value.to(y.dtype.element_ty), mask=mask)


def activate(x: Tensor, activation: str) -> Tensor:
    """The activation of x, which must lie in one piece, in float32 and rounded once."""
    y = torch.empty_like(x)
    with torch.cuda.device_of(x):
        _activation_kernel[(triton.cdiv(x.numel(), ACTIVATION_BLOCK),)](
            x, y, x.numel(), NAME=activation, EXACT=x.dtype == torch.float32, BLOCK=ACTIVATION_BLOCK, num_warps=ACTIVATION_WARPS
        )
    return y
