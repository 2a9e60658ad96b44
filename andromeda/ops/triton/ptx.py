"""Single instructions of NVIDIA's GPUs where the compiler takes several, to be as exact as the last bit or to keep denormal numbers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

PTX = tl.constexpr(torch.version.hip is None and not triton.knobs.runtime.interpret)
"""Whether there are such instructions: neither on AMD's GPUs nor in Triton's interpreter."""


@triton.jit
def reciprocal(x):
    """1 / x within two units in the last place; zero for a denormal result."""
    if PTX:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return 1.0 / x


@triton.jit
def exp2(x):
    """2^x within two units in the last place; zero for a denormal result."""
    if PTX:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return tl.exp2(x)
