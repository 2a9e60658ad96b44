"""Data, sharded and tensor parallelism: batch and communication per GPU. Computed from formulas, not measured.

dp replicates the model, fsdp shards its state (ZeRO-3, arXiv 1910.02054), tp shards the blocks' matrices and, with sequence
parallelism, all of their activations (arXiv 2205.05198).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_type_hints

from andromeda.config.run import RunConfig
from andromeda.utils.errors import ConfigError, nearest

WEIGHT_BYTES, GRADIENT_BYTES = 2, 4
"""Bytes of a gathered weight (bfloat16) and of a reduced gradient (float32)."""


@dataclass(frozen=True)
class DeviceMeshShape:
    """Number of GPUs along each axis."""

    dp: int = 1
    fsdp: int = 1
    tp: int = 1

    @property
    def gpus(self) -> int:
        """All of them."""
        return self.dp * self.fsdp * self.tp

    @property
    def data_ranks(self) -> int:
        """Ranks that read different data."""
        return self.dp * self.fsdp


def parse_mesh(text: str) -> DeviceMeshShape:
    """Parse `dp=8,fsdp=4,tp=2`, in any order; missing axes are 1. Raises ConfigError."""
    sizes: dict[str, int] = {}
    for part in filter(None, text.replace(" ", "").split(",")):
        axis, _, size = part.partition("=")
        if axis not in get_type_hints(DeviceMeshShape):
            raise ConfigError(f"--parallel has no axis {axis!r}{nearest(axis, get_type_hints(DeviceMeshShape))}: write dp=8,fsdp=4,tp=2.")
        if not size.isdecimal() or int(size) < 1:
            raise ConfigError(f"--parallel {part} is not a number of GPUs: write dp=8,fsdp=4,tp=2.")
        sizes[axis] = int(size)
    return DeviceMeshShape(**sizes)


def local_batch_sizes(config: RunConfig, mesh: DeviceMeshShape) -> tuple[int, int]:
    """Batch and micro-batch size per data rank. Raises ConfigError if they do not divide evenly."""
    train, a = config.train, config.model.attention
    if train.batch_size % mesh.data_ranks:
        raise ConfigError(
            f"train.batch_size = {train.batch_size} does not divide over dp x fsdp = {mesh.data_ranks} GPUs: make it a multiple."
        )
    if a.num_heads % mesh.tp:
        raise ConfigError(f"model.attention.num_heads = {a.num_heads} does not divide over tp = {mesh.tp} GPUs: give a divisor.")
    own = train.batch_size // mesh.data_ranks
    return own, min(train.micro_batch_size or own, own)


@dataclass(frozen=True)
class CommunicationVolume:
    """Bytes that one GPU sends per step (ring collectives: an axis of n sends (n - 1) / n of the data)."""

    gathering: float
    """fsdp: weights are all-gathered for every forward and every backward pass."""
    gradients: float
    """fsdp: reduce-scattered once per step; dp: all-reduced once per step."""
    activations: float
    """tp: all-gathered and reduce-scattered around attention and feed-forward, forward and backward."""

    @property
    def total(self) -> float:
        """All of it."""
        return self.gathering + self.gradients + self.activations


def communication_volume(config: RunConfig, mesh: DeviceMeshShape, parameters: int, sequence: int) -> CommunicationVolume:
    """Bytes that one GPU sends per step."""
    own, micro = local_batch_sizes(config, mesh)
    share = parameters / mesh.tp
    passes = 2 * -(-own // micro)
    gathering = _ring(mesh.fsdp) * share * WEIGHT_BYTES * passes
    scattered = _ring(mesh.fsdp) * share * GRADIENT_BYTES
    reduced = 2 * _ring(mesh.dp) * share / mesh.fsdp * GRADIENT_BYTES
    # Two branches per layer, each gathers its input and scatters its output, forward and backward.
    collectives = 2 * 2 * 2 * config.model.num_layers
    activations = _ring(mesh.tp) * collectives * own * sequence * config.model.hidden_size * WEIGHT_BYTES
    return CommunicationVolume(gathering, scattered + reduced, activations)


def _ring(size: int) -> float:
    return (size - 1) / size
