"""The plan of a run: parameters by part (counted on a model on the meta device), FLOPs, memory, time and cost."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from andromeda.config.run import RunConfig
from andromeda.model.flops import forward_flops_per_token, hardware_flops_per_token, training_flops_per_token
from andromeda.model.meta_model import shared_meta_model
from andromeda.model.transformer import Transformer
from andromeda.parallel.layout import Layout
from andromeda.plan.communication import in_layout, local_batch_sizes, reshards, traffic
from andromeda.plan.dry_run import step_memory
from andromeda.plan.memory import (
    HALF,
    CheckpointSize,
    TrainingMemory,
    checkpoint_size,
    decode_state,
    state_bytes,
    training_memory,
    update_bytes,
)
from andromeda.plan.memory_estimate import estimate_step_memory, estimate_update_bytes
from andromeda.plan.roofline import ServingRoofline, seconds_per_step, serving_roofline
from andromeda.train.compile import should_compile
from andromeda.train.precision import build_precision
from andromeda.utils.hardware import Hardware


@dataclass(frozen=True)
class ParameterCount:
    """Parameters by part; a shared tensor (a tied head) counts once."""

    parts: dict[str, int]
    active: int
    """Those used for one token: one row of an embedding table, and the selected experts."""

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self.parts.values())


PARTS = (
    ("value embedding", "value_embedding."),
    ("attention", ".attention."),
    ("feed-forward", ".feedforward."),
    ("head", ".head."),
    ("task heads", ".task_heads."),
    ("embedding", "embedding."),
)
"""A parameter belongs to the first part whose pattern is in its name; the rest are norms and mixing weights."""
OTHER = "norms and mixes"


def count_parameters(model: Transformer) -> ParameterCount:
    """Parameters of a model on any device."""
    parts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        part = part_of(name)
        parts[part] = parts.get(part, 0) + parameter.numel()
    return ParameterCount(parts, sum(parts.values()) - _idle(model))


def part_of(name: str) -> str:
    """The part that a parameter belongs to, by its name."""
    dotted = f".{name}"
    return next((part for part, mark in PARTS if mark in dotted), OTHER)


def _idle(model: Transformer) -> int:
    """Parameters not used for one token, as reported by the parts: rows of embedding tables, experts.

    A tied table is read whole by the head; of a user-defined table all rows but one are idle.
    """
    idle = 0
    for module in model.modules():
        if getattr(module, "weight", None) is model.head.weight:
            continue
        if hasattr(module, "idle_parameters"):
            idle += module.idle_parameters()  # type: ignore[operator]
        elif isinstance(module, nn.Embedding):
            idle += (module.num_embeddings - 1) * module.embedding_dim
    return idle


DEFAULT_MFU = 0.4
"""Assumed fraction of the vendor's peak FLOP/s."""


@dataclass(frozen=True)
class HardwareSetup:
    """Devices that a run would use."""

    hardware: Hardware
    gpu: bool
    layout: Layout
    price: float = 0.0
    """Dollars per GPU-hour."""
    mfu: float = DEFAULT_MFU


@dataclass(frozen=True)
class FlopsPerToken:
    """Per token."""

    forward: dict[str, float]
    """By part; attention by its mask."""
    training: float
    """Model FLOPs, attention by its mask."""
    training_full: float
    """The same with full attention, the convention of PaLM and Megatron."""
    hardware: float
    """Including recomputation."""


@dataclass(frozen=True)
class RunCost:
    """Time and cost of a whole run."""

    tokens: int
    steps: int
    floor_hours: float | None
    """Compute bound."""
    hours: float | None
    """At the assumed MFU."""
    cost: float | None
    """Dollars at the assumed MFU."""


