"""Effect of fp8 training on the loss: the same model on the same tokens in the same order, in bfloat16 and in fp8.

The text is the Python standard library, one token per byte, so that no data has to be downloaded. A curve is the loss of every
step in nats/byte; times are medians of the second half of the steps, and that of the first step, which includes compilation.
"""

from __future__ import annotations

import statistics
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from andromeda.config.load import load
from andromeda.config.run import RunConfig
from andromeda.optim import build_schedule
from andromeda.train.objective import MicroBatch, NextTokenObjective
from andromeda.train.state import build_train_state, resolve_device
from andromeda.train.step import StepBatch, TrainStep
from andromeda.utils.errors import AndromedaError

BYTES = 256
TAIL = 50
"""Final steps whose mean loss is compared."""


def measure(source: str, changes: list[str], steps: int, rows: int, precisions: tuple[str, ...] = ("bf16", "fp8")) -> dict[str, Any]:
    """Loss curves of one configuration in each precision, with a vocabulary of bytes."""
    implementations = {}
    for precision in precisions:
        run = [f"train.precision={precision}", f"train.batch_size={rows}", f"train.micro_batch_size={rows}", f"train.steps={steps}"]
        torch._dynamo.reset()
        try:
            config = load(source, [*changes, f"model.vocab_size={BYTES}", *run])
            implementations[precision] = _curve(config)
        except AndromedaError as error:
            implementations[precision] = {"failed": str(error)}
    return {"configuration": [source, *changes], "rows": rows, "implementations": implementations}


def text(limit: int) -> Tensor:
    """The first `limit` bytes of the standard library's sources (N,), files sorted by path."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py"))
    held = bytearray()
    for file in files:
        if len(held) >= limit:
            break
        held += file.read_bytes()
    return torch.frombuffer(held, dtype=torch.uint8)[:limit].long()


def batches(config: RunConfig) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and targets (rows, T) at random positions of the text, the same for every precision."""
    T, rows = _length(config), config.train.batch_size
    held, generator = text(32 << 20), torch.Generator().manual_seed(config.seed)
    for _ in range(config.train.steps):
        starts = torch.randint(len(held) - T - 1, (rows,), generator=generator)
        picked = torch.stack([held[start : start + T + 1] for start in starts.tolist()])
        yield picked[:, :-1].contiguous(), picked[:, 1:].contiguous()


def _curve(config: RunConfig) -> dict[str, Any]:
    device = resolve_device(config.train.device)
    session = build_train_state(config, device, "bench")
    stepper = TrainStep(session, NextTokenObjective(session.model, config.train.z_loss), config.train)
    schedule = build_schedule(config.train.schedule, config.train.steps)
    losses, seconds = [], []
    for number, (ids, targets) in enumerate(batches(config)):
        session.optimizer.set_lr_factor(schedule(number), number)
        rows = MicroBatch(ids.to(device), targets.to(device), None)
        start = time.perf_counter()
        losses.append(stepper(StepBatch(rows, targets.numel(), (0, len(ids)))).nll.item())
        seconds.append(time.perf_counter() - start)
    final = losses[-TAIL:]
    return {
        "final_loss": sum(final) / len(final),
        "seconds": statistics.median(seconds[len(seconds) // 2 :]),
        "first_step_seconds": seconds[0],
        "losses": [round(loss, 5) for loss in losses],
    }


def _length(config: RunConfig) -> int:
    return config.train.seq_len or config.model.max_seq_len
