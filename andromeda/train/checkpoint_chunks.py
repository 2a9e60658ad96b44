"""Blocks of tensors: what one rank holds of a tensor that is sharded over a device mesh, and where the block lies in the whole.

A tensor that is no DTensor is held whole by every rank.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Chunk:
    """A block of a tensor: its first index and its size along each dimension."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Elements in it."""
        return torch.Size(self.shape).numel()

    def slices(self, inside: Chunk | None = None) -> tuple[slice, ...]:
        """The index of this block in the whole tensor, or in a block `inside` that holds it."""
        starts = inside.offset if inside else (0,) * len(self.offset)
        return tuple(slice(a - start, a - start + size) for a, size, start in zip(self.offset, self.shape, starts, strict=True))

    def intersect(self, other: Chunk) -> Chunk | None:
        """What two blocks of one tensor have in common, or None."""
        starts = tuple(map(max, self.offset, other.offset))
        ends = map(min, map(sum, zip(self.offset, self.shape, strict=True)), map(sum, zip(other.offset, other.shape, strict=True)))
        shape = tuple(end - start for start, end in zip(starts, ends, strict=True))
        return Chunk(starts, shape) if all(size > 0 for size in shape) else None


def whole(shape: tuple[int, ...]) -> Chunk:
    """The block that is all of a tensor."""
    return Chunk((0,) * len(shape), tuple(shape))


@dataclass(frozen=True)
class LocalChunk:
    """A rank's block of a tensor, with its values."""

    values: Tensor
    """On the CPU once it is a copy; of the block's shape."""
    chunk: Chunk
    shape: tuple[int, ...]
    """Of the whole tensor."""


def local_chunk(tensor: Tensor) -> LocalChunk:
    """What this rank holds of a tensor; live, not copied. Raises ValueError for a DTensor with partial sums."""
    if not is_sharded(tensor):
        return LocalChunk(tensor.detach(), whole(tuple(tensor.shape)), tuple(tensor.shape))
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    sharded: Any = tensor
    if any(placement.is_partial() for placement in sharded.placements):
        raise ValueError("a tensor of partial sums has no value that a checkpoint could hold")
    shape, offset = compute_local_shape_and_global_offset(sharded.shape, sharded.device_mesh, sharded.placements)
    return LocalChunk(sharded.to_local().detach(), Chunk(tuple(offset), tuple(shape)), tuple(sharded.shape))


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor. Without importing the package, which takes a second, where nobody else has."""
    package = sys.modules.get("torch.distributed.tensor")
    return package is not None and isinstance(tensor, package.DTensor)


def sharded_like(like: Tensor, values: Tensor) -> Tensor:
    """A DTensor with the mesh and placements of `like` whose block on this rank is `values`."""
    from torch.distributed.tensor import DTensor

    other: Any = like
    stride = torch.empty(other.shape, device="meta").stride()
    values = values.to(other.to_local().device)
    placed: Tensor = DTensor.from_local(values, other.device_mesh, other.placements, run_check=False, shape=other.shape, stride=stride)
    return placed


LocalTensors = Mapping[str, Mapping[str, LocalChunk]]
"""A rank's blocks of the tensors of each part, by name."""


def local_chunks(tensors: Mapping[str, Mapping[str, Tensor]], *, copy: bool) -> LocalTensors:
    """What this rank holds of every tensor. copy: on the CPU, unchanged by what happens to the live ones afterwards."""

    def kept(tensor: Tensor) -> LocalChunk:
        held = local_chunk(tensor)
        if not copy:
            return held
        values = held.values.to("cpu", copy=True, memory_format=torch.contiguous_format)
        return LocalChunk(values, held.chunk, held.shape)

    return {part: {name: kept(tensor) for name, tensor in held.items()} for part, held in tensors.items()}
