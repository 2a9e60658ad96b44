"""All figures of one configuration together."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from andromeda.config.run import RunConfig
from andromeda.model.flops import forward_flops_per_token, hardware_flops_per_token, training_flops_per_token
from andromeda.model.meta_model import meta_model
from andromeda.plan.dry_run import passing
from andromeda.plan.memory import Checkpoint, Training, cache_bytes, checkpoint, training
from andromeda.plan.mesh import Mesh, Traffic, rows_per_reader, traffic
from andromeda.plan.parameters import Parameters, count
from andromeda.plan.roofline import Serving, seconds_per_step, serving
from andromeda.plan.train_state import state_bytes
from andromeda.train.compile import wants_compile
from andromeda.train.precision import build_precision
from andromeda.utils.hardware import Hardware

DEFAULT_MFU = 0.4
"""Share of the vendor's peak that a run is taken to reach, unless told otherwise."""


@dataclass(frozen=True)
class Place:
    """Where a run would be."""

    hardware: Hardware
    gpu: bool
    mesh: Mesh
    price: float = 0.0
    """Dollars of one GPU for one hour."""
    mfu: float = DEFAULT_MFU


@dataclass(frozen=True)
class Flops:
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
class Budget:
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
class Plan:
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
    parameters: Parameters
    flops: Flops
    memory: Training
    checkpoint: Checkpoint
    cache_per_token: int
    cache_full: int
    """Of one sequence at the model's context."""
    context: int
    step_floor: float | None
    serving: Serving | None
    traffic: Traffic
    budget: Budget


def plan(name: str, config: RunConfig, place: Place, tokens: int = 0) -> Plan:
    """Everything about one run. tokens: of the whole run (0: as configured). Raises ConfigError."""
    train, mesh = config.train, place.mesh
    sequence = train.seq_len or config.model.max_seq_len
    _, micro = rows_per_reader(config, mesh)
    precision = _precision(train.precision, place.gpu)
    compiled = train.compile != "off" if place.gpu else wants_compile(config, torch.device("cpu"))
    model = meta_model(config.model)
    parameters, state = count(model), state_bytes(model, train)
    held = passing(config, micro, sequence, precision, gpu=place.gpu, compiled=compiled)
    floor = seconds_per_step(config, sequence, place.hardware, precision, mesh.gpus)
    return Plan(
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
        memory=training(config, mesh, model, held, state, place.gpu),
        checkpoint=checkpoint(state, train.checkpoints.keep),
        cache_per_token=cache_bytes(config.model),
        cache_full=cache_bytes(config.model, config.model.max_seq_len),
        context=config.model.max_seq_len,
        step_floor=floor,
        serving=serving(config.model, parameters.active, place.hardware, precision),
        traffic=traffic(config, mesh, parameters.total, sequence),
        budget=_budget(config, sequence, place, precision, floor, tokens),
    )


def _precision(wanted: str, gpu: bool) -> str:
    if gpu:
        return "bf16" if wanted == "auto" else wanted
    return build_precision(wanted, torch.device("cpu")).name


def _flops(config: RunConfig, sequence: int) -> Flops:
    return Flops(
        forward_flops_per_token(config.model, sequence),
        training_flops_per_token(config.model, sequence),
        training_flops_per_token(config.model, sequence, convention="full"),
        hardware_flops_per_token(config.model, sequence, config.train.activation_checkpointing),
    )


def _budget(config: RunConfig, sequence: int, place: Place, precision: str, floor: float | None, tokens: int) -> Budget:
    per_step = config.train.batch_size * sequence
    steps = -(-tokens // per_step) if tokens else config.train.steps
    peak = place.hardware.peak.get(precision)
    seconds = None
    if peak:
        seconds = steps * per_step * training_flops_per_token(config.model, sequence) / (peak * place.mfu * place.mesh.gpus)
    return Budget(
        tokens=steps * per_step,
        steps=steps,
        floor_hours=None if floor is None else steps * floor / 3600,
        hours=None if seconds is None else seconds / 3600,
        cost=None if seconds is None or not place.price else seconds / 3600 * place.price * place.mesh.gpus,
    )
