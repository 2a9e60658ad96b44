"""Queries and keys between projection and attention on a GPU: norm, learned scales, rotation and folded ALiBi in one kernel.

The reference are the model's own parts (`qk_norm`, `position`), one after the other. The kernel reads and writes queries and keys
once, computes in float32 and rounds once, at the end.

Shapes: B batch, T time, H query heads, G key/value heads, D head dim, R rotated dimensions.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Norm = Literal["none", "rms", "l2"]
"""rms: divide by the root mean square; l2: divide by the L2 norm."""
Layout = Literal["none", "half", "interleaved"]
"""Pairs are (i, i + R/2) or (2i, 2i + 1) of the first R dimensions."""

TRITON = find_spec("triton") is not None


class QKPreprocessSpec(NamedTuple):
    """What is applied to queries and keys."""

    norm: Norm
    layout: Layout
    tables: tuple[Tensor, ...] = ()
    """Cosines and sines of queries, then of keys, each (B or 1, T, 1, R/2) in float32, with the factors of xPos; empty without rotation."""
    q_scale: Tensor | None = None
    """Learned scales after the norm, per head (H, 1) or per head and dimension (H, D)."""
    k_scale: Tensor | None = None
    """The same for keys, (G, 1) or (G, D)."""
    alibi: tuple[Tensor, ...] = ()
    """Folded ALiBi: slopes (H,) over the softmax scale in the dtype of the queries, and digits of the key positions (T, 4) or
    (B, T, 4); or empty."""


def is_supported(q: Tensor, k: Tensor, form: QKPreprocessSpec) -> bool:
    """Whether the kernel can compute this: on a GPU, in 32 or 16 bits, on tensors that are not sharded."""
    tensors = (q, k, *form.tables, *form.alibi, *(s for s in (form.q_scale, form.k_scale) if s is not None))
    return (
        TRITON
        and all(t.is_cuda and type(t) in (Tensor, torch.nn.Parameter) for t in tensors)
        and q.dtype == k.dtype
        and q.shape[-1] % 2 == 0
        and q.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and all(t.dtype == torch.float32 for t in form.tables)
    )


def preprocess_qk(q: Tensor, k: Tensor, form: QKPreprocessSpec) -> tuple[Tensor, Tensor]:
    """q (B, T, H, D) and k (B, T, G, D), with any strides, as attention reads them: contiguous, with four more columns for folded ALiBi.

    Gradients reach q, k and the scales, and are deterministic.
    """
    return _preprocess_qk_op(q, k, form.q_scale, form.k_scale, list(form.tables), list(form.alibi), form.norm, form.layout)


class QKVLayout(NamedTuple):
    """Columns of a fused QKV projection (B, T, N): queries, values, keys and padding, in this order."""

    heads: int
    kv_heads: int
    head_dim: int
    """Columns of a query or key head."""
    v_head_dim: int
    """Columns of a value head."""

    def views(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Views of q (B, T, H, D), k (B, T, G, D), v (B, T, G, Dv) and the padding (B, T, ...)."""
        H, G, D, Dv = self
        q, v, k, rest = qkv.split([H * D, G * Dv, G * D, qkv.shape[-1] - H * D - G * (D + Dv)], -1)
        return q.unflatten(-1, (H, D)), k.unflatten(-1, (G, D)), v.unflatten(-1, (G, Dv)), rest


def preprocess_qkv(qkv: Tensor, sizes: QKVLayout, form: QKPreprocessSpec) -> tuple[Tensor, Tensor, Tensor]:
    """`preprocess_qk` for the queries and keys of a fused projection (B, T, N), and its values (B, T, G, Dv) unchanged; all contiguous.

    v_head_dim must be even. The gradients are written into that of the projection, without a concatenation.
    """
    return _preprocess_qkv_op(qkv, list(sizes), form.q_scale, form.k_scale, list(form.tables), list(form.alibi), form.norm, form.layout)


