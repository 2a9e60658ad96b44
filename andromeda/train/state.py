"""Which device a run computes on."""

from __future__ import annotations

import contextlib
import ctypes
import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from andromeda.config.run import RunConfig
from andromeda.model.transformer import Transformer
from andromeda.optim import Optimizer, build_optimizer
from andromeda.train.activation_checkpoint import checkpoint_blocks
from andromeda.train.callbacks.ema import NoAverage, build_average
from andromeda.train.callbacks.spike_guard import BadSteps
from andromeda.train.callbacks.validation import ROWS
from andromeda.train.checkpoint import Cursor, Snapshot
from andromeda.train.compile import compile_blocks
from andromeda.train.memory_check import check_fits, check_rows_fit
from andromeda.train.metrics import Meter
from andromeda.train.precision import Precision, build_precision
from andromeda.utils.errors import CheckpointError, ConfigError, nearest


def find_device(name: str, key: str = "train.device") -> torch.device:
    """The device that a user names under `key`; `auto` is the first GPU, or else the CPU. Raises ConfigError where there is none such."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"There is no device {name!r}{nearest(name, ['auto', 'cpu', 'cuda'])}: give auto, cpu, cuda or cuda:N.") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"{key} = {name!r}, but this machine shows {torch.cuda.device_count()} CUDA devices: use auto or cpu.")
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"{key} = {name!r} is a kind of device that is not supported: use auto, cpu or cuda.")
    return device


M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
"""glibc's <malloc.h>."""


def keep_freed_memory() -> None:
    """Ask glibc not to give large blocks back to the system between steps; other C libraries are left as they are.

    By default it returns them at once and takes them again page by page: 17,000 page faults and 2 to 4 % of the time of a
    step of 6 layers of width 256 on a CPU, against next to none with this.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, value in ((M_TRIM_THRESHOLD, 1 << 30), (M_TOP_PAD, 64 << 20), (M_MMAP_THRESHOLD, 32 << 20)):
            mallopt(parameter, value)


def seed_all(seed: int) -> None:
    """Seed every generator of this process."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def rng_tensors() -> dict[str, Tensor]:
    """The states that are arrays."""
    states = {"torch": torch.get_rng_state(), "numpy": torch.from_numpy(np.random.get_state()[1].astype(np.int64))}  # type: ignore[index]
    if torch.cuda.is_available():
        states |= {f"cuda.{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def rng_values() -> dict[str, Any]:
    """The rest."""
    version, state, gauss = random.getstate()
    _, _, position, has_gauss, cached = np.random.get_state()
    return {"python": [version, list(state), gauss], "numpy": [int(position), int(has_gauss), float(cached)]}


def load_rng(saved: dict[str, Tensor], described: dict[str, Any]) -> None:
    """Take back what `tensors` and `values` gave. States of devices that are not here are left out."""
    version, state, gauss = described["python"]
    random.setstate((version, tuple(state), gauss))
    np.random.set_state(("MT19937", saved["numpy"].numpy().astype(np.uint32), *described["numpy"]))
    torch.set_rng_state(saved["torch"])
    for index in range(torch.cuda.device_count()):
        if f"cuda.{index}" in saved:
            torch.cuda.set_rng_state(saved[f"cuda.{index}"], index)


COPIES = {"adamw": 4, "muon": 3, "adamw8bit": 2}
"""How often each optimizer's training holds the parameters in 32 bits, at least: weights, gradients, moments."""


@dataclass
class Session:
    """The live parts of a run."""

    config: RunConfig
    model: Transformer
    optimizer: Optimizer
    precision: Precision
    guard: BadSteps
    average: NoAverage
    meter: Meter
    fingerprint: str
    """Of the data."""
    cursor: Cursor = field(default_factory=Cursor)

    def snapshot(self, metrics: Mapping[str, Any]) -> Snapshot:
        """The whole state. metrics: how much of metrics.jsonl belongs to it, and its hash (MetricsFile.kept)."""
        tensors = {
            "model": model_tensors(self.model),
            "optimizer": self.optimizer.tensors(),
            "average": self.average.tensors(),
            "random": rng_tensors(),
        }
        values = {
            "healthy": self.guard.healthy,
            "cursor": asdict(self.cursor),
            "data": self.fingerprint,
            "config": self.config.model_dump(),
            "optimizer": self.optimizer.values(),
            "average": self.average.updates,
            "precision": {"name": self.precision.name, **self.precision.values()},
            "guard": self.guard.values(),
            "meter": self.meter.values(),
            "random": rng_values(),
            "validation": ROWS,
            **metrics,
        }
        return Snapshot(self.cursor.step, {part: held for part, held in tensors.items() if held}, values)

    def restore(self, snapshot: Snapshot) -> None:
        """Take a whole state back. Raises CheckpointError, one sentence, when it is of another model, optimizer or data."""
        values = snapshot.values
        if values["data"] != self.fingerprint:
            raise CheckpointError(
                f"The data has changed since the checkpoint (fingerprint {self.fingerprint[:12]}, then {values['data'][:12]}): "
                "give the run its old corpus, or train in another folder."
            )
        if values["precision"]["name"] != self.precision.name:
            raise CheckpointError(
                f"The checkpoint was trained in {values['precision']['name']} and this start would use {self.precision.name}: "
                f"add train.precision={values['precision']['name']}."
            )
        load_model(self.model, snapshot.tensors["model"])
        self.optimizer.load(snapshot.tensors.get("optimizer", {}), values["optimizer"])
        self.average.load(snapshot.tensors.get("average", {}), values["average"])
        self.precision.load(values["precision"])
        self.guard.load(values["guard"])
        self.meter.load(values["meter"])
        load_rng(snapshot.tensors["random"], values["random"])
        self.cursor = Cursor(**values["cursor"])


def build_session(config: RunConfig, device: torch.device, fingerprint: str) -> Session:
    """A run at its beginning."""
    train = config.train
    check_fits(config.model, device, COPIES[train.optim.kind])
    if device.type == "cpu":
        keep_freed_memory()
    seed_all(config.seed)
    precision = build_precision(train.precision, device)
    check_rows_fit(config, device, precision.name)
    model = precision.prepare(Transformer(config.model, seed=config.seed).to(device))
    checkpoint_blocks(model, train.activation_checkpointing)
    compile_blocks(model, config, device)
    return Session(
        config,
        model,
        build_optimizer(model, train.optim, train.compile),
        precision,
        BadSteps(train.spike_guard),
        build_average(model, train.ema),
        Meter(device),
        fingerprint,
    )


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Weights and kept buffers by name, each once (a tied head is the embedding's table)."""
    seen: set[int] = set()
    kept: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            kept[name] = tensor.detach()
    return kept


def load_model(model: nn.Module, saved: dict[str, Tensor]) -> None:
    """Copy saved tensors into a model. Raises CheckpointError, saying what differs, before anything changes."""
    live = model_tensors(model)
    different = [f"{name} is only in the {'model' if name in live else 'checkpoint'}" for name in sorted(live.keys() ^ saved.keys())]
    different += [
        f"{name} has the shape {tuple(saved[name].shape)} in the checkpoint and {tuple(tensor.shape)} in the model"
        for name, tensor in live.items()
        if name in saved and saved[name].shape != tensor.shape
    ]
    if different:
        more = f" (and {len(different) - 1} more differences)" if len(different) > 1 else ""
        raise CheckpointError(f"The checkpoint is of another model: {different[0]}{more}; use the configuration that it was trained with.")
    with torch.no_grad():
        for name, tensor in live.items():
            tensor.copy_(saved[name])
