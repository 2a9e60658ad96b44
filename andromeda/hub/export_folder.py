"""A model as a Hugging Face folder: weights, configuration, tokenizer, card, and one modeling file where transformers has no class."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from andromeda.config.model import ModelConfig
from andromeda.data.tokenizer import Tokenizer
from andromeda.hub.hub_config import llama_config, refuse_unknown_parts, remote_config
from andromeda.hub.parameter_names import COUNTERS, hub_name
from andromeda.hub.quantize import KINDS, quantize_tensors
from andromeda.hub.tokenizer_files import padding_id, tokenizer_files
from andromeda.model.head import HEADS
from andromeda.train.weights import read_weights
from andromeda.utils.errors import CheckpointError, ConfigError
from andromeda.utils.files import write_whole
from andromeda.utils.log import get_logger

log = get_logger()

SHARD_BYTES = 5 << 30
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
HEADS_FILE = "task_heads.safetensors"
"""Weights of further heads beside an exported model: outputs of NAME are x NAME.weight^T + NAME.bias of the last hidden states x."""
OWN_FILES = ("configuration_andromeda.py", "modeling_andromeda.py")


@dataclass(frozen=True)
class ExportedModel:
    """What goes into a folder: `config.json` without what depends on the tokenizer, and tensors by their names there."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    reason: str
    """Why it is no LlamaForCausalLM, in a few words; empty where it is one."""
    heads: dict[str, Tensor] = field(default_factory=dict)
    """Weights of heads besides the language model's, for which transformers' class has no place."""


def convert(config: ModelConfig, weights: Mapping[str, Tensor], quantization: str = "") -> ExportedModel:
    """A model of `config` with `weights` (by the run's names) for transformers. Raises ConfigError where a part has no form there.

    quantization: int8 or fp8, for matrices in 8 bits, which the modeling file alone reads.
    """
    heads = {name.removeprefix(HEADS): tensor.detach().cpu().contiguous() for name, tensor in weights.items() if name.startswith(HEADS)}
    if heads:
        log.warning(
            "the exported model is the language model alone; of its heads %s, a Hugging Face folder has the weights in %s",
            ", ".join(config.task_heads),
            HEADS_FILE,
        )
    config = config.model_copy(update={"task_heads": {}})
    refuse_unknown_parts(config)
    about: dict[str, Any] | str = f"its weights are in {quantization}" if quantization else llama_config(config)
    plain = isinstance(about, dict)
    tensors: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if COUNTERS.fullmatch(name) or name.startswith(HEADS) or (config.head.tied and name == "head.weight"):
            continue
        found = hub_name(name)
        if found is None:
            raise ConfigError(f"The parameter {name} has no place in the exported modeling file: export a model without it.")
        if plain and config.rotary.layout == "interleaved" and ".attention." in name and name.split(".")[-2] in ("query", "key"):
            tensor = halves(tensor, config.attention.head_dim)
        tensors[found] = tensor.detach().cpu().contiguous()
    if quantization:
        tensors = quantize_tensors(tensors, quantization)
    if isinstance(about, str):
        return ExportedModel(remote_config(config, quantization), tensors, about, heads)
    return ExportedModel(about, tensors, "", heads)


def halves(rows: Tensor, head_dim: int) -> Tensor:
    """Rows of a query or key projection (H D, ...) reordered from rotary pairs (2i, 2i + 1) to pairs (i, i + D/2)."""
    pairs: Tensor = rows.unflatten(0, (-1, head_dim // 2, 2))
    return pairs.transpose(1, 2).flatten(0, 2)


def write_folder(
    to: Path,
    exported: ExportedModel,
    tokenizer: Tokenizer | None,
    *,
    dtype: str = "fp32",
    card: str = "",
    chat_template: str = "",
    extra_config: Mapping[str, Any] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the folder `to`, which must not hold files yet. Raises CheckpointError, one sentence.

    dtype: of the weights. card: text of README.md. extra_config: further keys of config.json, such as a quantization.
    """
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise CheckpointError(f"{to} already holds files: export to a folder of its own.")
    temporary = to.with_name(f".{to.name}.new")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        config = exported.config | special_ids(tokenizer) | {"dtype": str(DTYPES[dtype]).removeprefix("torch.")} | dict(extra_config or {})
        write_json(temporary / "config.json", config)
        write_json(temporary / "generation_config.json", special_ids(tokenizer))
        if exported.reason:
            for name in OWN_FILES:
                write_whole(temporary / name, files("andromeda.hub").joinpath("transformers_files", name).read_bytes())
        if tokenizer:
            for name, content in tokenizer_files(tokenizer, config["max_position_embeddings"], chat_template).items():
                write_whole(temporary / name, content)
        if card:
            write_whole(temporary / "README.md", card.encode())
        write_tensors(temporary, {name: cast(tensor, DTYPES[dtype]) for name, tensor in exported.tensors.items()}, shard_bytes)
        if exported.heads:
            write_whole(temporary / HEADS_FILE, save({name: cast(tensor, DTYPES[dtype]) for name, tensor in exported.heads.items()}))
        if to.exists():
            to.rmdir()
        temporary.rename(to)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Weights in `dtype`; counts and quantized weights stay."""
    return tensor.to(dtype) if tensor.is_floating_point() and tensor.element_size() > 1 else tensor


def special_ids(tokenizer: Tokenizer | None) -> dict[str, int | None]:
    """The tokens that begin, end and fill up a text."""
    if tokenizer is None:
        return {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    return {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos, "pad_token_id": padding_id(tokenizer)}


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """A small file of JSON."""
    write_whole(path, (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode())


def write_tensors(folder: Path, tensors: Mapping[str, Tensor], shard_bytes: int) -> None:
    """One `model.safetensors`, or several of at most about `shard_bytes` with their index."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
        total = sum(tensor.nbytes for tensor in tensors.values())
        index = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": index})
    for file, shard in zip(names, shards, strict=True):
        write_whole(folder / file, save(shard, {"format": "pt"}))


def export_run(
    run: Path,
    to: Path,
    *,
    dtype: str = "fp32",
    step: int | None = None,
    average: bool = False,
    card: Callable[[bool], str] | None = None,
) -> ExportedModel:
    """Write the model of a run folder to `to`. card: text of README.md, given whether the folder holds a modeling file.

    Raises CheckpointError or ConfigError, one sentence.
    """
    config, weights = read_weights(run, average=average, step=step, warn=log.warning)
    exported = convert(config, weights, dtype if dtype in KINDS else "")
    kept = run / "tokenizer"
    tokenizer = Tokenizer.load(kept) if kept.exists() else None
    text = card(bool(exported.reason)) if card else ""
    template = tokenizer.chat_template if tokenizer else ""
    write_folder(to, exported, tokenizer, dtype="fp32" if dtype in KINDS else dtype, card=text, chat_template=template)
    return exported


def usage(to: Path, remote_code: bool) -> str:
    """The Python lines that load a folder."""
    code = ", trust_remote_code=True" if remote_code else ""
    return "\n".join(
        [
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f"tokenizer = AutoTokenizer.from_pretrained({to.name!r})",
            f"model = AutoModelForCausalLM.from_pretrained({to.name!r}{code})",
            'prompt = tokenizer("Once upon a time", return_tensors="pt")',
            "print(tokenizer.decode(model.generate(**prompt, max_new_tokens=100)[0]))",
        ]
    )


def push_command(folder: Path) -> str:
    """The one command that publishes a folder."""
    return f"hf upload YOUR_NAME/{shlex.quote(folder.resolve().name)} {shlex.quote(str(folder))}"
