"""Activation functions on a GPU: device functions for other kernels, and two kernels that apply an activation to a whole tensor.

GELU is limited by erf, whose compiled form takes more time than reading and writing the data. For 16-bit data the tail of
the normal distribution is computed as exp(-z^2 / 2) t P(t) with t = 1 / (1 + p z), the form of Abramowitz and Stegun 7.1.26,
with P and p fitted for the smallest relative error.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from andromeda.ops.triton.common import exp2, reciprocal

ACTIVATION_BLOCK, ACTIVATION_WARPS = 4096, 8
"""Elements of one program of `activate`, and its warps."""


@triton.jit
def _tanh(x):
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


@triton.jit
def _normal_tail(z):
    """P(Z > z) for a standard normal Z and z >= 0, with a relative error below 4e-6."""
    t = reciprocal(1.0 + 0.307134860145706 * z)
    p = 0.19416815390876732 - 0.07625058741335031 * t
    p = 0.0028918696777637184 + p * t
    p = 0.13827156724870207 + p * t
    p = 0.1181038681131909 + p * t
    p = 0.1228133815178368 + p * t
    return exp2(z * z * -0.7213475204444817) * t * p


@triton.jit
def _normal_cdf(x):
    """P(Z < x) for a standard normal Z."""
    tail = _normal_tail(tl.abs(x))
    return tl.where(x < 0, tail, 1.0 - tail)


@triton.jit
def gelu_fast(x):
    """Exact (erf) GELU of a float32 x, to the precision of 16-bit results."""
    return x * _normal_cdf(x)


@triton.jit
def gelu_and_derivative(x):
    """`gelu_fast` and its derivative P(Z < x) + x phi(x). The compiler shares the exponential of phi with that of the tail."""
    size, cdf = tl.abs(x), _normal_cdf(x)
    return x * cdf, cdf + x * (0.3989422804014327 * exp2(size * size * -0.7213475204444817))


@triton.jit
def apply_activation(x, NAME: tl.constexpr, EXACT: tl.constexpr):
    """Activation NAME of a float32 x. EXACT: to full float32 precision, otherwise to that of 16-bit results."""
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
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < N
    value = apply_activation(tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32), NAME, EXACT)
    tl.store(y + offsets, value.to(y.dtype.element_ty), mask=mask)


def activate(x: Tensor, activation: str) -> Tensor:
    """Activation of a contiguous x, computed in float32 and rounded once to the dtype of x."""
    y = torch.empty_like(x)
    with torch.cuda.device_of(x):
        _activation_kernel[(triton.cdiv(x.numel(), ACTIVATION_BLOCK),)](
            x, y, x.numel(), NAME=activation, EXACT=x.dtype == torch.float32, BLOCK=ACTIVATION_BLOCK, num_warps=ACTIVATION_WARPS
        )
    return y


@triton.jit
def _load_activated(x, column, K, NAME: tl.constexpr):
    # Rounded to the dtype of x, as the activation would be if it were stored: the fused and the unfused path give equal numbers.
    dtype: tl.constexpr = x.dtype.element_ty
    value = tl.load(x + column, mask=column < K, other=0.0).to(tl.float32)
    return apply_activation(value, NAME, dtype == tl.float32).to(dtype).to(tl.float32)


@triton.jit
def row_scale(amax, FP8_MAX: tl.constexpr):
    """The scale of a row with this largest absolute value: the row is divided by it before rounding to float8."""
    return tl.maximum(amax, 1e-12) / FP8_MAX


@triton.jit
def _store_quantized(y, value, inverse, column, K, FP8_MAX: tl.constexpr):
    value = tl.minimum(tl.maximum(value * inverse, -FP8_MAX), FP8_MAX)
    tl.store(y + column, value.to(y.dtype.element_ty), mask=column < K)


@triton.jit
def _activate_quantize_kernel(x, y, scales, K, stride, FP8_MAX: tl.constexpr, NAME: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr):
    """One row per program, kept in registers between finding its largest value and rounding it."""
    row = tl.program_id(0).to(tl.int64)
    x, y = x + row * stride, y + row * K
    first = tl.arange(0, FIRST)
    value = _load_activated(x, first, K, NAME)
    amax = tl.max(tl.abs(value), 0)
    if REST > 0:
        rest = FIRST + tl.arange(0, REST)
        more = _load_activated(x, rest, K, NAME)
        amax = tl.maximum(amax, tl.max(tl.abs(more), 0))
    scale = row_scale(amax, FP8_MAX)
    inverse = 1.0 / scale
    tl.store(scales + row, scale)
    _store_quantized(y, value, inverse, first, K, FP8_MAX)
    if REST > 0:
        _store_quantized(y, more, inverse, rest, K, FP8_MAX)


def split_power_of_two(K: int) -> tuple[int, int]:
    """Sizes of two blocks that cover K columns: the largest power of two up to K, and the smallest one that covers the rest (or 0).

    Most widths are the sum of two powers of two, so that few masked columns are computed.
    """
    first = 1 << (K.bit_length() - 1)
    return first, triton.next_power_of_2(K - first) if first < K else 0


def activate_quantize(x: Tensor, activation: str, fp8_max: float) -> tuple[Tensor, Tensor]:
    """x (N, K) -> its activation in e4m3 (N, K), and the float32 scale that each row was divided by (N, 1)."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    N, K = x.shape
    y, scales = x.new_empty(N, K, dtype=torch.float8_e4m3fn), x.new_empty(N, 1, dtype=torch.float32)
    first, rest = split_power_of_two(K)
    with torch.cuda.device_of(x):
        _activate_quantize_kernel[(N,)](
            *(x, y, scales, K, x.stride(0)),
            **{"FP8_MAX": fp8_max, "NAME": activation, "FIRST": first, "REST": rest},
            num_warps=max(1, min(16, first // 512)),
        )
    return y, scales
