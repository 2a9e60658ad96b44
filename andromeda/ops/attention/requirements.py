"""Reasons why a backend does not support a call, shared by several backends. Each reason is a clause that follows the backend's name."""

from __future__ import annotations

import torch
from torch import Tensor

from andromeda.ops.attention.spec import AttentionSpec
from andromeda.ops.compute_dtype import HALF_DTYPES

NO_ALIBI_SLOPES = "it has no ALiBi slopes (alibi.fold_into_qk = true needs none)"


def requires_queries_last(spec: AttentionSpec) -> str | None:
    """Reason against a query that is not at the last key."""
    return None if spec.query_index is None else "its queries must be the last of the keys"


def requires_causal_only(spec: AttentionSpec) -> str | None:
    """Reason against everything but causal attention."""
    if spec.query_index is not None:
        return requires_queries_last(spec)
    if spec.window:
        return "it has no window"
    if spec.documents is not None:
        return "it has no document mask"
    if spec.slopes is not None:
        return NO_ALIBI_SLOPES
    return "it has no soft cap" if spec.softcap else None


def requires_half_on_cuda(q: Tensor, capability: int) -> str | None:
    """Reason against everything but 16 bits on GPUs of at least this major compute capability."""
    if q.device.type != "cuda":
        return "it runs on CUDA GPUs only"
    if q.dtype not in HALF_DTYPES:
        return f"it has no kernels in {str(q.dtype).removeprefix('torch.')}"
    if torch.cuda.get_device_capability(q.device)[0] < capability:
        return f"it needs a GPU of compute capability {capability}.0 or newer"
    return None


def requires_head_dim_multiple_of_8(q: Tensor, v: Tensor, widest: int) -> str | None:
    """Reason against head dims that are not multiples of eight, or larger than `widest`."""
    fit = all(x.shape[-1] % 8 == 0 and x.shape[-1] <= widest for x in (q, v))
    return None if fit else f"it needs a head dim of 8, 16, ... or {widest}"


def requires_equal_head_dims(q: Tensor, v: Tensor) -> str | None:
    """Reason against values with another head dim than keys."""
    return None if q.shape[-1] == v.shape[-1] else "it needs values with the head dim of keys"


def needs_grad(*tensors: Tensor) -> bool:
    """Whether autograd needs the gradient of any of them."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
