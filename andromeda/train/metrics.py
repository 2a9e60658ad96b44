"""Metrics of a run: accumulated over steps, timed, written to metrics.jsonl, TensorBoard and Weights & Biases, and read back."""

from __future__ import annotations

import hashlib
import json
import math
import os
import resource
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from andromeda.config.model import ModelConfig
from andromeda.config.run import RunConfig
from andromeda.model.flops import peak_flops, training_flops_per_token
from andromeda.train.precision import Precision
from andromeda.train.progress import MetricValues, Progress
from andromeda.train.run_dir import RunDir
from andromeda.utils.errors import CheckpointError, MissingExtra
from andromeda.utils.untrusted import MalformedFile, open_for_writing, open_regular, parse_json, read_lines

TIMING_METRICS = ("seconds", "tokens_per_second", "tokens_per_second_per_device", "mfu", "memory_gib")
"""Metrics that depend on the state of the machine: all others are reproducible."""


@dataclass(frozen=True)
class MetricsHistory:
    """The readable lines of a metrics.jsonl."""

    records: list[dict[str, Any]]
    num_unreadable: int = 0
    """Unreadable lines: the last one, while it is being written, or after a kill."""

    def series(self, name: str) -> list[tuple[float, float]]:
        """(step, value) wherever the metric is a number."""
        return [(record["step"], record[name]) for record in self.records if is_number(record.get(name))]

    def latest(self, name: str) -> float | None:
        """The newest value of a metric."""
        return next((record[name] for record in reversed(self.records) if is_number(record.get(name))), None)

    def names(self, prefix: str) -> list[str]:
        """Metrics whose names begin with `prefix`, in order of first occurrence."""
        return list(dict.fromkeys(name for record in self.records for name in record if name.startswith(prefix)))

    @property
    def warning(self) -> str:
        """What the end of the training says of one that did no better than without context; empty where it says nothing."""
        return next((str(record.get("warning", "")) for record in reversed(self.records) if "unigram_entropy" in record), "")

    @property
    def step(self) -> int:
        """The newest step that has metrics."""
        return max((int(record["step"]) for record in self.records), default=0)


def read_metrics(path: Path) -> MetricsHistory:
    """The readable lines of a file, which may be missing or still being written."""
    records: list[dict[str, Any]] = []
    num_unreadable = 0
    try:
        for text in read_lines(path):
            if (record := _record(text)) is not None:
                records.append(record)
            else:
                num_unreadable += bool(text.strip(b"\0 "))
    except MalformedFile as error:
        raise CheckpointError(f"{path} {error}: restore it, or remove it.") from None
    except OSError:
        return MetricsHistory([])
    return MetricsHistory(records, num_unreadable)


def _record(text: bytes) -> dict[str, Any] | None:
    """One line of metrics.jsonl: its step, and numbers, texts or lists by name; None for anything else."""
    try:
        record = parse_json(text)
    except MalformedFile:
        return None
    step = record.get("step") if isinstance(record, dict) else None
    if (
        not isinstance(step, int | float)
        or not is_number(step)
        or not 0 <= step < 2**53
        or any(isinstance(value, dict) for value in record.values())
    ):
        return None
    return {**record, "step": int(step)}


