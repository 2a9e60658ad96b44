"""One query per sequence, as in cached decoding: keys and values are read once, by the whole GPU.

Fused kernels for many queries assign a (sequence, key head) to one multiprocessor, which then reads a long cache alone. Here the
keys are split (`ops/triton/decode_attention.py`); without Triton, two batched matmuls with the softmax between them use the whole
GPU as well. Logits are accumulated and kept in float32. Nothing synchronizes with the device.

Shapes: B batch, S keys, H query heads, G key/value heads, R = H / G, D head dim.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from andromeda.ops.attention.spec import AttentionSpec
from andromeda.ops.compute_dtype import HALF_DTYPES

name = "decode"

TRITON = find_spec("triton") is not None
MAX_HEAD_DIM = 256
"""Largest head dim of the Triton kernel."""


def unsupported_reason(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Any spec with one query, without gradients."""
    if q.shape[1] != 1:
        return "it computes one query at a time"
    if any(x.requires_grad for x in (q, k, v)):
        return "it has no backward pass"
    return "it has no 16-bit matmuls with float32 results outside of CUDA" if q.dtype in HALF_DTYPES and q.device.type != "cuda" else None


def attend(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
    """Same contract as `eager.attend`, for T = 1."""
    if TRITON and q.is_cuda and q.dtype in HALF_DTYPES and max(q.shape[-1], v.shape[-1]) <= MAX_HEAD_DIM:
        q_documents, k_documents = spec.documents or (None, None)
        return torch.ops.andromeda.decode_attention(
            q, k, v, q_documents, k_documents, spec.slopes, spec.query_index, spec.scale, spec.window, spec.softcap
        )
    return matmul_attention(q, k, v, spec)


@torch.library.custom_op("andromeda::decode_attention", mutates_args=())
def _decode_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_documents: Tensor | None,
    k_documents: Tensor | None,
    slopes: Tensor | None,
    index: Tensor | None,
    scale: float,
    window: int,
    softcap: float,
) -> Tensor:
    from andromeda.ops.triton import decode_attention as kernels

    documents = None if q_documents is None or k_documents is None else (q_documents, k_documents)
    return kernels.decode_attention(q, k, v, scale, window, documents, slopes, softcap, index)


@_decode_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, q_documents: Tensor | None, k_documents: Tensor | None, slopes: Tensor | None, *_: object) -> Tensor:
    return q.new_empty(*q.shape[:-1], v.shape[-1])


def matmul_attention(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
    """The same by two batched matmuls."""
    (B, _, H, _), (S, G) = q.shape, k.shape[1:3]
    # With several sequences and several key heads this copies the keys, because a matmul has only one strided batch dimension.
    rows, keys, values = q.reshape(B * G, H // G, -1), k.transpose(1, 2).flatten(0, 1), v.transpose(1, 2).flatten(0, 1)
    logits = _bmm_float32(rows, keys.mT).view(B, H, 1, S) * spec.scale
    if spec.softcap:
        logits = spec.softcap * torch.tanh(logits / spec.softcap)
    bias = spec.bias(1, S, q.device)
    if bias is not None:
        logits = logits + bias.to(logits.dtype)
    if spec.window or spec.documents is not None or spec.query_index is not None:
        logits = logits.masked_fill(~spec.mask(1, S, q.device), float("-inf"))
    weights = logits.softmax(-1).to(v.dtype).view(B * G, H // G, S)
    return torch.bmm(weights, values).view(B, 1, H, -1)


def _bmm_float32(a: Tensor, b: Tensor) -> Tensor:
    """Batched matmul with results in float32 at least."""
    return torch.bmm(a, b, out_dtype=torch.float32) if a.dtype in HALF_DTYPES else torch.bmm(a, b)
