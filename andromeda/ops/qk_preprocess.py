"""Queries and keys on a GPU: norm, learned scales, rotation and folded ALiBi in one kernel that reads and writes them once.

The plain reference is the model's own parts (`qk_norm`, `position`), called one after the other. The kernel computes the
same in float32 and rounds once, at the end.

Shapes: B batch, T time, H query heads, G key/value heads, D head dim, R rotated dimensions.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Norm = Literal["none", "rms", "l2"]
"""Root mean square one, or length one."""
Layout = Literal["none", "half", "interleaved"]
"""Pairs are (i, i + R/2) or (2i, 2i + 1) of the first R dimensions."""

TRITON = find_spec("triton") is not None


class Form(NamedTuple):
    """What is done to queries and keys."""

    norm: Norm
    layout: Layout
    tables: tuple[Tensor, ...] = ()
    """Cosines and sines of queries, then of keys, each (B or 1, T, 1, R/2) in float32 and times xPos's factors; or none."""
    q_scale: Tensor | None = None
    """Learned factors after the norm, for each head (H, 1) or each head and dimension (H, D)."""
    k_scale: Tensor | None = None
    """The same of keys (G, 1) or (G, D)."""
    tails: tuple[Tensor, ...] = ()
    """Folded ALiBi: slopes (H,) over the softmax scale, in the queries' type, and digits of the keys (T, 4); or none."""


def accepts(q: Tensor, k: Tensor, form: Form) -> bool:
    """Whether the kernel computes this: on a GPU, in 32 or 16 bits, on plain tensors (not sharded ones)."""
    tensors = (q, k, *form.tables, *form.tails, *(s for s in (form.q_scale, form.k_scale) if s is not None))
    return (
        TRITON
        and all(t.is_cuda and type(t) in (Tensor, torch.nn.Parameter) for t in tensors)
        and q.dtype == k.dtype
        and q.shape[-1] % 2 == 0
        and q.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and all(t.dtype == torch.float32 for t in form.tables)
    )


def prepare(q: Tensor, k: Tensor, form: Form) -> tuple[Tensor, Tensor]:
    """q (B, T, H, D) and k (B, T, G, D), views of anything, as attention takes them: contiguous, with four columns more if folded.

    Gradients reach q, k and the scales, and are the same in every run.
    """
    return _prepare(q, k, form.q_scale, form.k_scale, list(form.tables), list(form.tails), form.norm, form.layout)


