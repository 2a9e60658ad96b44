"""The live state of a run: model, optimizer, precision, spike guard, averages, random states; saved to and restored from snapshots."""

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

from andromeda.config.loss import LossConfig
from andromeda.config.run import RunConfig
from andromeda.loss.balance import FixedWeights
from andromeda.model.transformer import Transformer
from andromeda.optim import OptimizerContainer, build_optimizer
from andromeda.parallel.diloco import DiLoCoWorker
from andromeda.parallel.fsdp import shard_model
from andromeda.parallel.layout import ONE
from andromeda.parallel.mesh import ParallelMesh
from andromeda.parallel.one_process import Collectives
from andromeda.parallel.split_model import split_model
from andromeda.parallel.step_collectives import MeshCollectives
from andromeda.train.activation_checkpoint import checkpoint_blocks
from andromeda.train.callbacks.ema import ExponentialMovingAverage, build_ema
from andromeda.train.callbacks.spike_guard import LossSpikeGuard
from andromeda.train.callbacks.validation import ROW_SELECTION
from andromeda.train.checkpoint import Snapshot
from andromeda.train.checkpoint_ranks import ONE as ONE_RANK
from andromeda.train.checkpoint_ranks import Ranks
from andromeda.train.checkpoint_reader import shape_of
from andromeda.train.compile import compile_blocks
from andromeda.train.memory_check import check_activations_fit, check_state_fits
from andromeda.train.metrics import MetricAccumulator
from andromeda.train.multi_task import build_balance
from andromeda.train.precision import Precision, build_precision
from andromeda.train.progress import Progress
from andromeda.utils.errors import CheckpointError, ConfigError, nearest


def resolve_device(name: str, key: str = "train.device") -> torch.device:
    """The device that the key `key` names; `auto` is the first GPU, or else the CPU. Raises ConfigError for one that does not exist."""
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
"""Parameters of mallopt in glibc's <malloc.h>."""


def retain_freed_memory() -> None:
    """Ask glibc not to return large blocks to the system between steps; no effect with other C libraries.

    By default it returns them at once and maps them again page by page: 17,000 page faults and 2 to 4 % of the time of a step of
    6 layers with hidden size 256 on a CPU.
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
    """Random states that are arrays."""
    states = {"torch": torch.get_rng_state(), "numpy": torch.from_numpy(np.random.get_state()[1].astype(np.int64))}  # type: ignore[index]
    if torch.cuda.is_available():
        states |= {f"cuda.{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def rng_values() -> dict[str, Any]:
    """Random states that are plain values, for JSON."""
    version, state, gauss = random.getstate()
    _, _, position, has_gauss, cached = np.random.get_state()
    return {"python": [version, list(state), gauss], "numpy": [int(position), int(has_gauss), float(cached)]}


def load_rng(tensors: Mapping[str, Tensor], values: dict[str, Any]) -> None:
    """Restore what `rng_tensors` and `rng_values` returned. States of devices that this machine does not have are ignored."""
    version, state, gauss = values["python"]
    random.setstate((version, tuple(state), gauss))
    np.random.set_state(("MT19937", tensors["numpy"].numpy().astype(np.uint32), *values["numpy"]))
    torch.set_rng_state(tensors["torch"])
    for index in range(torch.cuda.device_count()):
        if f"cuda.{index}" in tensors:
            torch.cuda.set_rng_state(tensors[f"cuda.{index}"], index)


@dataclass
class TrainState:
    """The live parts of a run."""

    config: RunConfig
    model: Transformer
    optimizer: OptimizerContainer
    precision: Precision
    spike_guard: LossSpikeGuard
    ema: ExponentialMovingAverage | None
    metrics: MetricAccumulator
    data_fingerprint: str
    progress: Progress = field(default_factory=Progress)
    collectives: Collectives = field(default_factory=Collectives)
    """What is exchanged with the other processes of the run."""
    ranks: Ranks = ONE_RANK
    """The processes of the run, as they write a checkpoint together."""
    diloco: DiLoCoWorker | None = None
    """While the run is a worker of DiLoCo."""
    balance: FixedWeights = field(default_factory=lambda: FixedWeights([1.0], [False], LossConfig()))
    """How the losses of the run's tasks are weighed."""

    def snapshot(self, metrics_info: Mapping[str, Any]) -> Snapshot:
        """The whole state. metrics_info: how much of metrics.jsonl belongs to it, and its hash (MetricsFile.checkpoint_info)."""
        tensors = {
            "model": model_tensors(self.model),
            "optimizer": self.optimizer.state_tensors(),
            "average": self.ema.state_tensors() if self.ema else {},
            "random": rng_tensors(),
            "loss": self.balance.state_tensors(),
            "outer": self.diloco.state_tensors() if self.diloco else {},
        }
        metadata = {
            "healthy": self.spike_guard.healthy,
            "cursor": asdict(self.progress),
            "data": self.data_fingerprint,
            "config": self.config.model_dump(),
            "optimizer": self.optimizer.state_metadata(),
            "average": self.ema.updates if self.ema else 0,
            "precision": {"name": self.precision.name, **self.precision.state_dict()},
            "guard": self.spike_guard.state_dict(),
            "meter": self.metrics.state_dict(),
            "random": rng_values(),
            **({"outer": self.diloco.state_metadata()} if self.diloco else {}),
            "validation": ROW_SELECTION,
            **metrics_info,
        }
        return Snapshot(self.progress.step, {part: held for part, held in tensors.items() if held}, metadata)

    def restore(self, snapshot: Snapshot) -> None:
        """Restore a whole state. Raises CheckpointError, one sentence, when it is of another model, optimizer or corpus."""
        metadata = snapshot.metadata
        if not isinstance(metadata.get("data"), str) or not isinstance(metadata.get("precision"), dict):
            raise CheckpointError(
                f"The checkpoint of step {snapshot.step} holds weights without the state of a training: it cannot be resumed."
            )
        if metadata["data"] != self.data_fingerprint:
            raise CheckpointError(
                f"The data has changed since the checkpoint (training stream {self.data_fingerprint[:12]}, then {metadata['data'][:12]}): "
                "give the run its old corpus, or train in another folder."
            )
        if metadata["precision"].get("name") != self.precision.name:
            raise CheckpointError(
                f"The checkpoint was trained in {metadata['precision'].get('name')} and this start would use {self.precision.name}: "
                f"add train.precision={metadata['precision'].get('name')}."
            )
        try:
            self._restore(snapshot)
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise CheckpointError(
                f"The checkpoint of step {snapshot.step} does not hold the state of a run ({reason}): use an older checkpoint."
            ) from None

    def _restore(self, snapshot: Snapshot) -> None:
        metadata = snapshot.metadata
        load_model(self.model, snapshot.tensors["model"])
        self.optimizer.load_state(snapshot.tensors.get("optimizer", {}), metadata["optimizer"])
        if self.ema is not None:
            self.ema.load_state(snapshot.tensors.get("average", {}), metadata["average"])
        self.balance.load_state(snapshot.tensors.get("loss", {}))
        self.precision.load_state_dict(metadata["precision"])
        self.spike_guard.load_state_dict(metadata["guard"])
        self.metrics.load_state_dict(metadata["meter"])
        load_rng(snapshot.tensors["random"], metadata["random"])
        if self.diloco is not None:
            self.diloco.load_state(snapshot.tensors.get("outer", {}), metadata.get("outer", {}))
        self.progress = Progress(**metadata["cursor"])
        if not all(type(value) in (int, float) and value >= 0 for value in metadata["cursor"].values()):
            raise ValueError("its counts are no numbers")


