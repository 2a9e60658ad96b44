"""Parts that a configuration names by `package.module:Class`, and the keys that belong to them alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from andromeda.config.base import BaseConfig
from andromeda.config.derived import mixer_name
from andromeda.config.model import FULL, MIXERS, AttentionOverrides, HeadTable, ModelConfig, PartConfig
from andromeda.config.own_code import CodeNotAllowed, find_class, is_allowed
from andromeda.config.run import RunConfig
from andromeda.config.train import OPTIMIZERS
from andromeda.config.validation_errors import validate
from andromeda.utils.errors import ConfigError


class OwnPart(NamedTuple):
    """A class of a user's own, and its own keys as its `Config` reads them; None where it has no `Config`."""

    kind: Any
    config: BaseConfig | None

    def build(self, *args: Any) -> Any:
        """`Class(*args)`, or `Class(*args, config)` for a class with a `Config`."""
        return self.kind(*args) if self.config is None else self.kind(*args, self.config)


class Mixer(NamedTuple):
    """The token mixer of one layer."""

    name: str
    model: ModelConfig
    """The model's configuration as this layer sees it: a table of a registered kind changes keys of `attention`."""
    part: OwnPart

    def build(self, layer: int) -> Any:
        """The module for layer number `layer`."""
        return self.part.build(self.model, layer)


def find_part(path: str, own: Mapping[str, Any], table: str, key: str) -> OwnPart:
    """The class that `path` names under `key`, with the keys `own` of the table at the dotted path `table`.

    Raises ConfigError, one sentence: the class is missing, or its `Config` does not accept the keys.
    """
    kind = find_class(path, key)
    config = getattr(kind, "Config", None)
    if config is not None:
        return OwnPart(kind, validate(config, own, table))
    if own:
        raise ConfigError(f"there is no key {table}.{next(iter(own))}: {path} has no `Config` with keys of its own.")
    return OwnPart(kind, None)


def qk_norm_name(model: ModelConfig) -> str:
    """Name of the QK norm: a registered one, or `package.module:Class`."""
    norm = model.attention.qk_norm
    return norm.kind if isinstance(norm, PartConfig) else norm


def own_qk_norm(model: ModelConfig) -> OwnPart | None:
    """The user's own QK norm, None for a registered one. Raises ConfigError."""
    norm, key = model.attention.qk_norm, "model.attention.qk_norm"
    if ":" not in qk_norm_name(model):
        return None
    return find_part(norm.kind, norm.own, key, f"{key}.kind") if isinstance(norm, PartConfig) else find_part(norm, {}, key, key)


def own_value_embedding(model: ModelConfig) -> OwnPart | None:
    """The user's own value embedding, None for a registered one. Raises ConfigError."""
    table = model.value_embedding
    return find_part(table.kind, table.own, "model.value_embedding", "model.value_embedding.kind") if ":" in table.kind else None


def own_head(name: str, table: HeadTable) -> OwnPart:
    """The user's own head that a table of `model.task_heads` names. Raises ConfigError."""
    return find_part(table.kind, table.own, f"model.task_heads.{name}", f"model.task_heads.{name}.kind")


def mixer_of(model: ModelConfig, layer: int) -> Mixer:
    """The token mixer of layer number `layer`. Raises ConfigError."""
    return named_mixer(model, mixer_name(model, layer))


def named_mixer(model: ModelConfig, name: str) -> Mixer:
    """The token mixer that `model.layers` calls `name`. Raises ConfigError."""
    if name in FULL:
        kind = model.attention.mixer
        return Mixer(name, model, find_part(MIXERS.get(kind, kind), {}, "model.attention", "model.attention.mixer"))
    table, path = model.mixers[name], f"model.mixers.{name}"
    if table.kind in MIXERS:
        changed = with_overrides(model, name)
        return Mixer(name, changed, OwnPart(find_class(MIXERS[table.kind], f"{path}.kind"), None))
    return Mixer(name, model, find_part(table.kind, table.own, path, f"{path}.kind"))


def with_overrides(model: ModelConfig, name: str) -> ModelConfig:
    """The model with the keys of `[model.mixers.NAME]`, whose kind is a registered one, in place of those of `[model.attention]`."""
    table = model.mixers[name]
    given = validate(AttentionOverrides, table.own, f"model.mixers.{name}")
    changes = {key: getattr(given, key) for key in given.model_fields_set}
    if "sliding_window" in changes:
        changes["full_attention_interval"] = 0
    return model.model_copy(update={"attention": model.attention.model_copy(update={"mixer": table.kind, **changes})})


def check_own_parts(model: ModelConfig) -> None:
    """Import every part of a user's own that the model uses, and check its keys and whether it goes with the rest of the model.

    Nothing is imported for registered parts. Raises ConfigError, one sentence.
    """
    parts = [own_qk_norm(model), own_value_embedding(model)]
    for name in used_mixers(model):
        kind = model.attention.mixer if name in FULL else model.mixers[name].kind
        parts.append(named_mixer(model, name).part if ":" in kind else None)
    parts += [own_head(name, table) for name, table in model.task_heads.items() if ":" in table.kind]
    for part in parts:
        reason = part and getattr(part.kind, "unsupported_reason", None)
        if part and reason and (clause := reason(model, part.config)):
            raise ConfigError(f"{clause.rstrip('.')}.")


def own_classes(config: ModelConfig | RunConfig) -> dict[str, str]:
    """Paths of the classes of a user's own that building this configuration imports, by the key that names each."""
    model = config.model if isinstance(config, RunConfig) else config
    named = {
        "model.embedding.provider": model.embedding.provider if model.embedding.kind == "custom" else "",
        "model.attention.qk_norm": qk_norm_name(model),
        "model.value_embedding.kind": model.value_embedding.kind,
    }
    for name in used_mixers(model):
        if name in FULL:
            named["model.attention.mixer"] = model.attention.mixer
        elif name in model.mixers:
            named[f"model.mixers.{name}.kind"] = model.mixers[name].kind
    named |= {f"model.task_heads.{name}.kind": table.kind for name, table in model.task_heads.items()}
    if isinstance(config, RunConfig) and config.train.optim.kind not in OPTIMIZERS:
        named["train.optim.kind"] = config.train.optim.kind
    return {key: path for key, path in named.items() if ":" in path}


def check_code_allowed(config: ModelConfig | RunConfig) -> None:
    """Raise CodeNotAllowed where building this configuration would import a class that nobody consented to; imports nothing."""
    for key, path in own_classes(config).items():
        if not is_allowed(path):
            raise CodeNotAllowed(path, key)


def used_mixers(model: ModelConfig) -> list[str]:
    """Names of the token mixers of the model's layers, each once."""
    return list(dict.fromkeys(mixer_name(model, layer) for layer in range(min(model.num_layers, len(model.layers) or 1))))
