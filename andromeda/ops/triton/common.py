"""What several kernels share: tile sizes, tuples, and single PTX instructions."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

PTX = tl.constexpr(torch.version.hip is None and not triton.knobs.runtime.interpret)
"""Whether PTX instructions can be used: neither on AMD GPUs nor in Triton's interpreter."""


class TileConfig(NamedTuple):
    """The tile of a two-dimensional array that one program computes."""

    rows: int
    """A power of two."""
    columns: int
    """A power of two."""
    warps: int


@triton.jit
def tuple_append(items, item):
    """`items` with one more item, for tuples that grow while a loop is unrolled."""
    return items + (item,)  # noqa: RUF005 (Triton has no unpacking)


@triton.jit
def reciprocal(x):
    """1 / x within 2 ulp; a denormal result becomes zero. `/` takes several instructions, to round correctly."""
    if PTX:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return 1.0 / x


@triton.jit
def exp2(x):
    """2^x within 2 ulp; a denormal result becomes zero. `tl.exp2` takes several instructions, to keep denormal numbers."""
    if PTX:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return tl.exp2(x)
