"""How the processes of a run share its work: the sizes of the device mesh."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt

from andromeda.config.base import BaseConfig

REST = -1
"""Stands for the size that uses all processes."""
SIZES = ("replicate", "shard", "context", "tensor", "expert")
"""Keys that are sizes of the mesh."""


class ParallelConfig(BaseConfig):
    """Sizes of the device mesh, whose product is the number of processes; -1, for one of them, is what the others leave.

    `replicate` and `shard` divide the sequences of a step. None of these keys affects what is learned.
    """

    replicate: int = Field(1, ge=REST)
    """Copies of the weights, whose gradients are averaged: data parallelism. With `shard` it is hybrid sharding (HSDP)."""
    shard: int = Field(REST, ge=REST)
    """Processes that weights, gradients and optimizer state are sharded over (FSDP2, arXiv 2304.11277); -1 is what is left."""
    context: int = Field(1, ge=REST)
    """Processes that each sequence is split over: context parallelism."""
    tensor: int = Field(1, ge=REST)
    """Processes that the matrices of each layer are split over: tensor parallelism (arXiv 1909.08053)."""
    expert: int = Field(1, ge=REST)
    """Processes, among those of `shard`, that the experts of a mixture of experts are spread over."""
    reshard_after_forward: Literal["auto", "always", "never"] = "auto"
    """Free the gathered weights of a block after its forward pass and gather them again for the backward pass. `auto` does so
    unless the gathered weights of all blocks take less than a quarter of the device's memory."""
    prefetch: int = Field(1, ge=0, le=16)
    """Blocks whose weights are gathered ahead of the one that is computed."""
    timeout: PositiveInt = 600
    """Seconds without a finished step of any process, or in one collective, after which the run ends and names who is missing."""
