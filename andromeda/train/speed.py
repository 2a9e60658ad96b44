"""Tokens per second, model FLOPs utilisation, memory: of the steps alone, without validation and checkpoints."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from andromeda.config.model import ModelConfig
from andromeda.model.flops import peak_flops, training_flops_per_token
from andromeda.train.precision import Precision
from andromeda.train.session import Cursor

GIB = 1 << 30


class Speed:
    """A watch that runs during steps."""

    def __init__(self, model: ModelConfig, sequence: int, precision: Precision) -> None:
        self._sequence = sequence
        self._flops = training_flops_per_token(model, sequence)
        self._device = precision.device
        self._peak = peak_flops(str(precision.device), precision.name)
        self._seconds, self._tokens = 0.0, 0

    @contextmanager
    def running(self, rows: int, cursor: Cursor) -> Iterator[None]:
        """Count the block's time for `rows` rows, here and in the run's own sum."""
        began = time.perf_counter()
        yield
        passed = time.perf_counter() - began
        self._seconds, cursor.seconds = self._seconds + passed, cursor.seconds + passed
        self._tokens += rows * self._sequence

    def take(self) -> dict[str, float]:
        """Figures since the last call. With a GPU, call after something has waited for it."""
        seconds, tokens = self._seconds, self._tokens
        self._seconds, self._tokens = 0.0, 0
        if not tokens:
            return {}
        rate = tokens / seconds
        figures = {"tokens_per_second": rate, "memory_gib": memory(self._device) / GIB}
        return figures | ({"mfu": rate * self._flops / self._peak} if self._peak else {})


def memory(device: torch.device) -> int:
    """Most bytes held so far: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
