"""metrics.jsonl read back: of a run that is going on, that was killed, or that somebody else sent."""

from __future__ import annotations

import hashlib
import json
import math
import os
import resource
import time
from collections.abc import Iterator
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
from andromeda.train.checkpoint import Cursor
from andromeda.train.precision import Precision
from andromeda.train.run_dir import RunFolder
from andromeda.utils.errors import MissingExtra

TIMED = ("seconds", "tokens_per_second", "mfu", "memory_gib")
"""Figures that depend on the machine's mood: all others repeat."""


@dataclass(frozen=True)
class Metrics:
    """The lines of metrics.jsonl that can be read."""

    lines: list[dict[str, Any]]
    broken: int = 0
    """Lines that cannot: the last one, while it is being written, or after a kill."""

    def points(self, name: str) -> list[tuple[float, float]]:
        """(step, figure) wherever the figure is a number."""
        return [(line["step"], line[name]) for line in self.lines if is_number(line.get(name))]

    def last(self, name: str) -> float | None:
        """The newest value of a figure."""
        return next((line[name] for line in reversed(self.lines) if is_number(line.get(name))), None)

    def names(self, start: str) -> list[str]:
        """Figures whose names begin so, in the order in which they came."""
        return list(dict.fromkeys(name for line in self.lines for name in line if name.startswith(start)))

    @property
    def step(self) -> int:
        """The newest step that there are figures of."""
        return max((int(line["step"]) for line in self.lines), default=0)


def read_metrics(path: Path) -> Metrics:
    """The lines that are whole. A file that is missing has none."""
    try:
        raw = path.read_bytes()
    except OSError:
        return Metrics([])
    lines, broken = [], 0
    for text in raw.splitlines():
        try:
            line = json.loads(text)
            lines.append(line | {"step": int(line["step"])})
        except (ValueError, TypeError, KeyError):
            broken += bool(text.strip(b"\0 "))
    return Metrics(lines, broken)


def is_number(value: Any) -> bool:
    """Whether a figure is one."""
    return isinstance(value, int | float) and not isinstance(value, bool)


class Meter:
    """Loss, bits and gradient norm of the steps since the last line."""

    def __init__(self, device: torch.device) -> None:
        # In float64 a sum goes to JSON and back without a rounding of its own.
        self._sums = torch.zeros(2, dtype=torch.float64, device=device)
        self._steps, self._targets, self._bytes = 0, 0, 0

    def add(self, nll: Tensor, norm: Tensor, targets: int, text: int) -> None:
        """A step that was taken: nll per target in nats and gradient norm, both (); its targets, and the bytes of text they stand for."""
        self._sums += torch.stack([nll.double() * targets, norm.double()])
        self._steps, self._targets, self._bytes = self._steps + 1, self._targets + targets, self._bytes + text

    def take(self) -> dict[str, float]:
        """The means, and a fresh start; nothing when no step was taken."""
        nll, norm = self._sums.tolist()
        steps, targets, text = self._steps, self._targets, self._bytes
        self._sums.zero_()
        self._steps, self._targets, self._bytes = 0, 0, 0
        if not steps:
            return {}
        means = {"loss": nll / max(1, targets), "gradient_norm": norm / steps}
        return means | ({"bits_per_byte": nll / math.log(2) / text} if text else {})

    def values(self) -> dict[str, Any]:
        """State, for JSON."""
        return {"sums": self._sums.tolist(), "steps": self._steps, "targets": self._targets, "bytes": self._bytes}

    def load(self, values: dict[str, Any]) -> None:
        """Take back what `values` gave."""
        self._sums.copy_(torch.tensor(values["sums"], dtype=torch.float64))
        self._steps, self._targets, self._bytes = values["steps"], values["targets"], values["bytes"]


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


Figures = dict[str, Any]


class Sink(Protocol):
    """Takes the figures of a step."""

    def write(self, step: int, figures: Figures) -> None:
        """Figures by name; text and lists may be among them."""

    def close(self) -> None:
        """Finish."""


class MetricsFile:
    """metrics.jsonl: one JSON object a line, `step` first; only ever appended to, except by `cut`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = open(path, "ab")  # noqa: SIM115 - open for the life of the run

    def write(self, step: int, figures: Figures) -> None:
        """Append a line; a figure that is not finite becomes null, which JSON has."""
        line = {"step": step} | {name: _plain(figure) for name, figure in figures.items()}
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()

    def sync(self) -> int:
        """Make everything durable; returns the file's size in bytes."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.seek(0, os.SEEK_END)

    def kept(self) -> dict[str, Any]:
        """Make everything durable; returns the size of what is written and its hash, as a checkpoint keeps them."""
        size = self.sync()
        return {"metrics_bytes": size, "metrics_sha256": sha256_of_first(self._path, size)}

    def cut(self, size: int) -> None:
        """Drop what was written after the file had `size` bytes, so that it reads as if never interrupted."""
        self._file.truncate(min(size, self.sync()))

    def close(self) -> None:
        """Finish."""
        self.sync()
        self._file.close()


def sha256_of_first(path: Path, size: int) -> str:
    """sha256 of a file's first `size` bytes, or of all where it has fewer."""
    with open(path, "rb") as file:
        return hashlib.sha256(file.read(size)).hexdigest()


class TensorBoard:
    """Scalars for TensorBoard, in the run folder."""

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # purge_step hides what an interrupted process wrote after the checkpoint.
        self._writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def write(self, step: int, figures: Figures) -> None:
        """The numbers among the figures."""
        for name, figure in figures.items():
            if isinstance(figure, int | float):
                self._writer.add_scalar(name, figure, step)

    def close(self) -> None:
        """Finish."""
        self._writer.close()


class WeightsAndBiases:
    """Figures for wandb, under the run's own id, so that a resumed run goes on in the same chart."""

    def __init__(self, config: RunConfig, folder: RunFolder, identity: str) -> None:
        import wandb

        self._run = wandb.init(
            project=config.train.log.project,
            name=config.name,
            id=identity,
            resume="allow",
            dir=str(folder.path),
            config=config.model_dump(),
        )

    def write(self, step: int, figures: Figures) -> None:
        """All figures."""
        self._run.log(figures, step=step)

    def close(self) -> None:
        """Finish."""
        self._run.finish()


def check_extras(config: RunConfig) -> None:
    """Raises MissingExtra when the configuration asks for a sink that is not installed."""
    if config.train.log.wandb and find_spec("wandb") is None:
        raise MissingExtra("wandb", "wandb", "Logging to Weights & Biases (train.log.wandb)")


def build_sinks(config: RunConfig, folder: RunFolder, step: int, identity: str) -> list[Sink]:
    """What the configuration asks for besides metrics.jsonl."""
    sinks: list[Sink] = []
    if config.train.log.wandb:
        sinks.append(WeightsAndBiases(config, folder, identity))
    if config.train.log.tensorboard:
        sinks.append(TensorBoard(folder.path / "tensorboard", step))
    return sinks


def _plain(figure: Any) -> Any:
    return None if isinstance(figure, float) and not math.isfinite(figure) else figure
