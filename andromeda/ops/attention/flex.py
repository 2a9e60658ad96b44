"""FlexAttention: FlashAttention-2 in Triton for every spec, skipping the blocks that are not visible.

On a CPU it computes T x S matrices, forward only, which serves to test the masks that are used on GPUs.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from andromeda.ops.attention.block_mask import block_mask
from andromeda.ops.attention.requirements import requires_queries_last
from andromeda.ops.attention.spec import AttentionSpec
from andromeda.ops.attention.tensor_cache import TensorCache

name = "flex"

_block_mask_cache: TensorCache[BlockMask] = TensorCache(16)


def unsupported_reason(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Any spec whose queries are the last keys; on CPUs without gradients, on GPUs without float64 and without narrow heads."""
    if reason := requires_queries_last(spec):
        return reason
    if q.device.type == "cpu":
        if torch.compiler.is_compiling():
            return "it cannot compile every spec for a CPU"
        return "it has no backward pass on a CPU" if any(x.requires_grad for x in (q, k, v)) else None
    if q.device.type != "cuda":
        return f"it has no kernels for {q.device.type}"
    if q.dtype == torch.float64:
        return "it has no kernels in float64"
    if min(q.shape[-1], v.shape[-1]) < 16:
        return "it needs a head dim of at least 16"
    return None


def attend(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
    """Same contract as `eager.attend`."""
    T, S = q.shape[1], k.shape[1]
    mask = _block_mask_cache.get(spec.documents or (), (spec.window, T, S, q.device), lambda: block_mask(spec, T, S, q.device))
    call: Any = flex_attention if torch.compiler.is_compiling() else _compiled_flex_attention(_compile_key(spec, q, S))
    out = call(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        score_mod=_score_mod(spec, q, S),
        block_mask=mask,
        scale=spec.scale,
        enable_gqa=q.shape[2] != k.shape[2],
        # Its decoding kernel is selected for up to 127 queries, but has no configuration for more query rows than a block.
        kernel_options=None if T == 1 else {"BACKEND": "TRITON"},
    )
    return out.transpose(1, 2)


def _compile_key(spec: AttentionSpec, q: Tensor, S: int) -> tuple[Hashable, ...]:
    """Key of the compiled function: calls with the same key share one."""
    B, T = q.shape[:2]
    masked = bool(spec.window), spec.documents is not None, spec.slopes is not None, spec.softcap
    return *masked, q.device.type, q.dtype, torch.is_grad_enabled(), B == 1, T == 1, T == S


@cache
def _compiled_flex_attention(kind: tuple[Hashable, ...]) -> Callable[..., Any]:
    """FlexAttention compiled for one key. Lengths are constants at first, and dynamic once they change."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return flex_attention(*args, **kwargs)

    # Dynamo caches by code object and gives up after eight recompilations, so that each key gets a code object of its own.
    call.__code__ = call.__code__.replace(co_name=f"flex_attention{kind}")
    return torch.compile(call, fullgraph=True, backend="eager" if "cpu" in kind else "inductor")


def _score_mod(spec: AttentionSpec, q: Tensor, S: int) -> Callable[..., Tensor] | None:
    """The score_mod of soft cap and ALiBi, or None."""
    T, cap = q.shape[1], spec.softcap
    slopes = None if spec.slopes is None else spec.slopes.to(q.device, torch.promote_types(q.dtype, torch.float32))
    if slopes is None and not cap:
        return None
    offset = None if T == S else torch.full((), S - T, dtype=torch.int32, device=q.device)

    def score(logit: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if cap:
            logit = cap * torch.tanh(logit / cap)
        if slopes is not None:
            logit = logit - slopes[h] * ((i if offset is None else i + offset) - j)
        return logit

    return score
