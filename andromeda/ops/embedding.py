"""Embedding lookup whose weight gradient is fast and deterministic.

The lookup is PyTorch's, which torch.compile fuses with what follows. On a GPU the weight gradient sorts the ids and sums each row
in float32: the dense gradient is written once and nothing is added atomically. On a CPU it is PyTorch's, which is deterministic
too.

Shapes: N tokens, V rows of the table, C columns.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

TRITON = find_spec("triton") is not None


def is_supported(weight: Tensor) -> bool:
    """Whether the kernel can compute the gradient of this table: on a GPU, in 32 or 16 bits, not sharded."""
    plain = type(weight) in (Tensor, torch.nn.Parameter)
    return TRITON and weight.is_cuda and plain and weight.dtype in (torch.float32, torch.bfloat16, torch.float16)


def embed(ids: Tensor, weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Rows `ids` (...) of weight (V, C): (..., C) in `dtype` (that of the table if None)."""
    return embed_split(ids, weight, 1, dtype)[0]


def embed_split(ids: Tensor, weight: Tensor, parts: int, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
    """The same, split into `parts` of equal width (..., C / parts), whose gradients are not concatenated in the backward pass."""
    if torch.is_grad_enabled() and weight.requires_grad and is_supported(weight):
        return _Embed.apply(ids, weight, parts, dtype)
    return _gather(ids, weight, parts, dtype)


def _gather(ids: Tensor, weight: Tensor, parts: int, dtype: torch.dtype | None) -> tuple[Tensor, ...]:
    return F.embedding(ids, weight).to(dtype or weight.dtype).chunk(parts, -1)


class _Embed(torch.autograd.Function):
    """PyTorch's lookup with our own weight gradient."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, parts: int, dtype: torch.dtype | None) -> tuple[Tensor, ...]:
        ctx.save_for_backward(ids)
        ctx.rows, ctx.dtype = weight.shape[0], weight.dtype
        return _gather(ids, weight, parts, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> tuple[None, Tensor, None, None]:
        (ids,) = ctx.saved_tensors
        return None, embedding_weight_grad(ids.flatten(), [dy.flatten(0, -2) for dy in dys], ctx.rows, ctx.dtype), None, None


@torch.library.custom_op("andromeda::embedding_weight_grad", mutates_args=())
def embedding_weight_grad(ids: Tensor, dys: list[Tensor], rows: int, dtype: torch.dtype) -> Tensor:
    """Gradient (rows, C) in `dtype` of a table whose rows `ids` (N,) were read.

    dys: the output gradient, split by columns: (N, C_i) each, C columns in total. Sums are in float32 and in token order, so that
    they are deterministic.
    """
    from andromeda.ops.triton import embedding as kernels

    return kernels.embedding_weight_grad(ids, dys, rows, dtype)


@embedding_weight_grad.register_fake
def _(ids: Tensor, dys: list[Tensor], rows: int, dtype: torch.dtype) -> Tensor:
    return ids.new_empty(rows, sum(dy.shape[1] for dy in dys), dtype=dtype)
