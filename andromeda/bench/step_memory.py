"""Peak memory and speed of a training step on this device, compared with the prediction of `andromeda plan`.

A step has two micro-batches of random tokens if the configuration accumulates gradients, else one; a sequence is one document. On a
GPU the peak is that of the caching allocator; on a CPU it is from the profiler's record of every allocation.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from andromeda.config.load import load
from andromeda.config.run import RunConfig
from andromeda.parallel.layout import ONE
from andromeda.plan import HardwareSetup, plan
from andromeda.train.objective import MicroBatch, NextTokenObjective
from andromeda.train.state import build_train_state, resolve_device
from andromeda.train.step import StepBatch, TrainStep
from andromeda.utils.hardware import Hardware, peak_flops, recognize, this_cpu

ROUNDS = 5


def measure(source: str, changes: list[str]) -> dict[str, Any]:
    """Plan and measure one configuration on its device."""
    config = load(source, changes)
    micro = config.train.micro_batch_size or config.train.batch_size
    config = load(source, [*changes, f"train.batch_size={min(config.train.batch_size, 2 * micro)}", f"train.micro_batch_size={micro}"])
    device = resolve_device(config.train.device)
    planned = plan(source, config, HardwareSetup(_hardware(device), device.type == "cuda", ONE))
    real = _run(config, device)
    peak = peak_flops(str(device), planned.precision)
    rate = real["tokens_per_second"]
    return {
        "configuration": [source, *changes],
        "precision": planned.precision,
        "compiled": planned.compiled,
        "planned": {
            "between_steps": planned.memory.state.total - planned.memory.state.gradients,
            "saved": planned.memory.passing.saved,
            "peak": planned.memory.peak,
        },
        "measured": real,
        "ratio": planned.memory.peak / real["peak"],
        "mfu": rate * planned.flops.training / peak if peak else None,
        "hfu": rate * planned.flops.hardware / peak if peak else None,
    }


def _hardware(device: torch.device) -> Hardware:
    known = recognize(torch.cuda.get_device_name(device)) if device.type == "cuda" else this_cpu()
    return known or Hardware(torch.cuda.get_device_name(device), 0.0, 1.0, {}, "unknown")


def _run(config: RunConfig, device: torch.device) -> dict[str, float]:
    """A few training steps: bytes between steps, peak bytes, tokens/s."""
    session = build_train_state(config, device, "bench")
    stepper = TrainStep(session, NextTokenObjective(session.model), config.train)
    shape = (config.train.batch_size, config.train.seq_len or config.model.max_seq_len)
    ids = torch.randint(0, config.model.vocab_size, shape, device=device)
    case = StepBatch(MicroBatch(ids, ids, None), ids.numel(), (0, len(ids)))

    def step() -> None:
        stepper(case)

    step()
    step()
    if device.type == "cuda":
        state, peak = _cuda_peak(step)
    else:
        held = [*session.optimizer.state_tensors().values(), *session.model.state_dict().values()]
        held += session.ema.state_tensors().values() if session.ema else []
        state, peak = _cpu_peak(step, held)
    start = time.perf_counter()
    for _ in range(ROUNDS):
        step()
    _wait(device)
    return {"between_steps": state, "peak": peak, "tokens_per_second": ROUNDS * ids.numel() / (time.perf_counter() - start)}


def _cuda_peak(step: Callable[[], None]) -> tuple[int, int]:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    state = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return state, torch.cuda.max_memory_allocated()


def _cpu_peak(step: Callable[[], None], held: list[Tensor]) -> tuple[int, int]:
    state = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}.values())
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    now = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return state, state + peak


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
