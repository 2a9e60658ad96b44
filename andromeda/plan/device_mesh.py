"""How a run divides over GPUs: what each holds and sends. Computed from formulas, not measured.

dp copies the model, fsdp shards its state (ZeRO-3, arXiv 1910.02054), tp cuts the blocks' matrices and, with sequence
parallelism, everything that they save (arXiv 2205.05198).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_type_hints

from andromeda.config.run import RunConfig
from andromeda.utils.errors import ConfigError, nearest

WEIGHT_BYTES, GRADIENT_BYTES = 2, 4
"""Bytes of a weight as it is gathered (bfloat16), and of a gradient as it is reduced (float32)."""


@dataclass(frozen=True)
class DeviceMeshShape:
    """Numbers of GPUs along each axis."""

    dp: int = 1
    fsdp: int = 1
    tp: int = 1

    @property
    def gpus(self) -> int:
        """All of them."""
        return self.dp * self.fsdp * self.tp

    @property
    def readers(self) -> int:
        """Groups that read different rows."""
        return self.dp * self.fsdp


def parse_mesh(text: str) -> DeviceMeshShape:
    """`dp=8,fsdp=4,tp=2`, in any order, axes left out are 1. Raises ConfigError."""
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
    """Rows of one step that each group of GPUs reads, and rows of its micro-batch. Raises ConfigError when they do not divide."""
    train, a = config.train, config.model.attention
    if train.batch_size % mesh.readers:
        raise ConfigError(
            f"train.batch_size = {train.batch_size} rows do not divide over dp x fsdp = {mesh.readers} GPUs: make it a multiple."
        )
    if a.num_heads % mesh.tp:
        raise ConfigError(f"model.attention.num_heads = {a.num_heads} do not divide over tp = {mesh.tp} GPUs: give a divisor.")
    own = train.batch_size // mesh.readers
    return own, min(train.micro_batch_size or own, own)


@dataclass(frozen=True)
class CommunicationVolume:
    """Bytes that one GPU sends in one step, by reason (rings: an axis of n sends (n - 1) / n of what it shares)."""

    gathering: float
    """fsdp: weights, gathered for every forward and every backward pass."""
    gradients: float
    """fsdp: scattered once a step; dp: all-reduced once a step."""
    activations: float
    """tp: gathered and scattered around attention and feed-forward, forward and backward."""

    @property
    def total(self) -> float:
        """All of it."""
        return self.gathering + self.gradients + self.activations


def communication_volume(config: RunConfig, mesh: DeviceMeshShape, parameters: int, sequence: int) -> CommunicationVolume:
    """What one GPU sends in one step."""
    own, micro = local_batch_sizes(config, mesh)
    share = parameters / mesh.tp
    passes = 2 * -(-own // micro)
    gathering = _ring(mesh.fsdp) * share * WEIGHT_BYTES * passes
    scattered = _ring(mesh.fsdp) * share * GRADIENT_BYTES
    reduced = 2 * _ring(mesh.dp) * share / mesh.fsdp * GRADIENT_BYTES
    # Two branches a layer, each gathers its input and scatters its output, in both directions.
    collectives = 2 * 2 * 2 * config.model.num_layers
    activations = _ring(mesh.tp) * collectives * own * sequence * config.model.hidden_size * WEIGHT_BYTES
    return CommunicationVolume(gathering, scattered + reduced, activations)


def _ring(size: int) -> float:
    return (size - 1) / size