class Sizes(NamedTuple):
    """What a joined projection (B, T, N) holds: queries, values, keys, and what its width is filled up with."""

    heads: int
    kv_heads: int
    content: int
    """Columns of a query's or key's head."""
    value: int
    """Columns of a value's head, an even number."""

    def views(self, whole: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q (B, T, H, D), k (B, T, G, D), v (B, T, G, Dv), and the rest (B, T, ...)."""
        H, G, D, Dv = self
        q, v, k, rest = whole.split([H * D, G * Dv, G * D, whole.shape[-1] - H * D - G * (D + Dv)], -1)
        return q.unflatten(-1, (H, D)), k.unflatten(-1, (G, D)), v.unflatten(-1, (G, Dv)), rest


def prepare_joined(whole: Tensor, sizes: Sizes, form: Form) -> tuple[Tensor, Tensor, Tensor]:
    """The same for the q and k of a joined projection (B, T, N), and its v (B, T, G, Dv) as it is; all contiguous.

    The gradients are written where they belong in that of the projection, which need not be put together afterwards.
    """
    return _prepare_joined(whole, list(sizes), form.q_scale, form.k_scale, list(form.tables), list(form.tails), form.norm, form.layout)


def prepare_into(q: Tensor, k: Tensor, form: Form, keys: Tensor, index: Tensor) -> Tensor:
    """The same for T = 1 without gradients, the keys written into a cache (B, S, G, D or D + 4) at `index`, a number () on the device."""
    return _prepare_into(q, k, form.q_scale, form.k_scale, list(form.tables), list(form.tails), form.norm, form.layout, keys, index)


@torch.library.custom_op("andromeda::prepare_qk_into", mutates_args=("keys",))
def _prepare_into(
    q: Tensor,
    k: Tensor,
    q_scale: Tensor | None,
    k_scale: Tensor | None,
    tables: list[Tensor],
    tails: list[Tensor],
    norm: str,
    layout: str,
    keys: Tensor,
    index: Tensor,
) -> Tensor:
    from andromeda.ops.triton import qk_preprocess as device

    return device.forward((q, k), (q_scale, k_scale), tables, tails, norm, layout, place=(keys, index))[0]


@_prepare_into.register_fake
def _(q: Tensor, k: Tensor, q_scale: Any, k_scale: Any, tables: Any, tails: list[Tensor], *_: Any) -> Tensor:
    return q.new_empty(*q.shape[:-1], _columns(q.shape[-1], tails))


def _columns(D: int, tails: list[Tensor]) -> int:
    """Columns of a prepared head of D."""
    return D + (tails[1].shape[-1] if tails else 0)


@torch.library.custom_op("andromeda::prepare_qk", mutates_args=())
def _prepare(
    q: Tensor,
    k: Tensor,
    q_scale: Tensor | None,
    k_scale: Tensor | None,
    tables: list[Tensor],
    tails: list[Tensor],
    norm: str,
    layout: str,
) -> tuple[Tensor, Tensor]:
    from andromeda.ops.triton import qk_preprocess as device

    return device.forward((q, k), (q_scale, k_scale), tables, tails, norm, layout)


@_prepare.register_fake
def _(q: Tensor, k: Tensor, q_scale: Any, k_scale: Any, tables: Any, tails: list[Tensor], norm: str, layout: str) -> tuple[Tensor, Tensor]:
    out = _columns(q.shape[-1], tails)
    return q.new_empty(*q.shape[:-1], out), k.new_empty(*k.shape[:-1], out)


@torch.library.custom_op("andromeda::prepare_qk_backward", mutates_args=())
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
    """Gradients of q, k, and of those scales that there are; `raw` is q and k, or nothing where there is no norm."""
    from andromeda.ops.triton import qk_preprocess as device

    dxs = dq.new_empty(*dq.shape[:-1], D), dk.new_empty(*dk.shape[:-1], D)
    return [*dxs, *device.backward((dq, dk), raw, (q_scale, k_scale), tables, norm, layout, dxs)]


@_gradients.register_fake
def _(
    dq: Tensor, dk: Tensor, raw: Any, q_scale: Tensor | None, k_scale: Tensor | None, tables: Any, norm: str, layout: str, D: int
) -> list[Tensor]:
    return [dq.new_empty(*dq.shape[:-1], D), dk.new_empty(*dk.shape[:-1], D), *_like(q_scale, k_scale)]


def _like(*scales: Tensor | None) -> list[Tensor]:
    return [torch.empty_like(s) for s in scales if s is not None]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    q, k, q_scale, k_scale, tables, tails, ctx.norm, ctx.layout = inputs
    ctx.D, ctx.tables, ctx.tails = q.shape[-1], len(tables), len(tails)
    # A rotation alone is undone without what it was applied to.
    raw = () if ctx.norm == "none" else (q, k)
    ctx.save_for_backward(q_scale, k_scale, *tables, *raw)


def _backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Any, ...]:
    q_scale, k_scale, *rest = ctx.saved_tensors
    tables, raw = rest[: ctx.tables], rest[ctx.tables :]
    d_q, d_k, *d_scales = _gradients(dq, dk, raw, q_scale, k_scale, tables, ctx.norm, ctx.layout, ctx.D)
    scales = [None if s is None else d_scales.pop(0) for s in (q_scale, k_scale)]
    return (d_q, d_k, *scales, [None] * ctx.tables, [None] * ctx.tails, None, None)


_prepare.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op("andromeda::prepare_joined_qkv", mutates_args=())
def _prepare_joined(
    whole: Tensor,
    sizes: list[int],
    q_scale: Tensor | None,
    k_scale: Tensor | None,
    tables: list[Tensor],
    tails: list[Tensor],
    norm: str,
    layout: str,
) -> tuple[Tensor, Tensor, Tensor]:
    from andromeda.ops.triton import qk_preprocess as device

    q, k, v, _ = Sizes(*sizes).views(whole)
    # Results must not share memory with what they are made of.
    return *device.forward((q, k), (q_scale, k_scale), tables, tails, norm, layout), v.clone(memory_format=torch.contiguous_format)


@_prepare_joined.register_fake
def _(
    whole: Tensor, sizes: list[int], q_scale: Any, k_scale: Any, tables: Any, tails: list[Tensor], norm: str, layout: str
) -> tuple[Tensor, Tensor, Tensor]:
    H, G, D, Dv = sizes
    out = _columns(D, tails)
    q, k, v = (whole.new_empty(*whole.shape[:2], *shape) for shape in ((H, out), (G, out), (G, Dv)))
    return q, k, v


@torch.library.custom_op("andromeda::prepare_joined_qkv_backward", mutates_args=())
def _joined_gradients(
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
    """Gradients of the joined projection (B, T, width), and of those scales that there are; `raw` is it, or None without a norm."""
    from andromeda.ops.triton import qk_preprocess as device

    whole = dq.new_empty(*dq.shape[:2], width)
    q, k, v, rest = Sizes(*sizes).views(whole)
    read = [] if raw is None else Sizes(*sizes).views(raw)[:2]
    d_scales = device.backward((dq, dk), read, (q_scale, k_scale), tables, norm, layout, (q, k))
    v.copy_(dv)
    rest.zero_()
    return [whole, *d_scales]


@_joined_gradients.register_fake
def _(
    dq: Tensor, dk: Any, dv: Any, raw: Any, q_scale: Tensor | None, k_scale: Tensor | None, tables: Any, norm: str, layout: str,
    sizes: list[int], width: int,
) -> list[Tensor]:  # fmt: skip
    return [dq.new_empty(*dq.shape[:2], width), *_like(q_scale, k_scale)]


def _save_joined(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    whole, ctx.sizes, q_scale, k_scale, tables, tails, ctx.norm, ctx.layout = inputs
    ctx.width, ctx.tails = whole.shape[-1], len(tails)
    ctx.save_for_backward(q_scale, k_scale, None if ctx.norm == "none" else whole, *tables)


def _backward_joined(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Any, ...]:
    q_scale, k_scale, whole, *tables = ctx.saved_tensors
    d_whole, *d_scales = _joined_gradients(dq, dk, dv, whole, q_scale, k_scale, tables, ctx.norm, ctx.layout, ctx.sizes, ctx.width)
    scales = [None if s is None else d_scales.pop(0) for s in (q_scale, k_scale)]
    return (d_whole, None, *scales, [None] * len(tables), [None] * ctx.tails, None, None)


_prepare_joined.register_autograd(_backward_joined, setup_context=_save_joined)
