"""What a technique costs: time of a step and peak memory, measured while nothing else runs here, on the first rows of the run."""

from __future__ import annotations

import gc
import statistics
import time
from dataclasses import dataclass

import psutil
import torch

from andromeda.ablate.budget import tokens_per_step
from andromeda.config.run import RunConfig
from andromeda.data.loader import open_stream
from andromeda.train.metrics import memory
from andromeda.train.objective import NextToken, Rows
from andromeda.train.state import build_session, find_device
from andromeda.train.step import Stepper, Work
from andromeda.train.trainer import stream_length

WARMUP = 3


@dataclass(frozen=True)
class Cost:
    """Of one arm."""

    step_seconds: float
    """Median of the measured steps."""
    peak_bytes: int
    """Most memory that the run held: allocated on a GPU; on a CPU resident in the process, beyond what it held before."""
    tokens: int
    """Of one step."""

    @property
    def seconds_per_token(self) -> float:
        """So that arms with other batches can be compared."""
        return self.step_seconds / self.tokens


def measure(config: RunConfig, steps: int) -> Cost:
    """Take a few real steps of a run that is thrown away."""
    device = find_device(config.train.device)
    _forget(device)
    before = 0 if device.type == "cuda" else psutil.Process().memory_info().rss
    stream = open_stream(config.data, stream_length(config), config.seed)
    session = build_session(config, device, stream.fingerprint)
    stepper = Stepper(session, NextToken(session.model, config.train.z_loss), config.train)
    batch = stream.batch(0, config.train.batch_size)
    work = Work(Rows.of(batch, config.data.document_mask), batch.tokens, (0, config.train.batch_size))
    session.optimizer.set_factor(1e-3, 0)
    times = [_timed(stepper, work, device) for _ in range(WARMUP + steps)]
    return Cost(statistics.median(times[WARMUP:]), memory(device) - before, tokens_per_step(config))


def _timed(stepper: Stepper, work: Work, device: torch.device) -> float:
    start = time.perf_counter()
    stepper(work)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _forget(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