def is_number(value: Any) -> bool:
    """Whether the value of a metric is a number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


class MetricAccumulator:
    """Loss, bits per byte and gradient norm of the steps since the last line of metrics.jsonl."""

    def __init__(self, device: torch.device) -> None:
        # In float64 a sum survives JSON without rounding.
        self._sums = torch.zeros(2, dtype=torch.float64, device=device)
        self._steps, self._num_targets, self._num_bytes = 0, 0, 0
        self._heads: dict[str, tuple[Tensor, int]] = {}

    def add(
        self, nll: Tensor, grad_norm: Tensor, num_targets: int, num_bytes: int, heads: Mapping[str, tuple[Tensor, int]] | None = None
    ) -> None:
        """Add a step that was taken.

        nll: cross entropy per target in nats, shape (); grad_norm: shape (); num_bytes: of the text that the targets stand for; heads:
        summed loss and number of targets of each other head.
        """
        for name, (total, count) in (heads or {}).items():
            before, targets = self._heads.get(name, (torch.zeros_like(self._sums[0]), 0))
            self._heads[name] = (before + total.double(), targets + count)
        self._sums += torch.stack([nll.double() * num_targets, grad_norm.double()])
        self._steps, self._num_targets, self._num_bytes = self._steps + 1, self._num_targets + num_targets, self._num_bytes + num_bytes

    def compute_and_reset(self) -> dict[str, float]:
        """The means since the last call, which waits for the device; empty when no step was taken."""
        nll, grad_norm = self._sums.tolist()
        steps, num_targets, num_bytes = self._steps, self._num_targets, self._num_bytes
        heads, self._heads = self._heads, {}
        self._sums.zero_()
        self._steps, self._num_targets, self._num_bytes = 0, 0, 0
        if not steps:
            return {}
        means = {"loss": nll / max(1, num_targets), "gradient_norm": grad_norm / steps}
        means |= {f"loss/{name}": float(total) / count for name, (total, count) in heads.items() if count}
        return means | ({"bits_per_byte": nll / math.log(2) / num_bytes} if num_bytes else {})

    def state_dict(self) -> dict[str, Any]:
        """State, for JSON."""
        state = {"sums": self._sums.tolist(), "steps": self._steps, "targets": self._num_targets, "bytes": self._num_bytes}
        return state | ({"heads": {name: [float(total), count] for name, (total, count) in self._heads.items()}} if self._heads else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._sums.copy_(torch.tensor(state["sums"], dtype=torch.float64))
        self._steps, self._num_targets, self._num_bytes = state["steps"], state["targets"], state["bytes"]
        self._heads = {name: (torch.zeros_like(self._sums[0]) + total, count) for name, (total, count) in state.get("heads", {}).items()}


GIB = 1 << 30


class ThroughputMonitor:
    """Tokens per second (of all devices and of one), MFU and peak memory, over the time spent in steps."""

    def __init__(self, model: ModelConfig, seq_len: int, precision: Precision, devices: int = 1) -> None:
        self._seq_len, self._devices = seq_len, devices
        self._flops_per_token = cache(lambda window: training_flops_per_token(model, seq_len, window=window))
        self._device = precision.device
        self._peak_flops = peak_flops(str(precision.device), precision.name)
        self._seconds, self._tokens, self._flops = 0.0, 0, 0.0

    def add_sequences(self, count: int, window: int) -> None:
        """Add sequences that were trained on with the attention window `window` (0: as configured)."""
        tokens = count * self._seq_len
        self._tokens, self._flops = self._tokens + tokens, self._flops + tokens * self._flops_per_token(window)

    @contextmanager
    def measure(self, progress: Progress) -> Iterator[None]:
        """Add the block's time, here and to the run's total."""
        start = time.perf_counter()
        yield
        elapsed = time.perf_counter() - start
        self._seconds, progress.seconds = self._seconds + elapsed, progress.seconds + elapsed

    def compute_and_reset(self) -> dict[str, float]:
        """Metrics since the last call. With a GPU, synchronize with it first."""
        seconds, tokens, flops = self._seconds, self._tokens, self._flops
        self._seconds, self._tokens, self._flops = 0.0, 0, 0.0
        if not tokens:
            return {}
        metrics = {"tokens_per_second": tokens / seconds, "memory_gib": peak_memory(self._device) / GIB}
        if self._devices > 1:
            metrics["tokens_per_second_per_device"] = tokens / seconds / self._devices
        return metrics | ({"mfu": flops / seconds / self._devices / self._peak_flops} if self._peak_flops else {})


def peak_memory(device: torch.device) -> int:
    """Peak memory in bytes so far: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class MetricsLogger(Protocol):
    """Receives the metrics of a step."""

    def log(self, step: int, metrics: MetricValues) -> None:
        """Metrics by name; text and lists may be among them."""

    def close(self) -> None:
        """Flush and release."""


