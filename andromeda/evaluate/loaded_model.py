"""What is evaluated: one checkpoint of a run, placed on a device, with the hash of its weights."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from andromeda.api import Andromeda
from andromeda.config.run import RunConfig
from andromeda.data.tokenizer import Tokenizer
from andromeda.train.manifest import code_state, device_name, machine, versions
from andromeda.train.run_dir import RunDir
from andromeda.train.weights import resolve_checkpoint, weights_sha256
from andromeda.utils.errors import RequestError
from andromeda.utils.log import get_logger
from andromeda.utils.untrusted import MalformedFile, open_regular

log = get_logger()

PRECISIONS = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode and where it comes from."""

    run: Path
    config: RunConfig
    model: Andromeda
    step: int
    weights: str
    """sha256 of the file that its weights were read from."""
    average: bool

    @property
    def context(self) -> int:
        """Tokens that the model was made for."""
        return self.config.model.max_seq_len

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return self.model.head.weight.device

    @property
    def precision(self) -> str:
        """The dtype of its weights, and so of its matmuls."""
        return PRECISIONS[self.model.head.weight.dtype]

    def tokenizer(self, purpose: str) -> Tokenizer:
        """Its tokenizer. Raises RequestError where it has none."""
        if self.model.tokenizer is None:
            raise RequestError(f"{purpose} needs a tokenizer, and {self.run} has none: copy the corpus's tokenizer folder there.")
        return self.model.tokenizer

    def circumstances(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Machine and versions, as a result keeps them."""
        where = {"device": device_name(self.device), "precision": self.precision, **machine()}
        return where, {**versions(), "code": code_state()}


def load_model(run: Path, *, step: int | None = None, average: bool = False, device: str = "auto", dtype: str = "auto") -> LoadedModel:
    """The model of a run folder, as `andromeda eval` measures it; arguments as in `Andromeda.from_run`. Raises CheckpointError."""
    path = resolve_checkpoint(run, average=average, step=step, warn=log.warning)
    number = int(path.name.removeprefix("step-"))
    model = Andromeda.from_run(run, device=device, dtype=dtype, ema=average, step=number)
    return LoadedModel(run, RunDir(run).config(), model, number, weights_sha256(path, "average" if average else "model"), average)


def file_sha256(path: Path) -> str:
    """sha256 of a file, as `sha256sum` prints it. Raises RequestError when it cannot be read."""
    try:
        with open_regular(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except MalformedFile as error:
        raise RequestError(f"{os.fspath(path)} {error}: give a file.") from None
    except OSError as error:
        raise RequestError(f"{os.fspath(path)} cannot be read ({error.strerror}): give a file that exists.") from None
