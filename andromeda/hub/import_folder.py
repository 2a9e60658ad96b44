"""From a Hugging Face folder to a run folder, which generates, evaluates, explains, trains on and exports again."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from andromeda.config.load import from_values
from andromeda.config.model import ModelConfig
from andromeda.config.run import RunConfig
from andromeda.data.tokenizer import Tokenizer
from andromeda.hub.families import family_of
from andromeda.hub.hub_config import BY_LAYER, TABLES
from andromeda.hub.hub_folder import HubFolder, ModelSettings
from andromeda.hub.import_tokenizer import read_tokenizer
from andromeda.hub.parameter_names import COUNTERS, hub_name
from andromeda.model.meta_model import meta_model
from andromeda.train import checkpoint
from andromeda.train.memory_check import check_weights_fit
from andromeda.train.run_dir import RunDir
from andromeda.train.state import model_tensors
from andromeda.utils.errors import CheckpointError, ConfigError

CODE = re.compile(r"[^:]+:[^:]+")
"""How our configurations name a class of a user's own, package.module:Class."""


@dataclass(frozen=True)
class ImportedModel:
    """A model from elsewhere, in parts of ours."""

    config: ModelConfig
    weights: dict[str, Tensor]
    """By the run's names, in float32; buffers as they are kept."""
    tokenizer: Tokenizer | None
    notes: list[str]
    """What a user should know of what was read, one sentence each."""


def read_folder(path: str | Path, *, tokenizer: bool = True) -> ImportedModel:
    """The model of a Hugging Face folder. tokenizer: read that too, or else fail. Raises an AndromedaError, one sentence."""
    folder = HubFolder(path)
    values = folder.config()
    settings = ModelSettings(values)
    own = settings.text("model_type") == "andromeda"
    family = None if own else family_of(settings)
    found = own_values(values) if family is None else family.config(settings)
    config = checked(found)
    check_weights_fit(config, torch.device("cpu"))
    files = folder.weights()
    weights = placed(config, dict(files if family is None else family.tensors(files, found)))
    notes: list[str] = []
    read = read_tokenizer(folder, values, config.vocab_size, notes) if tokenizer else None
    return ImportedModel(config, weights, read, notes)


def own_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration in a folder that `andromeda export` wrote; nothing of its modeling file is read."""
    names = {"num_hidden_layers": "num_layers", "max_position_embeddings": "max_seq_len"}
    code = next((word for word in words_of(values) if CODE.fullmatch(word)), None)
    if code is not None:
        raise ConfigError(f"config.json names code of its own ({code[:80]}), which is never run here: import another model.")
    return {names.get(name, name): values[name] for name in (*TABLES, *BY_LAYER, "vocab_size", "hidden_size", *names) if name in values}


def words_of(values: Any) -> Iterator[str]:
    """All words of a JSON value, except those of `auto_map`, which nothing here reads."""
    if isinstance(values, str):
        yield values
    elif isinstance(values, Mapping):
        for name, value in values.items():
            if name != "auto_map":
                yield from words_of(value)
    elif isinstance(values, list):
        for value in values:
            yield from words_of(value)


def checked(model: Mapping[str, Any]) -> ModelConfig:
    """The typed configuration. Raises ConfigError in the words of our keys."""
    return from_values({"model": dict(model), "train": {"seq_len": 1}}).model


def placed(config: ModelConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by the run's names, all there and of the right shapes. Raises CheckpointError."""
    weights: dict[str, Tensor] = {}
    for name, empty in model_tensors(meta_model(config)).items():
        if COUNTERS.fullmatch(name):
            weights[name] = torch.zeros(empty.shape, dtype=empty.dtype)
            continue
        there = hub_name(name)
        tensor = tensors.pop(there, None) if there else None
        if tensor is None and name.endswith("router.votes"):
            tensor = torch.zeros(empty.shape, dtype=empty.dtype)
        if tensor is None:
            raise CheckpointError(f"The weights hold no {there}: fetch the folder again.")
        if tensor.shape != empty.shape:
            raise CheckpointError(
                f"{there} has the shape {tuple(tensor.shape)}, and config.json asks for {tuple(empty.shape)}: fetch the folder again."
            )
        weights[name] = tensor.to(empty.dtype).contiguous()
    if tensors:
        more = f" and {len(tensors) - 1} more" if len(tensors) > 1 else ""
        raise CheckpointError(f"The weights hold {min(tensors)}{more}, for which the model has no place: fetch the folder again.")
    return weights


def write_run(imported: ImportedModel, out: str | Path) -> Path:
    """Write a new run folder. Raises CheckpointError when there is one already."""
    folder = RunDir(out)
    if folder.exists:
        raise CheckpointError(f"{out} already holds a run: import to another folder.")
    folder.refuse_foreign_files()
    folder.create()
    checkpoint.save(folder.checkpoints, checkpoint.Snapshot(0, {"model": imported.weights}, {"healthy": True}))
    if imported.tokenizer:
        imported.tokenizer.save(folder.path / "tokenizer")
    # Last, because it makes the folder a run.
    folder.write_config(RunConfig(name=folder.path.name or "model", model=imported.config))
    return folder.path
