"""Where figures go: metrics.jsonl always, TensorBoard and Weights & Biases when asked for."""

from __future__ import annotations

import hashlib
import json
import math
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from andromeda.config.run import RunConfig
from andromeda.errors import MissingExtra
from andromeda.train.folder import RunFolder

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
