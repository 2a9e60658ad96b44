"""Products of a matrix with a few vectors, with what lies before and after them: what a decoding step is made of.

One kernel reads a weight once at the bandwidth of the device and does the norm and token shift before its product and the bias,
activation and residual sum after it (`ops/triton/gemv.py`). The plain reference is the model's own parts, one after the other.
Nothing waits for the device. For inference: there are no gradients.

Shapes: M rows, one token each, K inputs, N outputs, J tokens of the shift, S keys.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

TRITON = find_spec("triton") is not None
MAX_ROWS = 8
"""Most rows."""
MAX_FUSED_NORM_ROWS = 2
"""Up to here every program normalizes the rows for itself; more rows are normalized once, by a kernel of their own."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_INPUTS = 1 << 15
"""Inputs."""


class GemvNorm(NamedTuple):
    """Layer or RMS norm of the rows (`kind` layer, rms)."""

    kind: str
    eps: float
    gain: Tensor | None = None
    """(K,)."""


class GemvTokenShift(NamedTuple):
    """Token shift by chunks: channels [i C, (i + 1) C) for C = K // (J + 1) are of i tokens before, zero across documents."""

    past: Tensor
    """Normalized rows of the tokens before (M, J, K), the newest last; moved on by one token."""
    documents: tuple[Tensor, Tensor] | None = None
    """Numbers of the rows' documents (M, 1) and of those of all keys (M, S)."""
    at: Tensor | None = None
    """Where the token of this pass lies among the keys, a number () on the device; None is the last."""


class PendingShiftUpdate(NamedTuple):
    """A past that is still to be moved on: programs of the product that read it may not have come to it yet.

    The next product is given it and does it; none may come between that reads `past`.
    """

    past: Tensor
    normalized: Tensor
    """Normalized rows (M, K)."""


class CacheSlot(NamedTuple):
    """Where some outputs go as well: into a cache."""

    cache: Tensor
    """(M, S, ...), whose last dimensions are outputs."""
    at: Tensor
    """Where in it, a number () on the device."""
    begin: int
    """The first of those outputs."""


def unsupported_reason(x: Tensor, *weights: Tensor) -> str | None:
    """Why the kernels do not compute products of x (M, K) with these matrices (N, K), or None."""
    if not (TRITON and x.is_cuda):
        return "they need a CUDA GPU and Triton"
    if x.dtype not in DTYPES or any(w.dtype != x.dtype for w in weights):
        return "they compute in 32 and 16 bits, rows and weights alike"
    if x.shape[0] > MAX_ROWS or any(max(w.shape[1], x.shape[1]) > MAX_INPUTS for w in weights):
        return f"they take {MAX_ROWS} rows of {MAX_INPUTS} inputs at most"
    if any(type(w) not in (Tensor, torch.nn.Parameter) or not w.is_contiguous() for w in weights):
        return "they read plain matrices that lie in one piece"
    trained = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *weights))
    return "they have no backward pass" if trained else None


def gemv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: GemvNorm | None = None,
    shift: GemvTokenShift | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    pending: PendingShiftUpdate | None = None,
    slot: CacheSlot | None = None,
) -> tuple[Tensor, PendingShiftUpdate | None]:
    """activation(x' W^T + b) + residual (M, N) for x (M, K), weight (N, K), bias (N,), residual (M, N); x' is x normed and shifted.

    activation: none, gelu, gelu_tanh, relu, relu2 or silu. What comes back beside it, if anything, is the `keep` of the next product.
    """
    if norm and len(x) > MAX_FUSED_NORM_ROWS:
        x, norm, shift = normalize(x, norm, shift), None, None
    kind, eps, gain = norm or ("none", 0.0, None)
    past, documents, at = shift or (None, None, None)
    q_documents, k_documents = documents or (None, None)
    options = (*(pending or (None, None)), *(slot or (None, None, 0)), kind, eps, activation)
    y, normalized = _gemv_op(x, weight, bias, residual, gain, past, q_documents, k_documents, at, *options)
    return y, None if past is None else PendingShiftUpdate(past, normalized)


def normalize(x: Tensor, norm: GemvNorm, shift: GemvTokenShift | None = None) -> Tensor:
    """x (M, K) normed and shifted; the shift's past is moved on."""
    past, documents, at = shift or (None, None, None)
    q_documents, k_documents = documents or (None, None)
    return _normalize_op(x, norm.gain, past, q_documents, k_documents, at, norm.kind, norm.eps)


@torch.library.custom_op("andromeda::gemv", mutates_args=("pending_past", "cache"))
def _gemv_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    gain: Tensor | None,
    past: Tensor | None,
    q_documents: Tensor | None,
    k_documents: Tensor | None,
    index: Tensor | None,
    pending_past: Tensor | None,
    pending_normalized: Tensor | None,
    cache: Tensor | None,
    at: Tensor | None,
    begin: int,
    kind: str,
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """The product, and the normalized rows if `past` is given. old, row: what is kept for an earlier product."""
    from andromeda.ops.triton import gemv as kernels

    y, normalized = _empty_outputs(x, weight, past)
    slot = kernels.CacheSlotPointers()
    if cache is not None:
        slot = kernels.CacheSlotPointers(cache, at, begin, begin + cache[0, 0].numel(), cache.stride(0), cache.stride(1))
    kernels.gemv(
        kernels.GemvInput(x, kind, eps, gain, past, q_documents, k_documents, index),
        *(weight, y, kernels.GemvEpilogue(bias, residual), activation),
        *(None if past is None else normalized, kernels.PendingShiftPointers(pending_past, pending_normalized), slot),
    )
    return y, normalized


@_gemv_op.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, gain: Tensor | None, past: Tensor | None,
    q_documents: Tensor | None, k_documents: Tensor | None, index: Tensor | None, pending_past: Tensor | None,
    pending_normalized: Tensor | None, cache: Tensor | None, at: Tensor | None, begin: int, kind: str, eps: float, activation: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _empty_outputs(x, weight, past)


def _empty_outputs(x: Tensor, weight: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor]:
    return x.new_empty(len(x), len(weight)), x.new_empty(0) if past is None else torch.empty_like(x)


@torch.library.custom_op("andromeda::gemv_normalize", mutates_args=("past",))
def _normalize_op(
    x: Tensor,
    gain: Tensor | None,
    past: Tensor | None,
    q_documents: Tensor | None,
    k_documents: Tensor | None,
    index: Tensor | None,
    kind: str,
    eps: float,
) -> Tensor:
    from andromeda.ops.triton import gemv as kernels

    return kernels.normalize(kernels.GemvInput(x, kind, eps, gain, past, q_documents, k_documents, index))


@_normalize_op.register_fake
def _(
    x: Tensor, gain: Tensor | None, past: Tensor | None, q_documents: Tensor | None, k_documents: Tensor | None, index: Tensor | None,
    kind: str, eps: float,
) -> Tensor:  # fmt: skip
    return torch.empty_like(x)
