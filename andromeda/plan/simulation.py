"""One training step of many processes, simulated by one: the real model, mesh and training step, on tensors that have shapes and no
storage, and on process groups that exchange nothing.

So what is sent and held is counted from the code that runs on real processes, not from a formula. Bytes grow linearly with the number of
layers, so two shallow models give those of a deep one.
"""

from __future__ import annotations

import functools
import gc
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.distributed.device_mesh import DeviceMesh

from andromeda.config.model import ModelConfig
from andromeda.config.run import RunConfig
from andromeda.model.flops import training_flops_per_token
from andromeda.model.transformer import Transformer
from andromeda.ops.cross_entropy import IGNORE_INDEX
from andromeda.parallel.layout import Layout
from andromeda.parallel.mesh import ParallelMesh, build_mesh
from andromeda.parallel.ring import COLLECTIVES
from andromeda.parallel.traffic import TrafficCounter
from andromeda.plan.communication import in_layout, reshards
from andromeda.plan.dry_run import CPU, as_fused, depths, fake_tensors
from andromeda.plan.memory_tracker import MemoryTracker
from andromeda.train import memory_check
from andromeda.train.memory_check import count_parameters
from andromeda.train.objective import MicroBatch, NextTokenObjective
from andromeda.train.state import build_train_state
from andromeda.train.step import StepBatch, TrainStep
from andromeda.utils.dtensor import local
from andromeda.utils.errors import ConfigError

if TYPE_CHECKING:
    from andromeda.plan.estimate import HardwareSetup


@dataclass(frozen=True)
class SimulatedStep:
    """What one process sends and holds in one step."""

    sent: dict[str, int]
    """Bytes by collective."""
    within_host: int
    """Those of groups within a host of `HOST_SIZE` devices."""
    state: int
    """Bytes of weights, optimizer state and averages between steps."""
    peak: int
    """Most bytes within the step."""

    @property
    def total_sent(self) -> int:
        """Bytes of all collectives."""
        return sum(self.sent.values())


NETWORK = 50e9
"""Bytes per second that one GPU sends to other hosts: 400 Gbit/s."""


@dataclass(frozen=True)
class StepPrediction:
    """A simulated step with the seconds that it would take."""

    layout: Layout
    step: SimulatedStep
    computing: float
    """Seconds at the assumed MFU."""
    exchanging: float
    """Seconds of all bytes over the links."""
    tokens: int
    """Of a step, over all devices."""

    @property
    def fastest(self) -> float:
        """Seconds if the exchange takes no time of its own."""
        return max(self.computing, self.exchanging)

    @property
    def slowest(self) -> float:
        """Seconds if devices exchange and compute in turn."""
        return self.computing + self.exchanging


def predict_step(config: RunConfig, place: HardwareSetup, precision: str) -> StepPrediction:
    """A simulated step, and its time from the device's and the links' stated speeds. Raises ConfigError for what cannot be laid out."""
    layout, hardware = place.layout, place.hardware
    if layout.expert > 1:
        raise ConfigError("--simulate has no values, on which the exchange of tokens by experts depends: leave it out, or expert=1.")
    config = in_layout(config, layout)
    step = simulate_step(config, layout, precision, hardware.memory, gpu=place.gpu)
    sequence = config.train.seq_len or config.model.max_seq_len
    tokens = config.train.batch_size * sequence
    peak = hardware.peak.get(precision) or hardware.peak["bf16"]
    computing = tokens * training_flops_per_token(config.model, sequence) / (peak * place.mfu * layout.world_size)
    link = hardware.link / 2 or NETWORK
    exchanging = step.within_host / link + (step.total_sent - step.within_host) / NETWORK
    return StepPrediction(layout, step, computing, exchanging, tokens)


def simulate_step(config: RunConfig, layout: Layout, precision: str, memory: float, *, gpu: bool) -> SimulatedStep:
    """A step of the first of `layout.world_size` processes. memory: of one device, which decides whether gathered weights are kept."""
    shallow, deep = _steady_depths(config.model)
    run = functools.partial(_simulate, _prepared(config, layout, precision, memory), layout, gpu=gpu)
    if config.model.num_layers <= deep:
        return run(config.model.num_layers)
    a, b = run(shallow), run(deep)

    def grown(first: int, second: int) -> int:
        return second + (second - first) * (config.model.num_layers - deep) // (deep - shallow)

    sent = {kind: grown(a.sent[kind], b.sent[kind]) for kind in b.sent}
    return SimulatedStep(sent, grown(a.within_host, b.within_host), grown(a.state, b.state), grown(a.peak, b.peak))


