"""Functions of whole matrices that are sharded over processes, or that every process has: each process computes its share of them.

Shapes: K matrices of one shape R x C, n processes, k = ceil(K / n) matrices of each process, m = ceil(R / n) rows of each shard.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from andromeda.utils.dtensor import as_sharded, is_dtensor, local, sharded_dims

MatrixFunction = Callable[[Tensor], Tensor]
"""(K, ..., R, C) -> the same shape, of each matrix by itself; in its own dtype it is sent, and cast afterwards."""


def num_workers(parameter: Tensor, group: Any) -> int:
    """How many processes share the work on a parameter. group: those that all have it whole, or None."""
    dims = sharded_dims(parameter)
    if dims:
        return int(parameter.device_mesh.size(dims[0])) if _by_rows(parameter, dims) else 1  # type: ignore[attr-defined]
    return 1 if group is None else dist.get_world_size(group)


def map_matrices(function: MatrixFunction, values: Sequence[Tensor], parameters: Sequence[Tensor], group: Any = None) -> Sequence[Tensor]:
    """`function` of K matrices, each process's part of them in and out, the latter in the dtype of the parameters.

    values: what this process holds of each matrix; parameters: tensors of their shape and sharding, alike for all. group: the processes
    that all hold the same plain values and share the work, or None. Every process must call with the same number of matrices.
    """
    first = parameters[0]
    dims = sharded_dims(first)
    if not dims:
        stacked = torch.stack(list(values))
        return (function(stacked) if group is None else _shared(function, stacked, group)).to(first.dtype).unbind()
    if _by_rows(first, dims):
        if first.ndim > 2:  # whole matrices lie on each process
            return function(torch.stack(list(values))).to(first.dtype).unbind() if values[0].numel() else values
        return _exchanged(function, values, first, dims[0])
    return [_gathered(function, value, parameter) for value, parameter in zip(values, parameters, strict=True)]


def _by_rows(parameter: Any, dims: tuple[int, ...]) -> bool:
    """Whether it is sharded over one dimension of its mesh, by its first dimension, as FSDP does."""
    placement = parameter.placements[dims[0]]
    return len(dims) == 1 and placement.is_shard(0) and type(placement).__name__ == "Shard"


def _shared(function: MatrixFunction, matrices: Tensor, group: Any) -> Tensor:
    """matrices (K, ...), the same on all: each computes k of them, and all get all."""
    size, rank, count = dist.get_world_size(group), dist.get_rank(group), len(matrices)
    each = -(-count // size)
    own = matrices[rank * each : (rank + 1) * each]
    if len(own) < each:  # zeros fill the last share
        own = torch.cat([own, matrices.new_zeros(each - len(own), *matrices.shape[1:])])
    part = function(own).contiguous()
    whole = part.new_empty(size * each, *part.shape[1:])
    dist.all_gather_into_tensor(whole, part, group=group)
    return whole[:count]


def _exchanged(function: MatrixFunction, shards: Sequence[Tensor], parameter: Any, dim: int) -> Sequence[Tensor]:
    """Shards of rows: each process gets k whole matrices, computes them, and sends their shards back."""
    mesh = parameter.device_mesh
    group, size = mesh.get_group(dim), mesh.size(dim)
    rows, columns = parameter.shape
    height, each = -(-rows // size), -(-len(shards) // size)
    sent = shards[0].new_zeros(size * each, height, columns)
    for number, shard in enumerate(shards):
        sent[number, : len(shard)] = shard
    got = torch.empty_like(sent)
    dist.all_to_all_single(got, sent, group=group)
    # (n, k, m, C) by sender: the shards of one matrix, below each other, are the matrix.
    whole = got.view(size, each, height, columns).transpose(0, 1).reshape(each, size * height, columns)
    done = function(whole[:, :rows])
    back = F.pad(done, (0, 0, 0, size * height - rows)).view(each, size, height, columns).transpose(0, 1).contiguous()
    result = torch.empty_like(back)
    dist.all_to_all_single(result, back, group=group)
    parts = result.view(size * each, height, columns).to(parameter.dtype)
    return [matrix[: len(shard)] for matrix, shard in zip(parts, shards, strict=False)]


def _gathered(function: MatrixFunction, value: Tensor, parameter: Any) -> Tensor:
    """Any other sharding: the whole matrix on every process."""
    from torch.distributed.tensor import DTensor

    assert is_dtensor(parameter)
    part = DTensor.from_local(value, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride())
    return local(as_sharded(function(part.full_tensor()[None])[0].to(parameter.dtype), parameter))
