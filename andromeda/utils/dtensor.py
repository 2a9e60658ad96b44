"""Tensors that may be sharded over processes (torch.distributed.tensor.DTensor), without importing torch's distributed package.

Of a plain tensor every function here gives the tensor itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def is_dtensor(tensor: Tensor) -> bool:
    """Whether the tensor is a DTensor."""
    return hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor; a view, which in-place operations change."""
    given: Any = tensor
    part: Tensor = given.to_local() if is_dtensor(tensor) else tensor
    return part


def full(tensor: Tensor) -> Tensor:
    """The whole tensor. Every process that holds a part must call."""
    given: Any = tensor
    whole: Tensor = given.full_tensor() if is_dtensor(tensor) else tensor
    return whole


def as_sharded(whole: Tensor, like: Tensor) -> Tensor:
    """`whole`, which every process has, sharded as `like` is; nothing is sent. One that is sharded already stays as it is."""
    if not is_dtensor(like) or is_dtensor(whole):
        return whole
    from torch.distributed.tensor import distribute_tensor

    given: Any = like
    return distribute_tensor(whole, given.device_mesh, given.placements, src_data_rank=None)


def sharded_dims(tensor: Tensor) -> tuple[int, ...]:
    """Dimensions of the tensor's mesh that it is sharded over."""
    placements = getattr(tensor, "placements", ())
    return tuple(dim for dim, placement in enumerate(placements) if not placement.is_replicate())


def total_norm(tensors: Iterable[Tensor]) -> Tensor:
    """l2 norm over all elements of all tensors, shape (); the same on every process. Every process must call with the same tensors."""
    groups: dict[Any, list[Tensor]] = {}
    for tensor in tensors:
        dims = sharded_dims(tensor)
        groups.setdefault((tensor.device_mesh, dims) if dims else None, []).append(local(tensor))  # type: ignore[attr-defined]
    norms = []
    for key, parts in groups.items():
        norm = torch.nn.utils.get_total_norm(parts)
        norms.append(norm if key is None else _norm_over(norm, *key))
    return norms[0] if len(norms) == 1 else torch.nn.utils.get_total_norm(norms)


def _norm_over(norm: Tensor, mesh: Any, dims: tuple[int, ...]) -> Tensor:
    """The norm of what all processes of some dimensions of a mesh hold, from the norm of this one's part."""
    squares = norm.square()
    for dim in dims:
        if mesh.size(dim) > 1:
            torch.distributed.all_reduce(squares, group=mesh.get_group(dim))
    return squares.sqrt()
