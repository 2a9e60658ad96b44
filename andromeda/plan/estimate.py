"""How many parameters a model has, by part: counted on the model itself, built without memory on the meta device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from andromeda.config.run import RunConfig
from andromeda.model.flops import forward_flops_per_token, hardware_flops_per_token, training_flops_per_token
from andromeda.model.meta_model import meta_model
from andromeda.model.transformer import Transformer
from andromeda.plan.device_mesh import CommunicationVolume, DeviceMeshShape, communication_volume, local_batch_sizes
from andromeda.plan.dry_run import step_memory
from andromeda.plan.memory import CheckpointSize, TrainingMemory, cache_bytes, checkpoint_size, state_bytes, training_memory
from andromeda.plan.roofline import ServingRoofline, seconds_per_step, serving_roofline
from andromeda.train.compile import should_compile
from andromeda.train.precision import build_precision
from andromeda.utils.hardware import Hardware


@dataclass(frozen=True)
class ParameterCount:
    """Counts; a shared tensor (a tied head) counts once."""

    parts: dict[str, int]
    active: int
    """Those that take part in computing one token: of a table its one row, of the routed experts the chosen ones."""

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self.parts.values())


PARTS = (
    ("value embedding", "value_embedding."),
    ("attention", ".attention."),
    ("feed-forward", ".feedforward."),
    ("head", "head."),
    ("embedding", "embedding."),
)
"""A parameter belongs to the first part whose mark is in its name; what is left are norms and the weights of mixes."""
OTHER = "norms and mixes"


def count_parameters(model: Transformer) -> ParameterCount:
    """Parameters of a model, wherever it lies."""
    parts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        part = part_of(name)
        parts[part] = parts.get(part, 0) + parameter.numel()
    idle = _idle_rows(model) + _idle_experts(model)
    return ParameterCount(parts, sum(parts.values()) - idle)


def part_of(name: str) -> str:
    """The part that a parameter's name places it in."""
    dotted = f".{name}"
    return next((part for part, mark in PARTS if mark in dotted), OTHER)


def _idle_rows(model: Transformer) -> int:
    """Numbers in rows that a token does not read. A table that is also the head is read whole."""
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding) and m.weight is not model.head.weight]
    return sum((table.weight.shape[0] - 1) * table.weight.shape[1] for table in tables)


def _idle_experts(model: Transformer) -> int:
    """Numbers of experts that a token is not sent to."""
    e = model.config.experts
    routed = sum(p.numel() for name, p in model.named_parameters() if ".experts." in f".{name}")
    return routed // e.num_experts * (e.num_experts - e.top_k)


DEFAULT_MFU = 0.4
"""Share of the vendor's peak that a run is taken to reach, unless told otherwise."""


@dataclass(frozen=True)
class HardwareSetup:
    """Where a run would be."""

    hardware: Hardware
    gpu: bool
    mesh: DeviceMeshShape
    price: float = 0.0
    """Dollars of one GPU for one hour."""
    mfu: float = DEFAULT_MFU


@dataclass(frozen=True)
class FlopsPerToken:
    """Per token."""

    forward: dict[str, float]
    """By part, attention counted by its mask."""
    training: float
    """Model FLOPs, mask counted."""
    training_full: float
    """The same with attention counted in full, the convention of PaLM and Megatron."""
    hardware: float
    """With everything that is computed twice."""


@dataclass(frozen=True)
class RunCost:
    """A whole run."""

    tokens: int
    steps: int
    floor_hours: float | None
    """At the rate of arithmetic alone."""
    hours: float | None
    """At the assumed MFU."""
    cost: float | None
    """Dollars at the assumed MFU."""


@dataclass(frozen=True)
class RunPlan:
    """What a run needs; bytes, seconds, FLOPs, dollars."""

    name: str
    precision: str
    compiled: bool
    sequence: int
    rows: int
    """Of one step."""
    micro_rows: int
    """Of one forward pass on one GPU."""
    checkpointing: str
    optimizer: str
    parameters: ParameterCount
    flops: FlopsPerToken
    memory: TrainingMemory
    checkpoint: CheckpointSize
    cache_per_token: int
    cache_full: int
    """Of one sequence at the model's context."""
    context: int
    step_floor: float | None
    serving: ServingRoofline | None
    traffic: CommunicationVolume
    budget: RunCost


def plan(name: str, config: RunConfig, place: HardwareSetup, tokens: int = 0) -> RunPlan:
    """Everything about one run. tokens: of the whole run (0: as configured). Raises ConfigError."""
    train, mesh = config.train, place.mesh
    sequence = train.seq_len or config.model.max_seq_len
    _, micro = local_batch_sizes(config, mesh)
    precision = _precision(train.precision, place.gpu)
    compiled = train.compile != "off" if place.gpu else should_compile(config, torch.device("cpu"))
    model = meta_model(config.model)
    parameters, state = count_parameters(model), state_bytes(model, train)
    held = step_memory(config, micro, sequence, precision, gpu=place.gpu, compiled=compiled)
    floor = seconds_per_step(config, sequence, place.hardware, precision, mesh.gpus)
    return RunPlan(
        name=name,
        precision=precision,
        compiled=compiled,
        sequence=sequence,
        rows=train.batch_size,
        micro_rows=micro,
        checkpointing=train.activation_checkpointing,
        optimizer=train.optim.kind,
        parameters=parameters,
        flops=_flops(config, sequence),
        memory=training_memory(config, mesh, model, held, state, place.gpu),
        checkpoint=checkpoint_size(state, train.checkpoints.keep),
        cache_per_token=cache_bytes(config.model),
        cache_full=cache_bytes(config.model, config.model.max_seq_len),
        context=config.model.max_seq_len,
        step_floor=floor,
        serving=serving_roofline(config.model, parameters.active, place.hardware, precision),
        traffic=communication_volume(config, mesh, parameters.total, sequence),
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
        seconds = steps * per_step * training_flops_per_token(config.model, sequence) / (peak * place.mfu * place.mesh.gpus)
    return RunCost(
        tokens=steps * per_step,
        steps=steps,
        floor_hours=None if floor is None else steps * floor / 3600,
        hours=None if seconds is None else seconds / 3600,
        cost=None if seconds is None or not place.price else seconds / 3600 * place.price * place.mesh.gpus,
    )