def build_train_state(config: RunConfig, device: torch.device, data_fingerprint: str, mesh: ParallelMesh | None = None) -> TrainState:
    """The state of a run before its first step, the same for any number of processes. mesh: those of this run, None for one alone.

    Raises ConfigError for what cannot fit the device's memory.
    """
    train, layout = config.train, mesh.layout if mesh else ONE
    check_state_fits(config, device, layout)
    if device.type == "cpu":
        retain_freed_memory()
    seed_all(config.seed)
    precision = build_precision(train.precision, device)
    check_activations_fit(config, device, precision.name, layout)
    sharded = layout.shard * layout.context > 1
    model = Transformer(config.model, seed=config.seed).to(device)
    if mesh:
        split_model(model, mesh)
    model = precision.convert_model(model, sharded=sharded)
    checkpoint_blocks(model, train.activation_checkpointing)
    compile_blocks(model, config, device)
    if mesh and sharded:
        shard_model(model, mesh, config.parallel, precision.gather_dtype)
    optimizer = build_optimizer(model, train.optim, train.compile)
    if mesh and layout.world_size > 1:
        optimizer.share_work(mesh.batch_group)
    return TrainState(
        config,
        model,
        optimizer,
        precision,
        LossSpikeGuard(train.spike_guard),
        build_ema(model, train.ema),
        MetricAccumulator(device),
        data_fingerprint,
        collectives=MeshCollectives(mesh, model) if mesh else Collectives(),
        ranks=Ranks(mesh.host_group) if mesh else ONE_RANK,
        balance=build_balance(config).to(device),
    )


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Weights and persistent buffers by name, each once (a tied head is listed as the embedding's weight)."""
    seen: set[int] = set()
    kept: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            kept[name] = tensor.detach()
    return kept


def load_model(model: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """Copy saved tensors into a model. Raises CheckpointError, before anything changes, when names or shapes differ."""
    live = model_tensors(model)
    different = [f"{name} is only in the {'model' if name in live else 'checkpoint'}" for name in sorted(live.keys() ^ saved.keys())]
    shapes = {name: shape_of(saved, name) for name in live.keys() & saved.keys()}
    different += [
        f"{name} has the shape {shapes[name]} in the checkpoint and {tuple(tensor.shape)} in the model"
        for name, tensor in live.items()
        if name in shapes and shapes[name] != tuple(tensor.shape)
    ]
    if different:
        more = f" (and {len(different) - 1} more differences)" if len(different) > 1 else ""
        raise CheckpointError(f"The checkpoint is of another model: {different[0]}{more}; use the configuration that it was trained with.")
    with torch.no_grad():
        for name, tensor in live.items():
            tensor.copy_(saved[name])
