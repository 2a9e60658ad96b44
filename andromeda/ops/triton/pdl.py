"""Programmatic dependent launch (PDL; compute capability 9.0 or newer): a kernel starts while the one before it still runs.

Such a kernel calls `pdl_launch_dependents`, so that the next kernel may start early too, and `pdl_wait` before it reads or
writes anything that another kernel of the decoding step writes or reads; all of its programs must. `pdl_wait` returns when
all earlier kernels have ended and their writes are visible, including those that they waited for themselves. A kernel launched
without PDL waits for all of that by itself. In a CUDA graph these launches become ordinary edges.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

PDL_ENABLED = True
"""Set to False to launch all kernels without PDL."""


def supports_pdl(x: Tensor) -> bool:
    """Whether kernels on the device of x are launched with PDL."""
    return PDL_ENABLED and x.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(x.device) >= (9, 0)


def pdl_launch_options(enabled: bool) -> dict[str, Any]:
    """Launch options of a kernel with or without PDL."""
    return {"launch_pdl": True} if enabled else {}


@triton.jit
def pdl_launch_dependents(constants: tl.constexpr):
    """Let the next kernel start, if `constants.pdl`."""
    if constants.pdl:
        gdc_launch_dependents()


@triton.jit
def pdl_wait(constants: tl.constexpr):
    """Wait until all earlier kernels have ended, if `constants.pdl`."""
    if constants.pdl:
        gdc_wait()
