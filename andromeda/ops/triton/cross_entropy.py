"""Triton kernels for the softmax part of a language-model head: the losses of a chunk of logits, whose gradient replaces the logits
in place, and the final scaling of a gradient by the upstream gradient.

A program computes one row. It reads the row once for the maximum and the sum of exponentials, and once more to write the
gradient; the second read comes from the L2 cache if the rows in progress fit into it. Programs are therefore large, so that few
run at once. Arithmetic is in float32.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 8192
"""Most columns that a program loads at once."""
PER_WARP = 256
"""Columns per warp: 16 bytes of 16-bit logits per thread."""
GROUP = 8
"""Adjacent logits of one thread that share a running maximum, so that the sum is rescaled once for all of them."""
SCALE_BLOCK, SCALE_WARPS = 4096, 8
"""Elements of a gradient that a program scales, and its warps."""
LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def _exp(x):
    """e^x by the hardware instruction, without the handling of denormal results in `tl.exp`, which is half of its instructions."""
    return tl.exp2(x * LOG2E)


@triton.jit
def _apply_softcap(x, cap, CAPPED: tl.constexpr):
    """cap tanh(x / cap), or x."""
    if CAPPED:
        return cap * (1.0 - 2.0 / (_exp(2.0 * x / cap) + 1.0))
    return x


@triton.jit
def _loss_kernel(
    logits,
    labels,
    total,
    nll,
    V,
    stride,
    cap,
    z_loss,
    IGNORE_INDEX: tl.constexpr,
    CAPPED: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    index = tl.program_id(0)
    row = logits + index.to(tl.int64) * stride
    label = tl.load(labels + index)
    valid = label != IGNORE_INDEX
    # Loaded before any thread writes the gradient: the reductions below are barriers.
    target_logit = _apply_softcap(tl.load(row + tl.where(valid, label, 0)).to(tl.float32), cap, CAPPED)
    offsets = tl.arange(0, BLOCK // GROUP)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    running_max = tl.full((BLOCK // GROUP,), float("-inf"), tl.float32)
    sums = tl.zeros((BLOCK // GROUP,), tl.float32)
    for start in range(0, V, BLOCK):
        column = start + offsets
        z = tl.load(row + column, mask=column < V, other=float("-inf")).to(tl.float32)
        if CAPPED:
            z = tl.where(column < V, _apply_softcap(z, cap, CAPPED), float("-inf"))
        new_max = tl.maximum(running_max, tl.max(z, 1))
        # Before the first valid column both maxima are minus infinity, and their difference would be NaN.
        base = tl.where(new_max == float("-inf"), 0.0, new_max)
        sums = sums * _exp(running_max - base) + tl.sum(_exp(z - base[:, None]), 1)
        running_max = new_max
    max_logit = tl.max(running_max, 0)
    log_z = max_logit + tl.log(tl.sum(sums * _exp(running_max - max_logit), 0))
    loss = log_z - target_logit
    tl.store(nll + index, tl.where(valid, loss, 0.0))
    tl.store(total + index, tl.where(valid, loss + z_loss * log_z * log_z, 0.0))
    if GRADIENT:
        factor = tl.where(valid, 1.0 + 2.0 * z_loss * log_z, 0.0)
        one = tl.where(valid, 1.0, 0.0)
        for start in range(0, V, BLOCK):
            column = start + offsets
            z = _apply_softcap(tl.load(row + column, mask=column < V, other=0.0).to(tl.float32), cap, CAPPED)
            d = _exp(z - log_z) * factor - tl.where(column == label, one, 0.0)
            if CAPPED:
                d = d * (1.0 - (z / cap) * (z / cap))
            tl.store(row + column, d.to(row.dtype.element_ty), mask=column < V)


@triton.jit
def _scale_kernel(source, to, factor, n, IN_PLACE: tl.constexpr, BLOCK: tl.constexpr):
    scale = tl.load(factor)
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    # The upstream gradient of a plain sum is 1: in place, nothing needs to be read or written.
    mask = (offsets < tl.where(scale == 1.0, 0, n)) if IN_PLACE else offsets < n
    x = tl.load(source + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(to + offsets, (x * scale).to(to.dtype.element_ty), mask=mask)


def logits_loss(
    logits: Tensor, labels: Tensor, softcap: float, z_loss: float, gradient: bool, ignore_index: int, block: int = BLOCK
) -> tuple[Tensor, Tensor, Tensor]:
    """logits (n, V), labels (n,) -> total loss and cross entropy, each (n,) in float32, and `logits`, now with the gradient of the total.

    Without `gradient` the logits are unchanged. Rows may be strided, columns must be contiguous.
    """
    n, V = logits.shape
    total, nll = (logits.new_empty(n, dtype=torch.float32) for _ in range(2))
    # The soft cap takes registers, so that a program with the most warps would occupy a multiprocessor alone.
    block = min(block // 2 if softcap else block, max(GROUP, triton.next_power_of_2(V)))
    shape: dict[str, Any] = {"CAPPED": bool(softcap), "GRADIENT": gradient, "BLOCK": block, "GROUP": GROUP}
    with torch.cuda.device_of(logits):
        if n:
            _loss_kernel[(n,)](
                logits,
                labels,
                total,
                nll,
                V,
                logits.stride(0),
                softcap or 1.0,
                z_loss,
                IGNORE_INDEX=ignore_index,
                num_warps=max(1, block // PER_WARP),
                **shape,
            )
    return total, nll, logits


def scale_grad(gradient: Tensor, factor: Tensor, dtype: torch.dtype, in_place: bool) -> Tensor:
    """gradient * factor, multiplied in float32 and rounded once to `dtype`; gradient dense, factor () in float32.

    in_place: overwrite `gradient`, whose dtype must be `dtype`.
    """
    out = gradient if in_place else torch.empty_like(gradient, dtype=dtype)
    n = gradient.numel()
    with torch.cuda.device_of(gradient):
        if n:
            _scale_kernel[(triton.cdiv(n, SCALE_BLOCK),)](
                gradient, out, factor, n, IN_PLACE=in_place, BLOCK=SCALE_BLOCK, num_warps=SCALE_WARPS
            )
    return out
