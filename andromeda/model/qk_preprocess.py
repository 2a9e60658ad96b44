"""What happens to queries and keys between their projection and attention: norm, rotation, folded bias.

The parts do it one after the other; where a kernel knows all of them, it does the same at once.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from andromeda.model.position.alibi import NoPositionBias
from andromeda.model.position.rotary import Rotation, Table, no_rotation, rotate_half, rotate_interleaved
from andromeda.model.qk_norm import L2DimScaleQKNorm, L2HeadScaleQKNorm, L2QKNorm, NoQKNorm, RMSQKNorm
from andromeda.ops import qk_preprocess

NORMS: dict[type[NoQKNorm], qk_preprocess.Norm] = {
    NoQKNorm: "none",
    RMSQKNorm: "rms",
    L2QKNorm: "l2",
    L2HeadScaleQKNorm: "l2",
    L2DimScaleQKNorm: "l2",
}
LAYOUTS: dict[Callable[[Tensor, Table], Tensor], qk_preprocess.Layout] = {
    no_rotation: "none",
    rotate_half: "half",
    rotate_interleaved: "interleaved",
}
"""What the kernel knows; any other part is computed by itself."""


def apply(q: Tensor, k: Tensor, norm: NoQKNorm, rotation: Rotation, bias: NoPositionBias, scale: float) -> tuple[Tensor, Tensor]:
    """q (B, T, H, D) and k (B, T, G, D) as projected -> normalized, turned, and with `bias` folded in for the softmax scale `scale`."""
    form = fused_spec(q, k, norm, rotation, bias, scale)
    return reference(q, k, norm, rotation, bias, scale) if form is None else qk_preprocess.preprocess_qk(q, k, form)


def apply_fused_qkv(
    whole: Tensor, sizes: qk_preprocess.QKVLayout, norm: NoQKNorm, rotation: Rotation, bias: NoPositionBias, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The same for the queries and keys of a joined projection (B, T, N), and its values (B, T, G, Dv)."""
    q, k, v, _ = sizes.views(whole)
    form = fused_spec(q, k, norm, rotation, bias, scale)
    if form is None or sizes.v_head_dim % 2:
        return *apply(q, k, norm, rotation, bias, scale), v.contiguous()
    return qk_preprocess.preprocess_qkv(whole, sizes, form)


def fused_spec(
    q: Tensor, k: Tensor, norm: NoQKNorm, rotation: Rotation, bias: NoPositionBias, scale: float
) -> qk_preprocess.QKPreprocessSpec | None:
    """What the kernel is to do, None where it cannot."""
    if not (type(norm) in NORMS and type(rotation) is Rotation and rotation.rotate in LAYOUTS):
        return None
    layout = LAYOUTS[rotation.rotate]
    tables = () if layout == "none" else (*rotation.query, *rotation.key)
    form = qk_preprocess.QKPreprocessSpec(NORMS[type(norm)], layout, tables, *norm.scales, bias.tails(scale, q.dtype))
    return form if qk_preprocess.is_supported(q, k, form) else None


def reference(q: Tensor, k: Tensor, norm: NoQKNorm, rotation: Rotation, bias: NoPositionBias, scale: float) -> tuple[Tensor, Tensor]:
    """The same by the parts alone, on any device and in any dtype: the reference."""
    q, k = rotation(*norm(q, k))
    return bias.fold(q, k, scale)
