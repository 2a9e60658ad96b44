"""Reading a configuration: from a preset, a TOML file or a run folder, with overrides; and writing it back.

A layer is what one source sets. The preset comes first, the file's own keys change it, overrides change both. Every
layer may use the flat names (aliases.py) in its [model] table. What comes out is typed, and its parts fit together.

Three things are settled here, so that every command and the run folder hold the same numbers: a vocabulary size that only
a preset gives is replaced by the corpus's, keys of heads that are left open become those of the corpus's targets, and
warm-up and cooldown given as fractions become steps.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import tomli_w

from andromeda.config.aliases import FLAT_NAMES, HUGGING_FACE_NAMES, SPEC_NAMES, resolve_aliases
from andromeda.config.corpus_targets import with_corpus_targets
from andromeda.config.keys import fields, format_value, is_text, merge, nested_config, set_path
from andromeda.config.model import ModelConfig
from andromeda.config.rules import check, check_model, schedule_in_steps
from andromeda.config.run import RunConfig
from andromeda.config.validation_errors import check_magnitude, validate
from andromeda.config.vocabulary import VOCAB_SIZE_NAMES, corpus_vocab_size, padded
from andromeda.utils.errors import ConfigError, nearest
from andromeda.utils.untrusted import MalformedFile, parse_toml, read_text

Values = Mapping[str, Any]
MAX_BYTES = 1 << 20
"""Of a configuration file; a whole one has 8 KiB."""


class ConfigLayer(NamedTuple):
    """What one source sets."""

    values: Values
    is_preset: bool = False


def load(source: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration that `source` names, changed by `overrides` and checked.

    source: name of a preset, path of a TOML file, or a run folder (its config.toml). overrides: `key.path=value` each,
    the value as in TOML; a word without quotes is text, and the last of several for one key counts.
    Raises ConfigError, one sentence.
    """
    source = str(source)
    layers = [*_layers(_read(source), source, is_preset=source in presets()), ConfigLayer(_override_values(overrides))]
    return _checked(layers)


def check_overrides(source: str | Path, overrides: Sequence[str]) -> None:
    """Raise ConfigError for an override of `source` whose key does not exist or whose value has the wrong type or range.

    Whether the parts fit together is not checked, for a command that changes more of them (`andromeda extend`).
    """
    _change(load(source), _override_values(overrides))


def from_values(values: Values) -> RunConfig:
    """The configuration that nested values (as from TOML or JSON) describe, checked; they may start from a `preset`."""
    return _checked([*_layers(values, "the values")])


def model_from_names(**names: Any) -> ModelConfig:
    """The model of `Andromeda(**names)`: the spec's names, Hugging Face's names and the keys of ModelConfig.

    What is not given comes from preset `andromeda`; from `andromeda-65b` when only Hugging Face's names are used.
    """
    for name in names:
        if name not in FLAT_NAMES and name not in ModelConfig.model_fields:
            raise ConfigError(f"Andromeda has no parameter {name}{nearest(name, [*FLAT_NAMES, *ModelConfig.model_fields])}.")
    check_magnitude(names)
    only_hugging_face = names.keys() & HUGGING_FACE_NAMES and not names.keys() & SPEC_NAMES
    base = load("andromeda-65b" if only_hugging_face else "andromeda").model
    values, given_names = resolve_aliases(names, base, prefix="")
    model = validate(ModelConfig, merge(base.model_dump(), values), "model", given_names)
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


def _checked(layers: Sequence[ConfigLayer]) -> RunConfig:
    config = RunConfig()
    for layer in layers:
        config = _change(config, layer.values)
    if not any(_sets_vocab_size(layer.values) for layer in layers if not layer.is_preset):
        config = _with_vocabulary_of_corpus(config)
    config = with_corpus_targets(config)
    check(config)
    return schedule_in_steps(config)


def _change(config: RunConfig, values: Values) -> RunConfig:
    """The configuration with one layer's values in the place of its own."""
    values = dict(values)
    given_names: Values = {}
    check_magnitude(values)
    if isinstance(values.get("model"), Mapping):
        values["model"], given_names = resolve_aliases(values["model"], config.model)
    return validate(RunConfig, merge(config.model_dump(), values), given_names=given_names)


def _sets_vocab_size(values: Values) -> bool:
    model = values.get("model")
    return isinstance(model, Mapping) and not model.keys().isdisjoint(VOCAB_SIZE_NAMES)


def _with_vocabulary_of_corpus(config: RunConfig) -> RunConfig:
    """The configuration with the vocabulary size of its corpus, padded as its preset's is; unchanged where no corpus gives one."""
    entries = corpus_vocab_size(config.data)
    if entries is None:
        return config
    return validate(RunConfig, merge(config.model_dump(), {"model": {"vocab_size": padded(entries, config.model.vocab_size)}}))


def _layers(values: Values, source: str, is_preset: bool = False) -> Iterator[ConfigLayer]:
    """The layers of a file: those of the preset that it starts from, then its own values."""
    own = dict(values)
    name = own.pop("preset", None)
    if name is not None:
        if not isinstance(name, str) or name not in presets():
            raise ConfigError(f"{source} starts from preset {format_value(name)}, which does not exist{_hint(str(name))}.")
        yield from _layers(_preset(name), name, is_preset=True)
    yield ConfigLayer(own, is_preset)


def _hint(name: str) -> str:
    return nearest(name, presets()) or f"; the presets are {', '.join(presets())}"


def _preset(name: str) -> Values:
    return tomllib.loads(files("andromeda.config").joinpath("presets", f"{name}.toml").read_text("utf-8"))


def _read(source: str) -> Values:
    if source in presets():
        return _preset(source)
    try:
        path = _file(source)
        return parse_toml(read_text(path, MAX_BYTES))
    except OSError as error:
        raise ConfigError(f"{source[:200]} cannot be read ({error.strerror}).") from None
    except MalformedFile as error:
        raise ConfigError(f"{path} {error}.") from None


def _file(source: str) -> Path:
    """The TOML file at a path, or in a run folder."""
    path = Path(source)
    if source and path.is_dir():
        path = path / "config.toml"
        if not path.is_file():
            raise ConfigError(f"{source} is not a run folder: it holds no config.toml.")
    if not path.is_file():
        raise ConfigError(f"There is no preset and no file {source!r}{_hint(source)}.")
    return path


def _override_values(overrides: Sequence[str]) -> Values:
    """Command-line overrides as nested values."""
    values: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        key = key.strip()
        if not equals or not all(key.split(".")):
            raise ConfigError(f"{override!r} is not an override: write key.path=value, such as train.steps=100.")
        if key == "preset":
            raise ConfigError("preset cannot be overridden: name the preset as the configuration itself.")
        value = _value(key, text.strip())
        if value == {} and key in fields() and nested_config(fields()[key]):
            raise ConfigError(f"{key}={{}} sets nothing: write the keys inside it, such as {key}.name=value.")
        set_path(values, key, value)
    return values


def _value(key: str, text: str) -> Any:
    """A value parsed as TOML. Text needs no quotes where the key holds text, or where it is not valid TOML."""
    if is_text(key) and not text.startswith(('"', "'")):
        return text
    try:
        values = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        # TOML requires a digit on both sides of the point.
        return float(text) if re.fullmatch(r"[+-]?(\d+\.|\.\d+)(e[+-]?\d+)?", text) else text
    return values["value"] if values.keys() == {"value"} else text
