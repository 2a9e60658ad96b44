"""Matrix-vector multiplication for decoding, with the operations before and after them fused.

One kernel reads a weight once at memory bandwidth, and computes norm and token shift before the matmul and bias, activation and
residual after it (`ops/triton/gemv.py`). The reference are the model's own parts, one after the other. Nothing synchronizes with
the device. For inference: there are no gradients.

Shapes: M rows (one token of each sequence), K inputs, N outputs, J previous tokens of the token shift, S keys.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

TRITON = find_spec("triton") is not None
MAX_ROWS = 8
"""Most rows (sequences)."""
MAX_FUSED_NORM_ROWS = 2
"""Up to this number of rows every program normalizes them itself; more are normalized once, by a separate kernel."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_INPUTS = 1 << 15
"""Most inputs."""


class GemvNorm(NamedTuple):
    """Layer or RMS norm of the rows; kind is layer or rms."""

    kind: str
    eps: float
    gain: Tensor | None = None
    """(K,)."""


class GemvTokenShift(NamedTuple):
    """Token shift by chunks: channels [i C, (i + 1) C), C = K // (J + 1), come from i tokens earlier, and are zero across documents."""

    past: Tensor
    """Normalized vectors of the previous tokens (M, J, K), the most recent one last; updated in place."""
    documents: tuple[Tensor, Tensor] | None = None
    """Document numbers of the rows (M, 1) and of all keys (M, S)."""
    at: Tensor | None = None
    """Position of the current token among the keys, () on the device; None is the last."""


class PendingShiftUpdate(NamedTuple):
    """An update of the token shift's past that the next `gemv` must make: programs of this one may not have read the past yet.

    No other kernel that reads `past` may run in between.
    """

    past: Tensor
    normalized: Tensor
    """Normalized rows (M, K), to be appended to `past`."""


class CacheSlot(NamedTuple):
    """A place in a KV cache to which some of the outputs are written too."""

    cache: Tensor
    """(M, S, ...), whose last dimensions hold the outputs of one position."""
    at: Tensor
    """Position in the cache, () on the device."""
    begin: int
    """Index of the first of these outputs."""


def unsupported_reason(x: Tensor, *weights: Tensor) -> str | None:
    """Why the kernels cannot multiply x (M, K) with these weights (N, K), or None if they can."""
    if not (TRITON and x.is_cuda):
        return "they need a CUDA GPU and Triton"
    if x.dtype not in DTYPES or any(w.dtype != x.dtype for w in weights):
        return "they compute in 32 and 16 bits, with inputs and weights of one dtype"
    if x.shape[0] > MAX_ROWS or any(max(w.shape[1], x.shape[1]) > MAX_INPUTS for w in weights):
        return f"they take {MAX_ROWS} rows of {MAX_INPUTS} inputs at most"
    if any(type(w) not in (Tensor, torch.nn.Parameter) or not w.is_contiguous() for w in weights):
        return "they read contiguous, unsharded weights"
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
    """activation(x' W^T + b) + residual (M, N) for x (M, K), weight (N, K), bias (N,), residual (M, N); x' is x after norm and shift.

    activation: none, gelu, gelu_tanh, relu, relu2 or silu. The second result, if not None, must be given to the next call as
    `pending`.
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
    """x (M, K) after norm and token shift, whose past is updated."""
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
    """The outputs, and the normalized rows if `past` is given. pending_past, pending_normalized: the update of an earlier call."""
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
