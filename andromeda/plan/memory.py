"""The memory of training on one GPU of a mesh, at its worst moments, and of serving."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from andromeda.config.model import ModelConfig
from andromeda.config.run import RunConfig
from andromeda.config.train import OptimizerConfig
from andromeda.model.transformer import Transformer
from andromeda.optim import Muon, roles
from andromeda.plan.dry_run import Passing
from andromeda.plan.memory_tracker import Ledger
from andromeda.plan.mesh import PRODUCTS, Mesh
from andromeda.plan.train_state import State

HALF = 2
"""Bytes of a number in bfloat16."""


@dataclass(frozen=True)
class Training:
    """Bytes on one GPU."""

    state: State
    """Its share."""
    passing: Passing
    """Of its micro-batch, tensor parallelism divided out."""
    gathered: int
    """fsdp: two blocks' weights, the one in use and the next."""
    updating: int
    """What the optimizer takes for a moment."""
    peak: int
    """The worst moment of a step."""


@dataclass(frozen=True)
class Checkpoint:
    """What saving costs."""

    disk: int
    """Bytes of one checkpoint: weights, optimizer state, average."""
    disk_peak: int
    """While the next one is written beside those that are kept."""
    host: int
    """Memory on the host while saving from a GPU: the largest part, copied there whole."""


def training(config: RunConfig, mesh: Mesh, model: Transformer, passing: Passing, state: State, gpu: bool) -> Training:
    """Divide what one device would hold over a mesh, and find the peak."""
    sharded = mesh.fsdp * mesh.tp
    own = State(*(value // sharded for value in (state.weights, state.gradients, state.optimizer, state.average)))
    moving = _divided(passing, mesh)
    block = sum(p.numel() for p in model.decoder.blocks[0].parameters())
    gathered = 2 * block * PRODUCTS // mesh.tp if mesh.fsdp > 1 else 0
    updating = update_bytes(model, config.train.optim, gpu) // sharded
    accumulated = (config.train.micro_batch_size or config.train.batch_size) < config.train.batch_size // mesh.readers
    kept = own.weights + own.optimizer + own.average + moving.casts
    peak = kept + max(moving.peak(own.gradients, accumulated) + gathered, own.gradients + updating)
    return Training(own, moving, gathered, updating, peak)


def _divided(passing: Passing, mesh: Mesh) -> Passing:
    """Cut by tensor parallelism; with fsdp, weights are gathered in the type of products and given up again: no copies stay."""
    lean = passing
    if mesh.fsdp > 1:
        forward, saved = passing.forward - passing.forward_copies, passing.saved - passing.saved_copies
        lean = replace(passing, forward=forward, saved=saved, forward_copies=0, saved_copies=0, casts=0)
    return Passing(**{name: value // mesh.tp for name, value in asdict(lean).items()})


def update_bytes(model: nn.Module, optim: OptimizerConfig, gpu: bool) -> int:
    """What an update takes for a moment. AdamW's kernels work in place (its 8-bit one too, once compiled); Muon's products do not."""
    if optim.kind != "muon":
        return 0
    named = roles(model)
    with FakeTensorMode():
        matrices = [nn.Parameter(torch.empty(p.shape)) for name, p in model.named_parameters() if named[name] == "matrix"]
        for matrix in matrices:
            matrix.grad = torch.empty_like(matrix)
        muon = Muon(matrices, steps=optim.newton_schulz_steps, dtype=torch.bfloat16 if gpu else None)
        ledger = Ledger()
        with ledger:
            # The first step makes the momentum, which is state.
            muon.step()
            ledger.restart()
            muon.step()
        return ledger.peak - ledger.held


def checkpoint(state: State, keep: int) -> Checkpoint:
    """Weights, optimizer state and average go to disk; gradients do not."""
    disk = state.weights + state.optimizer + state.average
    return Checkpoint(disk, (keep + 1) * disk, max(state.weights, state.optimizer, state.average))


def cache_bytes(model: ModelConfig, tokens: int = 1) -> int:
    """Keys and values of `tokens` tokens of one sequence in bfloat16. Windows do not shorten them: the cache keeps all."""
    a = model.attention
    return 2 * model.num_layers * a.num_kv_heads * a.head_dim * HALF * tokens
