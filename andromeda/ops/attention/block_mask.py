"""The block mask of an attention spec for FlexAttention: which blocks of 128 queries and 128 keys contain visible pairs.

Computed in closed form from the bounds of each block, in O((T / 128) (S / 128)): without a T x S mask, without compilation and
without synchronizing with the device. Blocks that are entirely visible are listed separately, because the kernel need not mask
them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from andromeda.ops.attention.spec import AttentionSpec

BLOCK = 128

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def block_mask(spec: AttentionSpec, T: int, S: int, device: torch.device) -> BlockMask:
    """The BlockMask of T queries and S keys."""
    some, whole = classify_blocks(spec, T, S, device)
    return BlockMask.from_kv_blocks(
        *_kv_block_indices(some & ~whole),
        *_kv_block_indices(whole),
        BLOCK_SIZE=BLOCK,
        mask_mod=_mask_mod(spec, T, S, device),
        seq_lengths=(T, S),
    )


def classify_blocks(spec: AttentionSpec, T: int, S: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Blocks with a visible pair, and blocks with visible pairs only: two bool tensors (B or 1, 1, ceil(T / BLOCK), ceil(S / BLOCK)).

    Where document numbers rise along a sequence, the first is exact; otherwise it may contain more blocks than needed.
    """
    first_query, last_query = (x[:, None] for x in _block_bounds(T, device))
    first_key, last_key = _block_bounds(S, device)
    farthest, nearest = last_query + (S - T) - first_key, first_query + (S - T) - last_key
    some, whole = farthest >= 0, nearest >= 0
    if spec.window:
        some, whole = some & (nearest < spec.window), whole & (farthest < spec.window)
    # The kernel must mask what is beyond the ends, so that an incomplete block is never entirely visible.
    whole = whole & (last_query - first_query == BLOCK - 1) & (last_key - first_key == BLOCK - 1)
    some, whole = some[None, None], whole[None, None]
    if spec.documents is not None:
        (low_q, high_q), (low_k, high_k) = (_document_range(numbers) for numbers in spec.documents)
        low_q, high_q, low_k, high_k = low_q[:, None, :, None], high_q[:, None, :, None], low_k[:, None, None], high_k[:, None, None]
        some = some & (low_q <= high_k) & (low_k <= high_q)
        whole = whole & (low_q == high_k) & (low_k == high_q) & (low_q == high_q)
    return some, whole


def _block_bounds(length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """First and last index of every block."""
    first = torch.arange(0, length, BLOCK, device=device)
    return first, (first + BLOCK - 1).clamp(max=length - 1)


def _document_range(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Lowest and highest document number (B, blocks) in every block of numbers (B, length)."""
    missing = -numbers.shape[1] % BLOCK
    blocks = torch.cat([numbers, numbers[:, -1:].expand(-1, missing)], 1).unflatten(1, (-1, BLOCK))
    return blocks.amin(-1), blocks.amax(-1)


def _kv_block_indices(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """The number of key blocks of each query block, and the indices of key blocks, visible ones first."""
    order = torch.argsort(blocks.to(torch.uint8), dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32), order.to(torch.int32)


def _mask_mod(spec: AttentionSpec, T: int, S: int, device: torch.device) -> MaskMod:
    """Whether query i of batch element b sees key j, for the blocks that are partly visible."""
    # Values that change between calls are tensors: as constants they would cause recompilation.
    offset = None if T == S else torch.full((), S - T, dtype=torch.int32, device=device)
    reach = torch.full((), spec.window, dtype=torch.int32, device=device) if spec.window else None
    documents = spec.documents

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        at = i if offset is None else i + offset
        visible = at >= j
        if reach is not None:
            visible = visible & (at - j < reach)
        if documents is not None:
            visible = visible & (documents[0][b, i] == documents[1][b, j])
        return visible

    return seen
