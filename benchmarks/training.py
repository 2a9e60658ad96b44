"""What a training step costs on one CPU core: precisions, micro-batches, compilation, recomputation, memory that is kept.

`python benchmarks/training.py [rounds]` writes benchmarks/results/training.json.
CPU time of one thread, the least of interleaved rounds, so that other work on the machine changes little.
"""

from __future__ import annotations

import copy
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from andromeda.bench.record import record, save
from andromeda.config.load import from_values
from andromeda.train import checkpoint, state
from andromeda.train.objective import MicroBatch, NextTokenObjective
from andromeda.train.state import TrainState, build_train_state
from andromeda.train.step import StepBatch, TrainStep

RESULT = Path(__file__).parent / "results" / "training.json"
MODEL: dict[str, Any] = {
    "vocab_size": 4096,
    "max_seq_len": 256,
    "hidden_size": 256,
    "num_layers": 6,
    "attention": {"num_heads": 4, "num_kv_heads": 4, "head_dim": 64},
    "rotary": {"kind": "rope"},
    "feedforward": {"kind": "swiglu"},
}
BATCH, LENGTH = 8, 256
CASES: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16 (autocast)": {"precision": "bf16"},
    "fp16 (autocast, scaled loss)": {"precision": "fp16"},
    "fp32, compiled blocks": {"compile": "on"},
    "fp32, micro-batches of 4": {"micro_batch": 4},
    "fp32, micro-batches of 2": {"micro_batch": 2},
    "fp32, micro-batches of 1": {"micro_batch": 1},
    "fp32, selective checkpointing": {"checkpointing": "selective"},
    "fp32, full checkpointing": {"checkpointing": "full"},
    "fp32, without guard": {"guard": {"enabled": False}},
}


def main(rounds: int) -> None:
    """Measure and write."""
    torch.set_num_threads(1)
    steps = {name: stepper(*build(settings)) for name, settings in CASES.items()}
    steps["bf16 (copies of the weights, cast once a step)"] = copies()
    least = measure(steps, rounds)
    figures = {
        "tokens_per_step": BATCH * LENGTH,
        "milliseconds": {name: round(1e3 * seconds, 1) for name, seconds in least.items()},
        "page_faults_per_step": {name: faults(name) for name in ("memory given back", "memory kept")},
        "checkpoint_seconds": round(saving(build({})[0]), 2),
    }
    save(RESULT, record("python benchmarks/training.py", figures))
    print(json.dumps(figures, indent=1))


def build(settings: dict[str, Any]) -> tuple[TrainState, Any]:
    """A session with these settings of `train`."""
    train = {"batch": BATCH, "device": "cpu", "precision": "fp32", "compile": "off", **settings}
    config = from_values({"model": MODEL, "train": train})
    return build_train_state(config, torch.device("cpu"), "benchmark"), config


def stepper(live: TrainState, config: Any) -> Callable[[], object]:
    """One step of `andromeda train`."""
    step = TrainStep(live, NextTokenObjective(live.model), config.train)
    return lambda: step(StepBatch(rows(), BATCH * LENGTH, (0, BATCH)))


def rows() -> MicroBatch:
    """Random tokens."""
    ids = torch.randint(0, MODEL["vocab_size"], (BATCH, LENGTH + 1))
    return MicroBatch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), None)


def copies() -> Callable[[], object]:
    """A step whose matmuls read bfloat16 weights that were cast once, instead of casting them at every use."""
    live, _ = build({})
    twin = copy.deepcopy(live.model)
    for p in twin.parameters():
        p.data = p.data.bfloat16()
    own, cast = list(live.model.parameters()), list(twin.parameters())
    loss = NextTokenObjective(twin)

    def step() -> None:
        for p, q in zip(own, cast, strict=True):
            q.data.copy_(p.data)
            q.grad = None
        (loss(rows()).total / (BATCH * LENGTH)).backward()
        for p, q in zip(own, cast, strict=True):
            p.grad = None if q.grad is None else q.grad.float()
        nn.utils.clip_grad_norm_(own, 1.0)
        live.optimizer.step()

    return step


def measure(steps: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Least seconds of CPU time of each, after two rounds of warm-up."""
    least = dict.fromkeys(steps, float("inf"))
    for number in range(rounds + 2):
        for name, step in steps.items():
            start = time.process_time()
            step()
            if number > 1:
                least[name] = min(least[name], time.process_time() - start)
    return least


def faults(name: str) -> int:
    """Page faults of a step in a process of its own, in which freed memory is kept or not."""
    done = subprocess.run([sys.executable, __file__, name], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def count_faults(name: str) -> None:
    """What such a process does."""
    torch.set_num_threads(1)
    if name == "memory given back":
        state.retain_freed_memory = lambda: None
    assert name in ("memory given back", "memory kept")
    step = stepper(*build({}))
    for _ in range(3):
        step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        step()
    print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 4)


def saving(live: TrainState) -> float:
    """Seconds to write, read back, compare and name a checkpoint with AdamW's state."""
    stepper(live, live.config)()
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        checkpoint.save(Path(folder), live.snapshot(0))
        return time.perf_counter() - start


if __name__ == "__main__":
    argument = sys.argv[1] if len(sys.argv) > 1 else "8"
    main(int(argument)) if argument.isdigit() else count_faults(argument)
