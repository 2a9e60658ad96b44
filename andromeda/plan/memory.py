"""Memory of training on one GPU of a mesh, of checkpoints, and of serving.

The training state (weights, gradients, optimizer state, moving average) is counted tensor by tensor. Weights and gradients are float32
in every precision; activation memory, which depends on the precision, is that of the dry run.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from andromeda.config.model import ModelConfig
from andromeda.config.run import RunConfig
from andromeda.config.train import CheckpointConfig, OptimizerConfig, TrainConfig
from andromeda.model.kv_cache.protocol import CacheBytes
from andromeda.model.meta_model import shared_meta_model
from andromeda.model.transformer import Transformer
from andromeda.optim import find_optimizer, optimizer_state_bytes, parameter_roles
from andromeda.optim.optimizer_kind import FLOAT_BYTES
from andromeda.optim.param_groups import Role
from andromeda.parallel.layout import Layout
from andromeda.plan.communication import WEIGHT_BYTES
from andromeda.plan.dry_run import StepMemory
from andromeda.plan.memory_tracker import MemoryTracker


@dataclass(frozen=True)
class TrainStateBytes:
    """Bytes of the training state by kind."""

    weights: int
    """Parameters and buffers."""
    gradients: int
    optimizer: int
    average: int
    """The moving average of the weights, if enabled."""

    @property
    def total(self) -> int:
        """All of it, when an update begins."""
        return self.weights + self.gradients + self.optimizer + self.average


def state_bytes(model: nn.Module, train: TrainConfig) -> TrainStateBytes:
    """The state of training a model (which may be on the meta device)."""
    trained = [p for p in model.parameters() if p.requires_grad]
    weights = _bytes(model.parameters()) + _bytes(model.buffers())
    average = sum(p.numel() * FLOAT_BYTES for p in trained) if train.ema else 0
    return TrainStateBytes(weights, _bytes(trained), optimizer_state_bytes(model, train.optim), average)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


HALF = 2
"""Bytes of a number in bfloat16."""


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes of training on one GPU."""

    state: TrainStateBytes
    """Its shard of the training state."""
    passing: StepMemory
    """Activation memory of its micro-batch, divided by tensor parallelism."""
    gathered: int
    """FSDP: gathered weights of tables and head, and of two blocks, the current and the next, or of all."""
    updating: int
    """Temporaries of the optimizer."""
    peak: int
    """Peak of a step."""


@dataclass(frozen=True)
class CheckpointSize:
    """Disk and host memory of checkpoints."""

    disk: int
    """Bytes of one checkpoint: weights, optimizer state, moving average."""
    disk_peak: int
    """While the next one is written in addition to those that are kept."""
    host: int
    """Host memory while saving from a GPU."""


def training_memory(
    config: RunConfig, layout: Layout, model: Transformer, passing: StepMemory, state: TrainStateBytes, updating: int, frees: bool = True
) -> TrainingMemory:
    """Divide the memory of one device over a layout, and compute the peak.

    updating: temporaries of the optimizer, in bytes. frees: whether FSDP frees the gathered weights of a block after its forward pass.
    """
    shards = layout.shard * layout.context
    parts = shards * layout.tensor
    own = TrainStateBytes(*(value // parts for value in (state.weights, state.gradients, state.optimizer, state.average)))
    moving = _divided(passing, layout)
    blocks = [sum(p.numel() for p in block.parameters()) for block in model.decoder.blocks]
    # The current block and the next, or all; tables and head for the whole step.
    tables = sum(p.numel() for p in model.parameters()) - sum(blocks)
    gathered = (tables + (2 * blocks[0] if frees else sum(blocks))) * WEIGHT_BYTES // layout.tensor if shards > 1 else 0
    updating //= parts
    accumulated = (config.train.micro_batch_size or config.train.batch_size) < config.train.batch_size // layout.data
    # FSDP that keeps the gathered weights scatters gradients after the last micro-batch; until then each process holds all of them.
    unsharded = state.gradients // layout.tensor if accumulated and shards > 1 and not frees else 0
    kept = own.weights + own.optimizer + own.average + moving.casts + unsharded
    peak = kept + max(moving.peak(own.gradients, accumulated) + gathered, own.gradients + updating)
    return TrainingMemory(own, moving, gathered, updating, peak)


def _divided(passing: StepMemory, layout: Layout) -> StepMemory:
    """Divided by tensor and context parallelism. With FSDP, weights are gathered in the compute dtype and freed again: no copies stay."""
    lean = passing
    if layout.shard * layout.context > 1:
        forward, saved = passing.forward - passing.forward_copies, passing.saved - passing.saved_copies
        lean = replace(passing, forward=forward, saved=saved, forward_copies=0, saved_copies=0, casts=0)
    return StepMemory(**{name: value // (layout.tensor * layout.context) for name, value in asdict(lean).items()})


def update_bytes(model: nn.Module, optim: OptimizerConfig, gpu: bool) -> int:
    """Temporary memory of an update: none where the optimizer works in place, else measured on fake tensors."""
    kind, options = find_optimizer(optim)
    if kind.updates_in_place:
        return 0
    roles = parameter_roles(model)
    with FakeTensorMode():
        groups: dict[Role, list[nn.Parameter]] = {}
        for name, p in model.named_parameters():
            if p.requires_grad and kind.handles(p, roles[name]):
                fake = nn.Parameter(torch.empty(p.shape, device="cuda" if gpu else "cpu"))
                fake.grad = torch.empty_like(fake)
                groups.setdefault(roles[name], []).append(fake)
        if not groups:
            return 0
        param_groups = [{"params": fakes, "role": role, "lr": 0.0, "weight_decay": 0.0} for role, fakes in groups.items()]
        optimizer = kind.build(param_groups, options, "off")
        kind.before_step(optimizer, options, 0)
        tracker = MemoryTracker()
        with tracker:
            # The first step allocates the state, which is counted elsewhere.
            optimizer.step()
            tracker.restart()
            optimizer.step()
        return tracker.peak - tracker.held


def checkpoint_size(state: TrainStateBytes, settings: CheckpointConfig) -> CheckpointSize:
    """Weights, optimizer state and moving average are saved; gradients are not."""
    disk = state.weights + state.optimizer + state.average
    # In the background a copy of the whole state is written, otherwise one part after the other.
    host = disk if settings.background else max(state.weights, state.optimizer, state.average)
    return CheckpointSize(disk, (settings.keep + 1) * disk, host)


def cache_bytes(model: ModelConfig, tokens: int = 1) -> int:
    """Growth of the decode state of one sequence over `tokens` tokens, in bfloat16: keys and values of attention layers."""
    return decode_state(model).per_token * tokens


def decode_state(model: ModelConfig, *, mixers_only: bool = False) -> CacheBytes:
    """Decode state of one sequence in bfloat16, summed over the parts of the model.

    mixers_only: of the token mixers alone, without the last vectors of token shifts.
    """
    built = shared_meta_model(model)
    roots: list[Any] = [block.attention for block in built.decoder.blocks] if mixers_only else [built]
    parts: list[Any] = [module for root in roots for module in root.modules() if hasattr(module, "cache_bytes")]
    said = [part.cache_bytes(torch.bfloat16) for part in parts]
    return CacheBytes(sum(part.per_token for part in said), sum(part.per_sequence for part in said))
