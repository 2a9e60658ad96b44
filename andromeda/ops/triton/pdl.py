"""Kernels that start while the one before them still runs, where the GPU can (programmatic dependent launch, compute capability 9.0).

Such a kernel calls `begin`, so that the next one may start as early, and `wait` before it reads or writes anything that another
kernel of the step writes or reads; all of its programs must. `wait` returns when all kernels before have ended and what they
wrote is seen, those included for which they have waited. A kernel launched in the usual way waits for all of that by itself.
The launches become edges of a CUDA graph like others.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

PDL_ENABLED = True
"""Whether kernels start early at all."""


def supports_pdl(x: Tensor) -> bool:
    """Whether kernels start early on the device of x."""
    return PDL_ENABLED and x.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(x.device) >= (9, 0)


def pdl_launch_options(enabled: bool) -> dict[str, Any]:
    """What a launch must be given for it."""
    return {"launch_pdl": True} if enabled else {}


@triton.jit
def pdl_launch_dependents(constants: tl.constexpr):
    """Let the next kernel start; `constants.pdl` says whether it may."""
    if constants.pdl:
        gdc_launch_dependents()


@triton.jit
def pdl_wait(constants: tl.constexpr):
    """Wait until all kernels before have written all that they write."""
    if constants.pdl:
        gdc_wait()
