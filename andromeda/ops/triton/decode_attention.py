"""Triton kernels for attention of one query per sequence (Flash-Decoding, arXiv 2311.01282).

The first kernel splits the keys into parts, about two programs per multiprocessor; a program computes a part of the keys of one
sequence and one key/value head for all query heads that share it, so that keys and values are read once. It keeps the running
maximum and sum of FlashAttention (arXiv 2205.14135), with which the second kernel combines the parts. Which keys are visible is
known on the device only: programs whose part lies before the window or after the query read nothing.

Shapes: B sequences, S keys, H query heads, G key/value heads, R = H / G, D and Dv head dims, P parts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from andromeda.ops.triton.pdl import pdl_launch_dependents, pdl_launch_options, pdl_wait, supports_pdl


class DecodeLaunchConfig(NamedTuple):
    """How the keys are split."""

    keys: int
    """Keys that a program loads at once, a power of two of at least 16."""
    programs: int
    """Approximate number of programs in total."""
    warps: int


LAUNCH_CONFIG = DecodeLaunchConfig(32, 264, 4)
"""About two programs for each of an H100's 132 multiprocessors: one computes while the other loads."""
MAX_EXTRA_COLUMNS = 8
"""Up to this many columns beyond a power of two, such as those of folded ALiBi, are added one by one instead of in `tl.dot`."""
COLUMNS = 16
"""Columns of a head that a program of the second kernel combines."""


@triton.jit
def _mask_logits(logits, position, first, last, heads, document, k_documents, slopes, scale, softcap, end, constants: tl.constexpr):
    """Logits (r, n) of a block of keys from the dot products, minus infinity where a key is not visible."""
    logits *= scale
    if constants.softcap:
        logits = softcap * (1.0 - 2.0 / (tl.exp(2.0 * logits / softcap) + 1.0))
    if constants.slopes:
        logits -= tl.load(slopes + heads).to(tl.float32)[:, None] * (last - position).to(tl.float32)[None, :]
    seen = (position >= first) & (position <= last) & (position < end)
    if constants.documents:
        seen = seen & (tl.load(k_documents + position, mask=seen, other=0) == document)
    return tl.where(seen[None, :], logits, float("-inf"))


