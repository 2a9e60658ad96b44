"""A Triton kernel for the softmax side of a linear head's loss: losses of a chunk's logits, and their gradient in the logits' place.

A program takes a row. It reads the row once for the largest logit and the sum of exponentials, each lane for its own columns,
and once more (from the cache, as a row is short) to write the gradient. All arithmetic is in float32.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 4096, 8
"""Columns that a program reads at once."""


@triton.jit
def _capped(x, cap, CAPPED: tl.constexpr):
    """cap tanh(x / cap), or x."""
    if CAPPED:
        return cap * (1.0 - 2.0 / (tl.exp(2.0 * x / cap) + 1.0))
    return x


@triton.jit
def _row(
    logits,
    labels,
    total,
    nll,
    V,
    stride,
    cap,
    z_loss,
    IGNORED: tl.constexpr,
    CAPPED: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0)
    row = logits + index.to(tl.int64) * stride
    label = tl.load(labels + index)
    counted = label != IGNORED
    # Read before any lane writes: the reductions below are barriers.
    chosen = _capped(tl.load(row + tl.where(counted, label, 0)).to(tl.float32), cap, CAPPED)
    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    sums = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        column = start + tl.arange(0, BLOCK)
        z = tl.load(row + column, mask=column < V, other=0.0).to(tl.float32)
        z = tl.where(column < V, _capped(z, cap, CAPPED), float("-inf"))
        above = tl.maximum(largest, z)
        # A lane that has seen no column yet has minus infinity twice.
        sums = tl.where(above == float("-inf"), 0.0, sums * tl.exp(largest - above) + tl.exp(z - above))
        largest = above
    peak = tl.max(largest, 0)
    log_z = peak + tl.log(tl.sum(sums * tl.exp(largest - peak), 0))
    loss = log_z - chosen
    tl.store(nll + index, tl.where(counted, loss, 0.0))
    tl.store(total + index, tl.where(counted, loss + z_loss * log_z * log_z, 0.0))
    if GRADIENT:
        factor = tl.where(counted, 1.0 + 2.0 * z_loss * log_z, 0.0)
        one = tl.where(counted, 1.0, 0.0)
        for start in range(0, V, BLOCK):
            column = start + tl.arange(0, BLOCK)
            z = _capped(tl.load(row + column, mask=column < V, other=0.0).to(tl.float32), cap, CAPPED)
            d = tl.exp(z - log_z) * factor - tl.where(column == label, one, 0.0)
            if CAPPED:
                d = d * (1.0 - (z / cap) * (z / cap))
            tl.store(row + column, d.to(row.dtype.element_ty), mask=column < V)


def rows(
    logits: Tensor, labels: Tensor, softcap: float, z_loss: float, gradient: bool, ignored: int, block: int = BLOCK
) -> tuple[Tensor, Tensor, Tensor]:
    """logits (n, V), labels (n,) -> total and cross entropy, each (n,) in float32, and `logits`, which hold the total's gradient now.

    Without `gradient` the logits stay. Rows may lie apart, columns not.
    """
    n, V = logits.shape
    total, nll = (logits.new_empty(n, dtype=torch.float32) for _ in range(2))
    shape: dict[str, Any] = {"CAPPED": bool(softcap), "GRADIENT": gradient, "BLOCK": block, "num_warps": WARPS}
    with torch.cuda.device_of(logits):
        if n:
            _row[(n,)](logits, labels, total, nll, V, logits.stride(0), softcap or 1.0, z_loss, IGNORED=ignored, **shape)
    return total, nll, logits