def preprocess_qk_into_cache(q: Tensor, k: Tensor, form: QKPreprocessSpec, keys: Tensor, index: Tensor) -> Tensor:
    """`preprocess_qk` for T = 1 without gradients; keys go into the cache `keys` (B, S, G, D or D + 4) at `index`, () on the device."""
    return _preprocess_qk_into_cache_op(
        q, k, form.q_scale, form.k_scale, list(form.tables), list(form.alibi), form.norm, form.layout, keys, index
    )


@torch.library.custom_op("andromeda::preprocess_qk_into_cache", mutates_args=("keys",))
def _preprocess_qk_into_cache_op(
    q: Tensor,
    k: Tensor,
    q_scale: Tensor | None,
    k_scale: Tensor | None,
    tables: list[Tensor],
    alibi: list[Tensor],
    norm: str,
    layout: str,
    keys: Tensor,
    index: Tensor,
) -> Tensor:
    from andromeda.ops.triton import qk_preprocess as kernels

    return kernels.preprocess_qk((q, k), (q_scale, k_scale), tables, alibi, norm, layout, cache=(keys, index))[0]


@_preprocess_qk_into_cache_op.register_fake
def _(q: Tensor, k: Tensor, q_scale: Any, k_scale: Any, tables: Any, alibi: list[Tensor], *_: Any) -> Tensor:
    return q.new_empty(*q.shape[:-1], _output_head_dim(q.shape[-1], alibi))


def _output_head_dim(D: int, alibi: list[Tensor]) -> int:
    """Columns of an output head."""
    return D + (alibi[1].shape[-1] if alibi else 0)


@torch.library.custom_op("andromeda::preprocess_qk", mutates_args=())
def _preprocess_qk_op(
    q: Tensor,
    k: Tensor,
    q_scale: Tensor | None,
    k_scale: Tensor | None,
    tables: list[Tensor],
    alibi: list[Tensor],
    norm: str,
    layout: str,
) -> tuple[Tensor, Tensor]:
    from andromeda.ops.triton import qk_preprocess as kernels

    return kernels.preprocess_qk((q, k), (q_scale, k_scale), tables, alibi, norm, layout)


@_preprocess_qk_op.register_fake
def _(q: Tensor, k: Tensor, q_scale: Any, k_scale: Any, tables: Any, alibi: list[Tensor], norm: str, layout: str) -> tuple[Tensor, Tensor]:
    out = _output_head_dim(q.shape[-1], alibi)
    return q.new_empty(*q.shape[:-1], out), k.new_empty(*k.shape[:-1], out)


@torch.library.custom_op("andromeda::preprocess_qk_backward", mutates_args=())
def _gradients(
    dq: Tensor,
    dk: Tensor,
    raw: list[Tensor],
    q_scale: Tensor | None,
    k_scale: Tensor | None,
    tables: list[Tensor],
    norm: str,
    layout: str,
    D: int,
) -> list[Tensor]:
    """Gradients of q, k and the scales that are given; raw: q and k, or empty without a norm."""
    from andromeda.ops.triton import qk_preprocess as kernels

    dxs = dq.new_empty(*dq.shape[:-1], D), dk.new_empty(*dk.shape[:-1], D)
    return [*dxs, *kernels.preprocess_qk_backward((dq, dk), raw, (q_scale, k_scale), tables, norm, layout, dxs)]


@_gradients.register_fake
def _(
    dq: Tensor, dk: Tensor, raw: Any, q_scale: Tensor | None, k_scale: Tensor | None, tables: Any, norm: str, layout: str, D: int
) -> list[Tensor]:
    return [dq.new_empty(*dq.shape[:-1], D), dk.new_empty(*dk.shape[:-1], D), *_empty_scale_grads(q_scale, k_scale)]


def _empty_scale_grads(*scales: Tensor | None) -> list[Tensor]:
    return [torch.empty_like(s) for s in scales if s is not None]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    q, k, q_scale, k_scale, tables, alibi, ctx.norm, ctx.layout = inputs
    ctx.D, ctx.tables, ctx.alibi = q.shape[-1], len(tables), len(alibi)
    # The gradient of a rotation alone does not depend on its input.
    raw = () if ctx.norm == "none" else (q, k)
    ctx.save_for_backward(q_scale, k_scale, *tables, *raw)


