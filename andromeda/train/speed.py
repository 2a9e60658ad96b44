"""Tokens per second, model FLOPs utilisation, memory: of the steps alone, without validation and checkpoints."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

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
        self._flops_per_token = cache(lambda window: training_flops_per_token(model, sequence, window=window))
        self._device = precision.device
        self._peak = peak_flops(str(precision.device), precision.name)
        self._seconds, self._tokens, self._flops = 0.0, 0, 0.0

    def count(self, rows: int, window: int) -> None:
        """Rows that were trained on, with the window that narrowed attention."""
        tokens = rows * self._sequence
        self._tokens, self._flops = self._tokens + tokens, self._flops + tokens * self._flops_per_token(window)

    @contextmanager
    def running(self, cursor: Cursor) -> Iterator[None]:
        """Count the block's time, here and in the run's own sum."""
        began = time.perf_counter()
        yield
        passed = time.perf_counter() - began
        self._seconds, cursor.seconds = self._seconds + passed, cursor.seconds + passed

    def take(self) -> dict[str, float]:
        """Figures since the last call. With a GPU, call after something has waited for it."""
        seconds, tokens, flops = self._seconds, self._tokens, self._flops
        self._seconds, self._tokens, self._flops = 0.0, 0, 0.0
        if not tokens:
            return {}
        figures = {"tokens_per_second": tokens / seconds, "memory_gib": memory(self._device) / GIB}
        return figures | ({"mfu": flops / seconds / self._peak} if self._peak else {})


def memory(device: torch.device) -> int:
    """Most bytes held so far: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
