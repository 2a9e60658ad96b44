"""A trained model from its run folder, for whatever is done with it afterwards."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from andromeda.config.model import ModelConfig
from andromeda.model.transformer import Transformer
from andromeda.train import checkpoint
from andromeda.train.checkpoint_reader import has_part, read_part
from andromeda.train.run_dir import RunDir
from andromeda.train.state import load_model
from andromeda.utils.errors import CheckpointError
from andromeda.utils.untrusted import open_regular


def load_weights(
    run: str | Path, *, average: bool = False, step: int | None = None, device: torch.device | str = "cpu", warn: checkpoint.Warn = print
) -> Transformer:
    """The model of the run folder `run`, in evaluation mode, float32; arguments as in `read_weights`."""
    config, weights = read_weights(run, average=average, step=step, warn=warn)
    model = Transformer(config).to(device)
    load_model(model, weights)
    return model.eval()


def read_weights(
    run: str | Path, *, average: bool = False, step: int | None = None, warn: checkpoint.Warn = print
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The configuration of the model in the run folder `run` and its weights by name, on the CPU.

    average: its moving average instead of the last weights. step: an older checkpoint instead of the newest intact one.
    Raises CheckpointError, one sentence, when there is none.
    """
    path = resolve_checkpoint(run, average=average, step=step, warn=warn)
    weights = dict(read_part(path, "model"))
    if average:
        weights |= dict(read_part(path, "average"))
    return RunDir(run).config().model, weights


def resolve_checkpoint(run: str | Path, *, average: bool = False, step: int | None = None, warn: checkpoint.Warn = print) -> Path:
    """The folder of the checkpoint that `read_weights` reads. Raises CheckpointError, one sentence, when there is none."""
    folder, parts = RunDir(run), ("model", "average") if average else ("model",)
    if not folder.exists:
        raise CheckpointError(f"{run} is not a run folder (it holds no config.toml): give the --out of `andromeda train`.")
    there = checkpoint.list_all(folder.checkpoints)
    if not there:
        raise CheckpointError(f"{folder.path} holds no checkpoint yet: wait for the first one.")
    if "average" in parts and not has_part(there[0], "average"):
        raise CheckpointError(f"{folder.path} keeps no moving average: train with train.ema=0.999, or use the weights themselves.")
    if step is None:
        path = checkpoint.latest(folder.checkpoints, warn, parts)
        assert path is not None
        return path
    path = folder.checkpoints / checkpoint.dir_name(step)
    reason = checkpoint.find_damage(path, parts) if path in there else "it does not exist"
    if reason:
        steps = ", ".join(str(int(other.name[5:])) for other in there)
        raise CheckpointError(f"The checkpoint of step {step} in {folder.path} cannot be used ({reason}): there are steps {steps}.")
    return path


def weights_sha256(path: Path, part: str = "model") -> str:
    """sha256 of the file of a checkpoint's part; of one that several ranks wrote, of the file that one process would have written."""
    file = path / f"{part}.safetensors"
    if not file.exists():
        return hashlib.sha256(save(dict(read_part(path, part)))).hexdigest()
    with open_regular(file) as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
