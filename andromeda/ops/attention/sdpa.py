"""PyTorch's scaled_dot_product_attention, which selects a kernel itself: flash for causal attention, masks for everything else.

With a mask, queries are processed in blocks of 256 with the keys that any of them sees: that nearly halves the work of a causal
mask and makes a window cost O(T window).

Shapes: B batch, T queries, S keys, H query heads, G key/value heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from andromeda.ops.attention.requirements import needs_grad
from andromeda.ops.attention.spec import AttentionSpec
from andromeda.ops.attention.tensor_cache import TensorCache
from andromeda.ops.compute_dtype import HALF_DTYPES

name = "sdpa"

QUERY_BLOCK = 256
"""Queries of one mask. On a CPU core, packed sequences of 512 tokens then take 68 ms instead of 86, of 2048 tokens 203 instead of 377
(benchmarks/attention_cpu.py)."""

QueryBlock = tuple[slice, slice, Tensor]
"""Some queries, the keys that any of them sees, and their additive mask: zero where visible, minus infinity elsewhere."""

_query_blocks: TensorCache[list[QueryBlock]] = TensorCache(4)
_is_single_document: TensorCache[bool] = TensorCache(4)


def unsupported_reason(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """No soft cap; on GPUs no bias that the mask would have to round."""
    if spec.softcap:
        return "it has no soft cap"
    if spec.slopes is not None and q.device.type != "cpu" and q.dtype in HALF_DTYPES:
        return "its mask would round ALiBi's bias to 16 bits"
    return None


def attend(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
    """Same contract as `eager.attend`."""
    if q.device.type == "cpu" and q.dtype in HALF_DTYPES and needs_grad(q, k, v):
        # Forward and backward in 16 bits take 2.7 times as long on a CPU as in float32 with conversions (benchmarks/attention_cpu.py).
        return attend(q.float(), k.float(), v.float(), spec).to(v.dtype)
    T, S = q.shape[1], k.shape[1]
    if spec.documents is not None and _has_one_document(spec.documents):
        spec = replace(spec, documents=None)
    if spec.is_plain_causal and T == S:
        return _sdpa(q, k, v, spec.scale)
    if T == 1:
        return _decode(q, k, v, spec)
    strips = _query_blocks.get(spec.documents or (), (spec.window, T, S, q.dtype, q.device), lambda: list(_split_queries(spec, q, S)))
    dtype = q.dtype
    if dtype in HALF_DTYPES and needs_grad(k, v):
        # The gradients of a key from several query blocks and from the heads that share it are added in float32.
        k, v = (x.float().repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
    parts = []
    for rows, keys, hidden in strips:
        seen = k[:, keys].to(dtype), v[:, keys].to(dtype)
        parts.append(_sdpa(q[:, rows], *seen, spec.scale, _add_alibi(spec, hidden)))
    return torch.cat(parts, 1)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """The PyTorch function; causal without a mask."""
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)


def _decode(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
    """One query, q (B, 1, H, D): heads that share keys are passed as queries, so that no kernel copies keys for them."""
    G, mask = k.shape[2], None
    if not spec.is_plain_causal:
        mask = _add_alibi(spec, _additive_mask(spec, q, k.shape[1]))
        if spec.slopes is not None:
            mask = mask.unflatten(-3, (G, -1)).squeeze(-2)
    out = F.scaled_dot_product_attention(
        q.squeeze(1).unflatten(1, (G, -1)), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, scale=spec.scale
    )
    return out.flatten(1, 2)[:, None]


def _has_one_document(documents: tuple[Tensor, Tensor]) -> bool:
    """Whether every sequence is a single document; checked on CPUs only, because on a GPU it would synchronize."""
    queries, keys = documents
    if keys.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return _is_single_document.get(documents, None, lambda: bool((keys == queries[:, :1]).all()))


def _split_queries(spec: AttentionSpec, q: Tensor, S: int) -> Iterator[QueryBlock]:
    """Blocks of QUERY_BLOCK queries."""
    T = q.shape[1]
    for start in range(0, T, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, T)
        end = S - T + stop
        documents = spec.documents and (spec.documents[0][:, start:stop], spec.documents[1][:, :end])
        # The last of these queries is at the last of these keys, as in the whole call.
        part, first = replace(spec, documents=documents).crop_to_window(stop - start, end)
        yield slice(start, stop), slice(first, end), _additive_mask(part, q[:, start:stop], end - first)


def _additive_mask(spec: AttentionSpec, q: Tensor, S: int) -> Tensor:
    """Zero where a key is visible, minus infinity elsewhere: (T, S), or (B, 1, T, S) with documents."""
    # CPU kernels accept a float32 mask with 16-bit queries, so that ALiBi's bias is not rounded.
    dtype = torch.promote_types(q.dtype, torch.float32) if q.device.type == "cpu" else q.dtype
    visible = spec.mask(q.shape[1], S, q.device)
    return torch.zeros(visible.shape, dtype=dtype, device=q.device).masked_fill(~visible, float("-inf"))


def _add_alibi(spec: AttentionSpec, hidden: Tensor) -> Tensor:
    """The mask plus ALiBi's bias, if there is one: (H, T, S) then, or (B, H, T, S) with documents."""
    bias = spec.bias(hidden.shape[-2], hidden.shape[-1], hidden.device)
    return hidden if bias is None else hidden + bias.to(hidden.dtype)