@dataclass(frozen=True)
class RunPlan:
    """What a run needs, in bytes, seconds, FLOPs and dollars."""

    name: str
    precision: str
    compiled: bool
    layout: Layout
    sequence: int
    rows: int
    """Batch size."""
    micro_rows: int
    """Micro-batch size on one GPU."""
    checkpointing: str
    optimizer: str
    parameters: ParameterCount
    flops: FlopsPerToken
    memory: TrainingMemory
    checkpoint: CheckpointSize
    cache_per_token: int
    cache_full: int
    """Of one sequence of max_seq_len tokens."""
    context: int
    step_floor: float | None
    serving: ServingRoofline | None
    sent: dict[str, float]
    """Bytes that one GPU sends in a step, by collective."""
    budget: RunCost
    memory_is_estimate: bool = False
    """Whether `memory` is that of `estimate_step_memory` instead of the dry run's."""


def plan(name: str, config: RunConfig, place: HardwareSetup, tokens: int = 0, quick: bool = False) -> RunPlan:
    """The plan of one run.

    tokens: of the whole run (0: as configured). quick: activation memory is estimated in closed form instead of by a dry run, which
    takes seconds; such a plan has `memory_is_estimate`. Raises ConfigError.
    """
    layout = place.layout
    config = in_layout(config, layout)
    train = config.train
    sequence = train.seq_len or config.model.max_seq_len
    _, micro = local_batch_sizes(config, layout)
    precision = _precision(train.precision, place.gpu)
    compiled = train.compile != "off" if place.gpu else should_compile(config, torch.device("cpu"))
    model = shared_meta_model(config.model)
    parameters, state = count_parameters(model), state_bytes(model, train)
    if quick:
        held = estimate_step_memory(config, model, micro, sequence, precision, gpu=place.gpu, compiled=compiled)
        updating = estimate_update_bytes(model, train.optim)
    else:
        held = step_memory(config, micro, sequence, precision, gpu=place.gpu, compiled=compiled)
        updating = update_bytes(model, train.optim, place.gpu)
    cached = decode_state(config.model)
    itemsize = 4 if precision == "fp32" else HALF
    frees = reshards(config, layout, parameters.total, itemsize, place.hardware.memory)
    floor = seconds_per_step(config, sequence, place.hardware, precision, layout.world_size)
    return RunPlan(
        name=name,
        precision=precision,
        compiled=compiled,
        layout=layout,
        sequence=sequence,
        rows=train.batch_size,
        micro_rows=micro,
        checkpointing=train.activation_checkpointing,
        optimizer=train.optim.kind,
        parameters=parameters,
        flops=_flops(config, sequence),
        memory=training_memory(config, layout, model, held, state, updating, frees),
        checkpoint=checkpoint_size(state, train.checkpoints),
        cache_per_token=cached.per_token,
        cache_full=cached.per_token * config.model.max_seq_len + cached.per_sequence,
        context=config.model.max_seq_len,
        step_floor=floor,
        serving=serving_roofline(config.model, parameters.active, place.hardware, precision),
        sent=traffic(config, layout, model, itemsize, place.hardware.memory),
        memory_is_estimate=quick,
        budget=_budget(config, sequence, place, precision, floor, tokens),
    )


def _precision(wanted: str, gpu: bool) -> str:
    if gpu:
        return "bf16" if wanted == "auto" else wanted
    return build_precision(wanted, torch.device("cpu")).name


def _flops(config: RunConfig, sequence: int) -> FlopsPerToken:
    return FlopsPerToken(
        forward_flops_per_token(config.model, sequence),
        training_flops_per_token(config.model, sequence),
        training_flops_per_token(config.model, sequence, convention="full"),
        hardware_flops_per_token(config.model, sequence, config.train.activation_checkpointing),
    )


def _budget(config: RunConfig, sequence: int, place: HardwareSetup, precision: str, floor: float | None, tokens: int) -> RunCost:
    per_step = config.train.batch_size * sequence
    steps = -(-tokens // per_step) if tokens else config.train.steps
    peak = place.hardware.peak.get(precision)
    seconds = None
    if peak:
        seconds = steps * per_step * training_flops_per_token(config.model, sequence) / (peak * place.mfu * place.layout.world_size)
    return RunCost(
        tokens=steps * per_step,
        steps=steps,
        floor_hours=None if floor is None else steps * floor / 3600,
        hours=None if seconds is None else seconds / 3600,
        cost=None if seconds is None or not place.price else seconds / 3600 * place.price * place.layout.world_size,
    )