LEAST_LAYERS = 4
"""From so many on, one more adds no more gathered weights: the current block, the next, and one whose gradients are scattered."""


def _steady_depths(model: ModelConfig) -> tuple[int, int]:
    """Two depths between which memory grows as it does further on."""
    shallow, deep = depths(model)
    cycle = deep - shallow
    more = -(-max(0, LEAST_LAYERS - shallow) // cycle) * cycle
    return shallow + more, deep + more


def _prepared(config: RunConfig, layout: Layout, precision: str, memory: float) -> RunConfig:
    """The configuration with everything decided that would need values or a real device."""
    guard = config.train.spike_guard.model_copy(update={"enabled": False})
    train = config.train.model_copy(update={"spike_guard": guard, "precision": precision, "compile": "off", "device": "cpu"})
    itemsize = 4 if precision == "fp32" else 2
    frees = reshards(config, layout, count_parameters(config.model), itemsize, memory)
    choice = {"reshard_after_forward": "always" if frees else "never"}
    return config.model_copy(update={"train": train, "parallel": config.parallel.model_copy(update=choice)})


def _simulate(config: RunConfig, layout: Layout, depth: int, *, gpu: bool) -> SimulatedStep:
    model = config.model.model_copy(update={"num_layers": depth})
    config = config.model_copy(update={"model": as_fused(model) if gpu else model})
    rows = config.train.batch_size // layout.data
    sequence = config.train.seq_len or model.max_seq_len
    with _fake_processes(layout) as mesh, fake_tensors(rows * sequence * model.experts.top_k, gpu):
        state = build_train_state(config, CPU, "", mesh)
        step = TrainStep(state, NextTokenObjective(state.model, config.train.z_loss, state.collectives), config.train)
        ids = torch.zeros(rows, sequence, dtype=torch.long)
        batch = StepBatch(MicroBatch(ids, ids.clone().fill_(IGNORE_INDEX), None), rows * sequence, (0, rows))
        counter, tracker = TrafficCounter(), MemoryTracker()
        with tracker, _noticing_resizes(tracker):
            held = [local(tensor) for tensor in (*state.model.parameters(), *state.model.buffers())]
            tracker.enter(held)
            step(batch)  # allocates the optimizer's state
            gc.collect()
            before = tracker.held
            tracker.restart()
            with counter:
                step(batch)
        sent = {kind: counter.bytes[kind] for kind in COLLECTIVES if counter.bytes[kind]}
        return SimulatedStep(sent, counter.within_host, before, tracker.peak)


@contextmanager
def _noticing_resizes(tracker: MemoryTracker) -> Iterator[None]:
    """Tell the tracker of storages that are resized, which is no operation on tensors."""
    resize = torch.UntypedStorage.resize_

    def noticed(storage: torch.UntypedStorage, size: int) -> Any:
        resized = resize(storage, size)
        tracker.resized(storage)
        return resized

    with mock.patch.object(torch.UntypedStorage, "resize_", noticed):
        yield


@contextmanager
def _fake_processes(layout: Layout) -> Iterator[ParallelMesh]:
    """The mesh of a layout, as its first process sees it, over process groups that exchange nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    new_group = dist.new_group

    def fake_group(*arguments: Any, **keywords: Any) -> Any:
        return new_group(*arguments, **keywords | {"backend": "fake"})

    def concatenate(meshes: list[DeviceMesh]) -> DeviceMesh:
        with unset_fake_temporarily():  # a mesh is made of real numbers of processes
            return real_concatenate(meshes)

    with ExitStack() as stack:
        real_concatenate = DeviceMesh._concatenate
        stack.enter_context(mock.patch.object(DeviceMesh, "_concatenate", concatenate))
        stack.enter_context(mock.patch.object(dist, "new_group", fake_group))
        stack.enter_context(mock.patch.object(memory_check, "device_memory", return_value=sys.maxsize))
        # Fake weights cannot be moved, and are where they belong.
        stack.enter_context(mock.patch.object(Transformer, "to", lambda model, device: model))
        dist.init_process_group("fake", rank=0, world_size=layout.world_size, store=FakeStore())
        stack.callback(dist.destroy_process_group)
        yield build_mesh(layout, CPU)