@triton.jit
def _split_kernel(
    q, k, v, q_documents, k_documents, slopes, index, total, peak, out, S, length, scale, softcap, window,
    q_b, k_b, v_b, q_documents_b, k_documents_b, constants: tl.constexpr,
):  # fmt: skip
    """One part: unnormalized output (B, G, P, R, Dv), and the maximum logit and sum of exponentials it refers to (B, G, P, R)."""
    pdl_launch_dependents(constants)
    pdl_wait(constants)
    pair, part = tl.program_id(0), tl.program_id(1)
    b, g = (pair // constants.G).to(tl.int64), pair % constants.G
    row, d, dv = tl.arange(0, constants.ROWS), tl.arange(0, constants.DOT_D), tl.arange(0, constants.DOT_DV)
    heads = g * constants.R + tl.minimum(row, constants.R - 1)
    q += b * q_b
    queries = tl.load(q + heads[:, None] * constants.q_h + d[None, :], mask=(d < constants.D)[None, :], other=0.0)
    last = tl.load(index).to(tl.int32) if constants.has_index else S - 1
    first = tl.maximum(last + 1 - window, 0) if constants.window else 0
    document = tl.load(q_documents + b * q_documents_b) if constants.documents else 0
    from_key = part * length
    end = tl.minimum(from_key + length, S)
    m = tl.full((constants.ROWS,), float("-inf"), tl.float32)
    s = tl.full((constants.ROWS,), 0.0, tl.float32)
    sums = tl.full((constants.ROWS, constants.DOT_DV), 0.0, tl.float32)
    # Skip blocks before the window and after the query; the start of the window need not be a multiple of KEYS from from_key.
    start = from_key + tl.maximum(first - from_key, 0) // constants.KEYS * constants.KEYS
    for offset in range(start, tl.minimum(end, last + 1), constants.KEYS):
        position = offset + tl.arange(0, constants.KEYS)
        live = position < end
        where = position.to(tl.int64)
        rows = k + b * k_b + g * constants.k_g + where * constants.k_s
        keys = tl.load(rows[None, :] + d[:, None], mask=live[None, :] & (d < constants.D)[:, None], other=0.0)
        values = tl.load(
            v + b * v_b + g * constants.v_g + where[:, None] * constants.v_s + dv[None, :],
            mask=live[:, None] & (dv < constants.DV)[None, :],
            other=0.0,
        )
        scores = tl.dot(queries, keys, input_precision="ieee")
        for column in tl.static_range(tl.constexpr(constants.DOT_D), tl.constexpr(constants.D)):
            query = tl.load(q + heads * constants.q_h + column).to(tl.float32)
            scores += query[:, None] * tl.load(rows + column, mask=live, other=0.0).to(tl.float32)[None, :]
        logits = _mask_logits(
            scores, position, first, last, heads, document, k_documents + b * k_documents_b, slopes, scale, softcap, end, constants
        )
        new_max = tl.maximum(m, tl.max(logits, 1))
        # Both are minus infinity until a key is visible.
        safe = tl.where(new_max == float("-inf"), 0.0, new_max)
        weights = tl.exp(logits - safe[:, None])
        rescale = tl.exp(m - safe)
        s = s * rescale + tl.sum(weights, 1)
        sums = sums * rescale[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        m = new_max
    offset = ((pair * tl.num_programs(1) + part) * constants.R + row).to(tl.int64)
    tl.store(peak + offset, m, mask=row < constants.R)
    tl.store(total + offset, s, mask=row < constants.R)
    tl.store(out + offset[:, None] * constants.DV + dv[None, :], sums, mask=(row < constants.R)[:, None] & (dv < constants.DV)[None, :])


@triton.jit
def _combine_kernel(total, peak, parts, out, P, constants: tl.constexpr):
    """Some columns of one head's output (B, H, Dv), from its parts."""
    pdl_launch_dependents(constants)
    pdl_wait(constants)
    head, column = tl.program_id(0), tl.program_id(1) * constants.COLUMNS + tl.arange(0, constants.COLUMNS)
    pair, r = head // constants.R, head % constants.R
    part = tl.arange(0, constants.PARTS)
    offset = ((pair * P + part) * constants.R + r).to(tl.int64)
    m = tl.load(peak + offset, mask=part < P, other=float("-inf"))
    weight = tl.exp(m - tl.max(m, 0))
    s = tl.sum(tl.load(total + offset, mask=part < P, other=0.0) * weight, 0)
    mask = (part < P)[:, None] & (column < constants.DV)[None, :]
    sums = tl.sum(tl.load(parts + offset[:, None] * constants.DV + column[None, :], mask=mask, other=0.0) * weight[:, None], 0)
    tl.store(out + head * constants.DV + column, (sums / s).to(out.dtype.element_ty), mask=column < constants.DV)


class DecodeConstants(NamedTuple):
    """Values that are known when a kernel is compiled."""

    G: int
    R: int
    D: int
    DV: int
    ROWS: int
    """Query heads of a program, rounded up to the least rows of `tl.dot`."""
    DOT_D: int
    """Columns of a head that `tl.dot` multiplies."""
    DOT_DV: int
    KEYS: int
    COLUMNS: int
    PARTS: int
    """Parts, rounded up to a power of two."""
    q_h: int
    """Strides of heads and keys are constants, from which the compiler knows how many columns it can load at once."""
    k_s: int
    k_g: int
    v_s: int
    v_g: int
    window: bool
    documents: bool
    slopes: bool
    softcap: bool
    has_index: bool
    pdl: bool


def decode_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int, documents: tuple[Tensor, Tensor] | None, slopes: Tensor | None,
    softcap: float, index: Tensor | None = None, config: DecodeLaunchConfig = LAUNCH_CONFIG,
) -> Tensor:  # fmt: skip
    """q (B, 1, H, D), k (B, S, G, D), v (B, S, G, Dv), the rest as in `AttentionSpec` -> (B, 1, H, Dv). Each query must see a key."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    (B, _, H, D), (S, G), DV = q.shape, k.shape[1:3], v.shape[-1]
    blocks = triton.cdiv(S, config.keys)
    length = triton.cdiv(blocks, max(1, min(blocks, config.programs // (B * G)))) * config.keys
    P, R = triton.cdiv(S, length), H // G
    width_v = max(16, triton.next_power_of_2(DV))
    constants = DecodeConstants(
        *(
            G,
            R,
            D,
            DV,
            max(16, triton.next_power_of_2(R)),
            _dot_columns(D),
            width_v,
            config.keys,
            min(COLUMNS, width_v),
            triton.next_power_of_2(P),
        ),
        q_h=q.stride(2),
        k_s=k.stride(1),
        k_g=k.stride(2),
        v_s=v.stride(1),
        v_g=v.stride(2),
        window=bool(window),
        documents=documents is not None,
        slopes=slopes is not None,
        softcap=bool(softcap),
        has_index=index is not None,
        pdl=supports_pdl(q),
    )
    total, peak = (q.new_empty(B * G, P, R, dtype=torch.float32) for _ in range(2))
    parts, out = q.new_empty(B * G, P, R, DV, dtype=torch.float32), q.new_empty(B, 1, H, DV)
    q_documents, k_documents = documents or (q, q)
    strides = (q.stride(0), k.stride(0), v.stride(0), q_documents.stride(0), k_documents.stride(0))
    with torch.cuda.device_of(q):
        optional: tuple[Any, ...] = (q_documents, k_documents, q if slopes is None else slopes, q if index is None else index)
        _split_kernel[(B * G, P)](
            q, k, v, *optional, total, peak, parts, S, length, scale, softcap or 1.0, window, *strides, constants=constants,
            num_warps=config.warps, **pdl_launch_options(constants.pdl),
        )  # fmt: skip
        _combine_kernel[(B * H, triton.cdiv(DV, constants.COLUMNS))](
            total, peak, parts, out, P, constants=constants, num_warps=config.warps, **pdl_launch_options(constants.pdl)
        )
    return out


def _dot_columns(D: int) -> int:
    below = 1 << (D.bit_length() - 1)
    return below if below >= 16 and D - below <= MAX_EXTRA_COLUMNS else max(16, triton.next_power_of_2(D))