class MetricsFile:
    """metrics.jsonl: one JSON object a line, `step` first. Append-only, except for `truncate`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file = open_for_writing(path.parent, path, append=True)
        except MalformedFile as error:
            raise CheckpointError(f"{path} {error}: remove it.") from None

    def log(self, step: int, metrics: MetricValues) -> None:
        """Append a line; a value that is not finite becomes null, since JSON has no NaN."""
        line = {"step": step} | {name: _finite_or_none(value) for name, value in metrics.items()}
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()

    def sync(self) -> int:
        """Flush to the disk; returns the file's size in bytes."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.seek(0, os.SEEK_END)

    def checkpoint_info(self) -> dict[str, Any]:
        """Flush to the disk; returns size and hash of the file, which a checkpoint records."""
        size = self.sync()
        return {"metrics_bytes": size, "metrics_sha256": sha256_prefix(self._path, size)}

    def truncate(self, size: int) -> None:
        """Drop all after the first `size` bytes, so that the file reads as if the run had never been interrupted."""
        self._file.truncate(min(size, self.sync()))

    def close(self) -> None:
        self.sync()
        self._file.close()


class NullMetricsFile(MetricsFile):
    """No file: that of a process which another one writes metrics.jsonl for."""

    def __init__(self) -> None: ...
    def log(self, step: int, metrics: MetricValues) -> None: ...
    def truncate(self, size: int) -> None: ...
    def close(self) -> None: ...

    def checkpoint_info(self) -> dict[str, Any]:
        """Nothing, as the other process records it."""
        return {}


def sha256_prefix(path: Path, size: int) -> str:
    """sha256 of a file's first `size` bytes, or of the whole file if it is shorter."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while size > 0 and (piece := file.read(min(size, 1 << 20))):
            digest.update(piece)
            size -= len(piece)
    return digest.hexdigest()


class TensorBoardLogger:
    """Scalars for TensorBoard, in the run folder."""

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # purge_step hides what an interrupted process wrote after the checkpoint.
        self._writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def log(self, step: int, metrics: MetricValues) -> None:
        """The numbers among the metrics."""
        for name, value in metrics.items():
            if isinstance(value, int | float):
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandbLogger:
    """Metrics for Weights & Biases, under the run's own id, so that a resumed run continues the same chart."""

    def __init__(self, config: RunConfig, run_dir: RunDir, identity: str) -> None:
        import wandb

        self._run = wandb.init(
            project=config.train.log.project,
            name=config.name,
            id=identity,
            resume="allow",
            dir=str(run_dir.path),
            config=config.model_dump(),
        )

    def log(self, step: int, metrics: MetricValues) -> None:
        self._run.log(metrics, step=step)

    def close(self) -> None:
        self._run.finish()


def check_loggers_installed(config: RunConfig) -> None:
    """Raises MissingExtra when the configuration asks for a logger that is not installed."""
    if config.train.log.wandb and find_spec("wandb") is None:
        raise MissingExtra("wandb", "wandb", "Logging to Weights & Biases (train.log.wandb)")


def build_loggers(config: RunConfig, run_dir: RunDir, step: int, identity: str) -> list[MetricsLogger]:
    """The loggers that the configuration asks for besides metrics.jsonl."""
    loggers: list[MetricsLogger] = []
    if config.train.log.wandb:
        loggers.append(WandbLogger(config, run_dir, identity))
    if config.train.log.tensorboard:
        loggers.append(TensorBoardLogger(run_dir.path / "tensorboard", step))
    return loggers


def _finite_or_none(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
