"""Reading a configuration: from a preset, a TOML file or a run folder, with overrides; and writing it back.

A layer is what one source says. The preset comes first, the file's own keys change it, overrides change both. Every
layer may use the flat names (names.py) in its [model] table. What comes out is typed, and its parts fit together.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import tomli_w

from andromeda.config.aliases import HUGGING_FACE_NAMES, NAMES, SPEC_NAMES, translate
from andromeda.config.keys import is_text, merge, place, show
from andromeda.config.mistakes import read, refuse_huge
from andromeda.config.model import ModelConfig
from andromeda.config.rules import check, check_model
from andromeda.config.run import RunConfig
from andromeda.utils.errors import ConfigError, nearest

Values = Mapping[str, Any]


def load(source: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration that `source` names, changed by `overrides` and checked.

    source: name of a preset, path of a TOML file, or a run folder (its config.toml). overrides: `key.path=value` each,
    the value as in TOML; a word without quotes is text, and the last of several for one key counts.
    Raises ConfigError, one sentence.
    """
    source = str(source)
    return _checked([*_layers(_read(source), source), _override_values(overrides)])


def from_values(values: Values) -> RunConfig:
    """The configuration that nested values (as from TOML or JSON) describe, checked; they may start from a `preset`."""
    return _checked([*_layers(values, "the values")])


def model_from_names(**names: Any) -> ModelConfig:
    """The model of `Andromeda(**names)`: the spec's names, Hugging Face's names and the keys of ModelConfig.

    What is not given comes from preset `andromeda`; from `andromeda-65b` when only Hugging Face's names are used.
    """
    for name in names:
        if name not in NAMES and name not in ModelConfig.model_fields:
            raise ConfigError(f"Andromeda has no parameter {name}{nearest(name, [*NAMES, *ModelConfig.model_fields])}.")
    refuse_huge(names)
    only_hugging_face = names.keys() & HUGGING_FACE_NAMES and not names.keys() & SPEC_NAMES
    base = load("andromeda-65b" if only_hugging_face else "andromeda").model
    values, spelled = translate(names, base, prefix="")
    model = read(ModelConfig, merge(base.model_dump(), values), "model", spelled)
    check_model(model)
    return model


def dumps(config: RunConfig) -> str:
    """The configuration as TOML with every key, which `load` reads back as an equal value."""
    return tomli_w.dumps(config.model_dump())


@cache
def presets() -> dict[str, str]:
    """Each preset's name with one line about it (the first comment of its file)."""
    folder = files("andromeda.config").joinpath("presets").iterdir()
    named = {file.name.removesuffix(".toml"): file for file in folder if file.name.endswith(".toml")}
    return {name: named[name].read_text("utf-8").partition("\n")[0].lstrip("# ").strip() for name in sorted(named)}


def _checked(layers: Sequence[Values]) -> RunConfig:
    config = RunConfig()
    for layer in layers:
        config = _change(config, layer)
    check(config)
    return config


def _change(config: RunConfig, layer: Values) -> RunConfig:
    """The configuration with one layer's keys in the place of its own."""
    layer = dict(layer)
    spelled: Values = {}
    refuse_huge(layer)
    if isinstance(layer.get("model"), Mapping):
        layer["model"], spelled = translate(layer["model"], config.model)
    return read(RunConfig, merge(config.model_dump(), layer), spelled=spelled)


def _layers(values: Values, source: str) -> Iterator[Values]:
    """The layers that a file's values stand for: those of the preset that it names, then its own."""
    own = dict(values)
    name = own.pop("preset", None)
    if name is not None:
        if not isinstance(name, str) or name not in presets():
            raise ConfigError(f"{source} starts from preset {show(name)}, which does not exist{_hint(str(name))}.")
        yield from _layers(_preset(name), name)
    yield own


def _hint(name: str) -> str:
    return nearest(name, presets()) or f"; the presets are {', '.join(presets())}"


def _preset(name: str) -> Values:
    return tomllib.loads(files("andromeda.config").joinpath("presets", f"{name}.toml").read_text("utf-8"))


def _read(source: str) -> Values:
    if source in presets():
        return _preset(source)
    try:
        path = _file(source)
        return tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"{source[:200]} cannot be read ({error.strerror}).") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not a text file in UTF-8.") from None
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, tables in tables without end: not only TOML's own error
        raise ConfigError(f"{path} is not valid TOML: {str(error)[:1].lower()}{str(error)[1:]}.") from None


def _file(source: str) -> Path:
    """The TOML file that a path which is no preset's name means."""
    path = Path(source)
    if source and path.is_dir():
        path = path / "config.toml"
        if not path.is_file():
            raise ConfigError(f"{source} is not a run folder: it holds no config.toml.")
    if not path.is_file():
        raise ConfigError(f"There is no preset and no file {source!r}{_hint(source)}.")
    return path


def _override_values(overrides: Sequence[str]) -> Values:
    """The layer that command-line overrides stand for."""
    values: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        key = key.strip()
        if not equals or not all(key.split(".")):
            raise ConfigError(f"{override!r} is not an override: write key.path=value, such as train.steps=100.")
        if key == "preset":
            raise ConfigError("preset cannot be overridden: name the preset as the configuration itself.")
        place(values, key, _value(key, text.strip()))
    return values


def _value(key: str, text: str) -> Any:
    """A value as TOML reads it; text where the key holds text, or where TOML reads nothing, needs no quotes."""
    if is_text(key) and not text.startswith(('"', "'")):
        return text
    try:
        values = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        # TOML wants a digit on both sides of the point; shells and people do not.
        return float(text) if re.fullmatch(r"[+-]?(\d+\.|\.\d+)(e[+-]?\d+)?", text) else text
    return values["value"] if values.keys() == {"value"} else text
