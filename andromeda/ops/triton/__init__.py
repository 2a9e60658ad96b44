"""Triton kernels. Only the functions beside their references import this room, and only when they run on a GPU.

Triton reads the annotations of its functions, so that they carry none but `tl.constexpr`.
"""
