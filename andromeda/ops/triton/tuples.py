"""Tuples in Triton kernels, which grow while a loop is unrolled."""

from __future__ import annotations

import triton
import triton.language as tl  # noqa: F401 (the interpreter looks for it)


@triton.jit
def tuple_append(items, item):
    """A tuple with one item more."""
    return items + (item,)  # noqa: RUF005 (Triton has no other way)
