"""Bytes that training keeps between steps: weights, gradients, optimizer state and average, tensor by tensor.

Weights and gradients are float32 in every precision; what varies with it is computed in passing (see activations).
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
from andromeda.config.train import OptimizerConfig, TrainConfig
from andromeda.model.kv_cache.protocol import CacheBytes
from andromeda.model.meta_model import meta_model
from andromeda.model.transformer import Transformer
from andromeda.optim import find_optimizer, optimizer_state_bytes, parameter_roles
from andromeda.optim.optimizer_kind import FLOAT_BYTES
from andromeda.optim.param_groups import Role
from andromeda.plan.device_mesh import WEIGHT_BYTES, DeviceMeshShape
from andromeda.plan.dry_run import StepMemory
from andromeda.plan.memory_tracker import MemoryTracker


@dataclass(frozen=True)
class TrainStateBytes:
    """Bytes by kind."""

    weights: int
    """Parameters and buffers."""
    gradients: int
    optimizer: int
    average: int
    """The moving average of the weights, if there is one."""

    @property
    def total(self) -> int:
        """All of it, as it is when an update begins."""
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
    """Bytes on one GPU."""

    state: TrainStateBytes
    """Its share."""
    passing: StepMemory
    """Of its micro-batch, tensor parallelism divided out."""
    gathered: int
    """fsdp: two blocks' weights, the one in use and the next."""
    updating: int
    """What the optimizer takes for a moment."""
    peak: int
    """The worst moment of a step."""


@dataclass(frozen=True)
class CheckpointSize:
    """What saving costs."""

    disk: int
    """Bytes of one checkpoint: weights, optimizer state, average."""
    disk_peak: int
    """While the next one is written beside those that are kept."""
    host: int
    """Memory on the host while saving from a GPU: the largest part, copied there whole."""


def training_memory(
    config: RunConfig, mesh: DeviceMeshShape, model: Transformer, passing: StepMemory, state: TrainStateBytes, gpu: bool
) -> TrainingMemory:
    """Divide what one device would hold over a mesh, and find the peak."""
    sharded = mesh.fsdp * mesh.tp
    own = TrainStateBytes(*(value // sharded for value in (state.weights, state.gradients, state.optimizer, state.average)))
    moving = _divided(passing, mesh)
    block = sum(p.numel() for p in model.decoder.blocks[0].parameters())
    gathered = 2 * block * WEIGHT_BYTES // mesh.tp if mesh.fsdp > 1 else 0
    updating = update_bytes(model, config.train.optim, gpu) // sharded
    accumulated = (config.train.micro_batch_size or config.train.batch_size) < config.train.batch_size // mesh.readers
    kept = own.weights + own.optimizer + own.average + moving.casts
    peak = kept + max(moving.peak(own.gradients, accumulated) + gathered, own.gradients + updating)
    return TrainingMemory(own, moving, gathered, updating, peak)


def _divided(passing: StepMemory, mesh: DeviceMeshShape) -> StepMemory:
    """Cut by tensor parallelism; with fsdp, weights are gathered in the type of products and given up again: no copies stay."""
    lean = passing
    if mesh.fsdp > 1:
        forward, saved = passing.forward - passing.forward_copies, passing.saved - passing.saved_copies
        lean = replace(passing, forward=forward, saved=saved, forward_copies=0, saved_copies=0, casts=0)
    return StepMemory(**{name: value // mesh.tp for name, value in asdict(lean).items()})


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


def checkpoint_size(state: TrainStateBytes, keep: int) -> CheckpointSize:
    """Weights, optimizer state and average go to disk; gradients do not."""
    disk = state.weights + state.optimizer + state.average
    return CheckpointSize(disk, (keep + 1) * disk, max(state.weights, state.optimizer, state.average))


def cache_bytes(model: ModelConfig, tokens: int = 1) -> int:
    """What the decode state of one sequence grows by over `tokens` tokens, in bfloat16: keys and values of attention layers."""
    return decode_state(model).per_token * tokens


def decode_state(model: ModelConfig, *, mixers_only: bool = False) -> CacheBytes:
    """Decode state of one sequence in bfloat16, summed over what the parts of the model say.

    mixers_only: of the token mixers alone, without the last vectors of token shifts.
    """
    built = meta_model(model)
    roots: list[Any] = [block.attention for block in built.decoder.blocks] if mixers_only else [built]
    parts: list[Any] = [module for root in roots for module in root.modules() if hasattr(module, "cache_bytes")]
    said = [part.cache_bytes(torch.bfloat16) for part in parts]
    return CacheBytes(sum(part.per_token for part in said), sum(part.per_sequence for part in said))
