"""A Hugging Face folder from a stranger, opened as data: JSON within limits, safetensors, no code, no pickle, no link that leads out."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from andromeda.utils.errors import CheckpointError, ConfigError
from andromeda.utils.untrusted import MalformedFile, open_regular, parse_json, read_json_object

SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,200}\.safetensors")
MOST_SHARDS = 1000
MAX_HEADER = 64 << 20
"""Bytes of a safetensors header; a model of a million tensors stays below."""
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I64": torch.int64}
"""Types of tensors that are read; I64 counts a router's votes."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5")


class HubFolder:
    """Files of a folder, each checked when it is opened. Raises CheckpointError or ConfigError, one sentence."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise CheckpointError(
                f"{path} is no folder: fetch the model first, with `hf download NAME --local-dir {self.path.name or 'DIR'}`."
            )
        self.root = self.path.resolve()

    def file(self, name: str) -> Path:
        """A file of the folder. Raises where it is missing, or a link that leads out of the folder."""
        path = self.path / name
        if not path.exists():
            raise CheckpointError(f"{path} is missing: fetch the folder again.")
        if not path.resolve().is_relative_to(self.root):
            raise CheckpointError(f"{path} is a link that leads out of the folder: copy the files themselves (`cp -rL`).")
        return path

    def has(self, name: str) -> bool:
        """Whether there is a file of that name."""
        return (self.path / name).exists()

    def json(self, name: str) -> dict[str, Any]:
        """A file that holds a JSON object."""
        path = self.file(name)
        try:
            return read_json_object(path)
        except MalformedFile as error:
            raise CheckpointError(f"{path} {error}: fetch the folder again.") from None
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read ({error.strerror}): fetch the folder again.") from None

    def config(self) -> dict[str, Any]:
        """`config.json`, of a model without code of its own and without quantized weights."""
        if not self.has("config.json"):
            raise CheckpointError(f"{self.path} is no Hugging Face folder (it holds no config.json): give the folder of one model.")
        values = self.json("config.json")
        if values.get("auto_map") and values.get("model_type") != "andromeda":
            raise ConfigError(
                f"{self.path} needs code of its own (auto_map in config.json), which is never run here: import another model."
            )
        if values.get("quantization_config") is not None:
            raise ConfigError(
                f"{self.path} holds quantized weights (quantization_config in config.json): import the model they were made from."
            )
        return values

    def weights(self) -> TensorFiles:
        """The tensors of model.safetensors or of the shards that its index names."""
        if self.has("model.safetensors"):
            return TensorFiles(self, {None: "model.safetensors"})
        if self.has("model.safetensors.index.json"):
            return TensorFiles(self, self._index())
        pickles = sorted(path.name for path in self.path.iterdir() if path.suffix in PICKLES)
        if pickles:
            raise CheckpointError(
                f"{self.path} holds its weights as {pickles[0]}, which may run code when it is opened: convert it to safetensors first."
            )
        raise CheckpointError(f"{self.path} holds no weights (no model.safetensors and no index of shards): fetch it again.")

    def _index(self) -> dict[str | None, str]:
        found = self.json("model.safetensors.index.json").get("weight_map")
        path = self.path / "model.safetensors.index.json"
        if not isinstance(found, dict) or not found:
            raise CheckpointError(f"{path} has no weight_map that names the file of each tensor: fetch it again.")
        for name, file in found.items():
            if not isinstance(file, str) or not SHARD_NAME.fullmatch(file):
                raise CheckpointError(
                    f"{path} says that {name} lies in {file!r}, which is no safetensors file of this folder: fetch it again."
                )
        if len(set(found.values())) > MOST_SHARDS:
            raise CheckpointError(f"{path} names {len(set(found.values())):,} files, more than {MOST_SHARDS:,}: fetch it again.")
        return dict(found)


class TensorFiles(Mapping[str, Tensor]):
    """Tensors by name, each read from its file when it is asked for."""

    def __init__(self, folder: HubFolder, index: Mapping[str | None, str]) -> None:
        """index: file of each tensor; under None, a file all of whose tensors count."""
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._file: dict[str, Path] = {}
        for name in sorted(set(index.values())):
            path = folder.file(name)
            for tensor, about in read_header(path).items():
                if None in index or index.get(tensor) == name:
                    self._shapes[tensor], self._file[tensor] = shape_of(path, tensor, about), path
        missing = sorted(str(name) for name in index if name is not None and name not in self._file)
        if missing:
            raise CheckpointError(
                f"{folder.path / index[missing[0]]} does not hold {missing[0]}, which the index places there: fetch it again."
            )

    def __iter__(self) -> Iterator[str]:
        return iter(self._file)

    def __len__(self) -> int:
        return len(self._file)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from its file's header."""
        return self._shapes[name]

    def __getitem__(self, name: str) -> Tensor:
        path = self._file[name]
        try:
            with safe_open(path, framework="pt") as file:
                tensor: Tensor = file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be read ({error}): fetch it again.") from None
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{name} in {path} holds numbers that are not finite: fetch it again.")
        return tensor