def _backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Any, ...]:
    q_scale, k_scale, *rest = ctx.saved_tensors
    tables, raw = rest[: ctx.tables], rest[ctx.tables :]
    d_q, d_k, *d_scales = _gradients(dq, dk, raw, q_scale, k_scale, tables, ctx.norm, ctx.layout, ctx.D)
    scales = [None if s is None else d_scales.pop(0) for s in (q_scale, k_scale)]
    return (d_q, d_k, *scales, [None] * ctx.tables, [None] * ctx.alibi, None, None)


_preprocess_qk_op.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op("andromeda::preprocess_qkv", mutates_args=())
def _preprocess_qkv_op(
    qkv: Tensor,
    sizes: list[int],
    q_scale: Tensor | None,
    k_scale: Tensor | None,
    tables: list[Tensor],
    alibi: list[Tensor],
    norm: str,
    layout: str,
) -> tuple[Tensor, Tensor, Tensor]:
    from andromeda.ops.triton import qk_preprocess as kernels

    q, k, v, _ = QKVLayout(*sizes).views(qkv)
    # Outputs of a custom operator must not alias its inputs.
    return *kernels.preprocess_qk((q, k), (q_scale, k_scale), tables, alibi, norm, layout), v.clone(memory_format=torch.contiguous_format)


@_preprocess_qkv_op.register_fake
def _(
    qkv: Tensor, sizes: list[int], q_scale: Any, k_scale: Any, tables: Any, alibi: list[Tensor], norm: str, layout: str
) -> tuple[Tensor, Tensor, Tensor]:
    H, G, D, Dv = sizes
    out = _output_head_dim(D, alibi)
    q, k, v = (qkv.new_empty(*qkv.shape[:2], *shape) for shape in ((H, out), (G, out), (G, Dv)))
    return q, k, v


@torch.library.custom_op("andromeda::preprocess_qkv_backward", mutates_args=())
def _qkv_gradients(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    raw: Tensor | None,
    q_scale: Tensor | None,
    k_scale: Tensor | None,
    tables: list[Tensor],
    norm: str,
    layout: str,
    sizes: list[int],
    width: int,
) -> list[Tensor]:
    """Gradients of the fused projection (B, T, width) and the scales that are given; raw: the projection, or None without a norm."""
    from andromeda.ops.triton import qk_preprocess as kernels

    qkv = dq.new_empty(*dq.shape[:2], width)
    q, k, v, rest = QKVLayout(*sizes).views(qkv)
    read = [] if raw is None else QKVLayout(*sizes).views(raw)[:2]
    d_scales = kernels.preprocess_qk_backward((dq, dk), read, (q_scale, k_scale), tables, norm, layout, (q, k))
    v.copy_(dv)
    rest.zero_()
    return [qkv, *d_scales]


@_qkv_gradients.register_fake
def _(
    dq: Tensor, dk: Any, dv: Any, raw: Any, q_scale: Tensor | None, k_scale: Tensor | None, tables: Any, norm: str, layout: str,
    sizes: list[int], width: int,
) -> list[Tensor]:  # fmt: skip
    return [dq.new_empty(*dq.shape[:2], width), *_empty_scale_grads(q_scale, k_scale)]


def _save_qkv(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    qkv, ctx.sizes, q_scale, k_scale, tables, alibi, ctx.norm, ctx.layout = inputs
    ctx.width, ctx.alibi = qkv.shape[-1], len(alibi)
    ctx.save_for_backward(q_scale, k_scale, None if ctx.norm == "none" else qkv, *tables)


def _backward_qkv(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Any, ...]:
    q_scale, k_scale, qkv, *tables = ctx.saved_tensors
    d_whole, *d_scales = _qkv_gradients(dq, dk, dv, qkv, q_scale, k_scale, tables, ctx.norm, ctx.layout, ctx.sizes, ctx.width)
    scales = [None if s is None else d_scales.pop(0) for s in (q_scale, k_scale)]
    return (d_whole, None, *scales, [None] * len(tables), [None] * ctx.alibi, None, None)


_preprocess_qkv_op.register_autograd(_backward_qkv, setup_context=_save_qkv)
