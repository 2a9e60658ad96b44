"""Queries and keys between their projection and attention: norm, rotation, folded ALiBi; as one kernel where one matches.

The kernel is matched to the specs of norm and rotary once (`match`); whether it takes given tensors is decided at each call,
which otherwise computes the parts one after the other (`reference`).

Shapes: B batch, T time, H query heads, G key/value heads, D head dimensions that are projected, Dv of values, N of q, k and v.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

from torch import Tensor

from andromeda.model.position.alibi import PositionBias
from andromeda.model.position.rotary import Rotation
from andromeda.model.qk_norm import QKNorm
from andromeda.model.specs import QKNormSpec, RotarySpec, spec_of
from andromeda.ops import qk_preprocess as kernel


class QKKernel(NamedTuple):
    """What the kernel is asked for."""

    norm: kernel.Norm
    layout: kernel.Layout


@cache
def match(norm: QKNormSpec | None, rotary: RotarySpec | None) -> QKKernel | None:
    """The kernel for these parts; None where one of them has no spec: they are then computed by their own forward passes."""
    return None if norm is None or rotary is None else QKKernel(norm.kind, rotary.layout)


def apply(q: Tensor, k: Tensor, norm: Any, rotation: Rotation, bias: PositionBias, scale: float) -> tuple[Tensor, Tensor]:
    """Match and compute at once: q (B, T, H, D) and k (B, T, G, D) as projected -> normalized, rotated, with `bias` folded in."""
    return preprocess(q, k, match(spec_of(norm), rotation.fused_spec()), norm, rotation, bias, scale)


def preprocess(
    q: Tensor, k: Tensor, matched: QKKernel | None, norm: QKNorm, rotation: Rotation, bias: PositionBias, scale: float
) -> tuple[Tensor, Tensor]:
    """q (B, T, H, D) and k (B, T, G, D) as projected -> normalized, rotated, and with `bias` folded in for the softmax scale `scale`."""
    form = None if matched is None else fused_spec(q, k, matched, norm, rotation, bias, scale)
    return reference(q, k, norm, rotation, bias, scale) if form is None else kernel.preprocess_qk(q, k, form)


def preprocess_qkv(
    qkv: Tensor,
    sizes: kernel.QKVLayout,
    matched: QKKernel | None,
    norm: QKNorm,
    rotation: Rotation,
    bias: PositionBias,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same for the queries and keys of a fused projection (B, T, N), and its values (B, T, G, Dv)."""
    q, k, v, _ = sizes.views(qkv)
    form = None if matched is None else fused_spec(q, k, matched, norm, rotation, bias, scale)
    if form is None:
        return *reference(q, k, norm, rotation, bias, scale), v.contiguous()
    if sizes.v_head_dim % 2:
        return *kernel.preprocess_qk(q, k, form), v.contiguous()
    return kernel.preprocess_qkv(qkv, sizes, form)


def fused_spec(
    q: Tensor, k: Tensor, matched: QKKernel, norm: Any, rotation: Rotation, bias: PositionBias, scale: float
) -> kernel.QKPreprocessSpec | None:
    """What the kernel computes in this pass; None where it does not take these tensors."""
    tables = () if matched.layout == "none" else (*rotation.query, *rotation.key)
    q_scale, k_scale = norm.scales
    form = kernel.QKPreprocessSpec(matched.norm, matched.layout, tables, q_scale, k_scale, bias.tails(scale, q.dtype))
    return form if kernel.is_supported(q, k, form) else None


def reference(q: Tensor, k: Tensor, norm: QKNorm, rotation: Rotation, bias: PositionBias, scale: float) -> tuple[Tensor, Tensor]:
    """The parts, one after the other, on any device and in any dtype."""
    q, k = rotation(*norm(q, k))
    return bias.fold(q, k, scale)