def read_header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file, checked before the library opens it: sizes that fit the file, JSON of bounded size and depth."""
    damaged = f"{path} is no intact safetensors file"
    try:
        with open_regular(path) as file:
            size = path.stat().st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise CheckpointError(f"{damaged} (it ends before its header of {length:,} bytes): fetch it again.")
            if length > MAX_HEADER:
                raise CheckpointError(f"{damaged} (a header of {length:,} bytes): fetch it again.")
            header = parse_json(file.read(length))
        with safe_open(path, framework="pt") as _:
            pass
    except MalformedFile as error:
        raise CheckpointError(f"{damaged} (it {error}): fetch it again.") from None
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{damaged} ({error}): fetch it again.") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{damaged} (its header is no table): fetch it again.")
    return {name: about for name, about in header.items() if name != "__metadata__"}


def shape_of(path: Path, name: str, about: Any) -> tuple[int, ...]:
    """Shape of a tensor by its header entry. Raises where its type is none that is read."""
    kind, shape = about.get("dtype"), about.get("shape")
    if kind not in DTYPES:
        raise CheckpointError(f"{name} in {path} is of type {kind}: only {', '.join(DTYPES)} are read, so import unquantized weights.")
    return tuple(shape)


class ModelSettings:
    """Keys of a config.json, each read as the type that it must have. Raises ConfigError, one sentence."""

    def __init__(self, values: Mapping[str, Any], place: str = "config.json") -> None:
        self._values, self._place = values, place

    def has(self, name: str) -> bool:
        """Whether a key is there and not null."""
        return self._values.get(name) is not None

    def _get(self, name: str, default: Any) -> Any:
        value = self._values.get(name)
        value = default if value is None else value
        if value is None:
            raise ConfigError(f"{self._place} has no {name}: fetch it again.")
        return value

    def count(self, name: str, default: int | None = None) -> int:
        """A whole number of at least 1."""
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.wrong(name, value, "a whole number above 0")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number."""
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.wrong(name, value, "a number")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise self.wrong(name, value, "true or false")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        """A word."""
        value = self._get(name, default)
        if not isinstance(value, str):
            raise self.wrong(name, value, "a word")
        return value

    def words(self, name: str) -> list[str]:
        """A list of words; empty where the key is missing."""
        value = self._values.get(name) or []
        if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
            raise self.wrong(name, value, "a list of words")
        return value

    def table(self, name: str) -> ModelSettings:
        """A nested table; empty where the key is missing."""
        value = self._values.get(name) or {}
        if not isinstance(value, dict):
            raise self.wrong(name, value, "a table")
        return ModelSettings(value, f"{self._place}: {name}")

    def refuse(self, name: str, harmless: Any, why: str) -> None:
        """Refuse a setting that has no part here, unless it is missing or `harmless`."""
        value = self._values.get(name)
        if value is not None and value != harmless:
            raise ConfigError(f"{self._place}: {name} = {json.dumps(value)[:80]} has no form here ({why}): import another model.")

    def wrong(self, name: str, value: Any, wanted: str) -> ConfigError:
        """The sentence for a value of the wrong kind."""
        return ConfigError(f"{self._place}: {name} must be {wanted}, not {json.dumps(value)[:80]}.")
