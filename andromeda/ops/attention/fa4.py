"""FlashAttention-4 (`flash-attn-4`, written in CuTe DSL): the fastest kernels on Hopper and Blackwell, with window, soft cap and documents.

The library's functions are wrapped as one PyTorch operator, which torch.compile does not trace into. Documents become sequences
of variable length. Their bounds are found once per tensor of document numbers, not per layer: on the host where the caller
has the numbers there too (`cache_document_bounds`), otherwise with one synchronization with the device.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Any

import torch
from torch import Tensor

from andromeda.ops.attention.requirements import (
    NO_ALIBI_SLOPES,
    needs_grad,
    requires_equal_head_dims,
    requires_half_on_cuda,
    requires_head_dim_multiple_of_8,
    requires_queries_last,
)
from andromeda.ops.attention.spec import AttentionSpec
from andromeda.ops.attention.tensor_cache import TensorCache
from andromeda.ops.constant_result import assume_constant_result
from andromeda.utils.errors import DataError

name = "fa4"

_cu_seqlens_cache: TensorCache[Tensor] = TensorCache(4)


def unsupported_reason(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """No ALiBi slopes; documents only over whole sequences."""
    if spec.slopes is not None:
        return NO_ALIBI_SLOPES
    if spec.documents is not None and q.shape[1] != k.shape[1]:
        return "it supports documents only with as many queries as keys"
    if reason := requires_queries_last(spec) or requires_half_on_cuda(q, capability=9):
        return reason
    widest = 256 if torch.cuda.get_device_capability(q.device)[0] == 9 else 128
    if reason := requires_head_dim_multiple_of_8(q, v, widest):
        return reason
    if q.shape[2] != k.shape[2] and (reason := requires_equal_head_dims(q, v)) and needs_grad(q, k, v):
        return f"{reason} for gradients with grouped queries"
    return None if _is_installed_constant() else "flash-attn-4 is not installed: run `pip install 'andromeda[flash]'`"


def attend(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
    """Same contract as `eager.attend`. Raises DataError where document numbers decrease along a sequence."""
    documents = None if spec.documents is None else spec.documents[0]
    return torch.ops.andromeda.fa4(q, k, v, documents, spec.scale, spec.window, spec.softcap)[0]


@assume_constant_result
def _is_installed_constant() -> bool:
    return _is_installed()


@cache
def _is_installed() -> bool:
    try:
        return importlib.util.find_spec("flash_attn.cute") is not None
    except ImportError:
        return False


@torch.library.custom_op("andromeda::fa4", mutates_args=())
def _forward(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None, scale: float, window: int, softcap: float) -> tuple[Tensor, Tensor]:
    """Attention output (B, T, H, Dv), and the log-sum-exp in the layout of the library."""
    from flash_attn.cute import flash_attn_func, flash_attn_varlen_func

    options: dict[str, Any] = {
        "softmax_scale": scale,
        "causal": True,
        "window_size": _window(window),
        "softcap": softcap,
        "return_lse": True,
    }
    if documents is None:
        return flash_attn_func(q, k, v, **options)
    lengths = _varlen_arguments(documents)
    out, lse = flash_attn_varlen_func(*(x.flatten(0, 1) for x in (q, k, v)), **lengths, **options)
    return out.unflatten(0, q.shape[:2]), lse


@torch.library.custom_op("andromeda::fa4_backward", mutates_args=())
def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    documents: Tensor | None,
    scale: float,
    window: int,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    # The public functions have no backward pass but their own autograd function, which torch.compile cannot trace.
    from flash_attn.cute.interface import _flash_attn_bwd

    left, right = _window(window)
    options: dict[str, Any] = {
        "softmax_scale": scale,
        "causal": True,
        "softcap": softcap,
        "window_size_left": left,
        "window_size_right": right,
    }
    if documents is None:
        dq, dk, dv = _flash_attn_bwd(q, k, v, out, grad, lse, **options)
        return dq, dk, dv
    flat = (x.flatten(0, 1) for x in (q, k, v, out, grad))
    dq, dk, dv = (x.unflatten(0, q.shape[:2]) for x in _flash_attn_bwd(*flat, lse, **_varlen_arguments(documents), **options))
    return dq, dk, dv


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None, scale: float, window: int, softcap: float) -> tuple[Tensor, Tensor]:
    B, T, H, _ = q.shape
    lse = q.new_empty((B, H, T) if documents is None else (H, B * T), dtype=torch.float32)
    return q.new_empty(B, T, H, v.shape[-1]), lse


@_backward.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    documents: Tensor | None,
    scale: float,
    window: int,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, documents, ctx.scale, ctx.window, ctx.softcap = inputs
    ctx.save_for_backward(q, k, v, documents, *output)


def _gradients(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, documents, out, lse = ctx.saved_tensors
    return *torch.ops.andromeda.fa4_backward(grad, q, k, v, out, lse, documents, ctx.scale, ctx.window, ctx.softcap), None, None, None, None


_forward.register_autograd(_gradients, setup_context=_save)


def _window(window: int) -> tuple[int | None, int | None]:
    """Window to the left and right of the query's position, which the library does not count."""
    return (window - 1, 0) if window else (None, None)


def _varlen_arguments(documents: Tensor) -> dict[str, Any]:
    """The bounds of all documents, as arguments of the library."""
    bounds = _cu_seqlens_cache.get((documents,), None, lambda: _cu_seqlens(documents))
    return {"cu_seqlens_q": bounds, "cu_seqlens_k": bounds, "max_seqlen_q": documents.shape[1], "max_seqlen_k": documents.shape[1]}


def cache_document_bounds(documents: Tensor, on_host: Tensor) -> None:
    """Find the bounds of `documents` (B, T) from their copy in host memory, without waiting for the device.

    Raises DataError where document numbers decrease along a sequence.
    """
    bounds = _cu_seqlens(on_host)
    if documents.is_cuda:
        bounds = bounds.pin_memory().to(documents.device, non_blocking=True)
    _cu_seqlens_cache.put((documents,), None, bounds)


def _cu_seqlens(documents: Tensor) -> Tensor:
    """cu_seqlens: index of the first token of each document among all B T tokens, and B T: (number of documents + 1,) in int32."""
    step = documents.diff(dim=1)
    if bool((step < 0).any()):
        raise DataError(
            "Document numbers decrease along a sequence, which attention backend 'fa4' cannot mask: "
            "number documents in increasing order, or set attention.backend to flex."
        )
    starts = torch.nn.functional.pad(step != 0, (1, 0), value=True).flatten().nonzero().flatten()
    return torch.nn.functional.pad(starts, (0, 1), value=documents.numel()).to(torch.int32)
