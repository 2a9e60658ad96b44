"""Triton kernels. Only the modules of `andromeda.ops` import this package, and only when a kernel runs: Triton is optional.

Arguments of kernels have no annotations but `tl.constexpr`, because Triton evaluates annotations.
"""
