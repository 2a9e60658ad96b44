"""The flat names that users know, translated to the keys of `ModelConfig`.

Two families: the names of the spec (those of x-transformers: dim, dim_head, alibi_num_heads, ...) and those of Hugging
Face's configurations (hidden_size, num_attention_heads, ...). Both may stand in a TOML file's [model] table and in
`Andromeda(...)`, next to the structured keys; two that give one key different values are an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from andromeda.config.base import BaseConfig
from andromeda.config.keys import flatten, format_value, set_path
from andromeda.config.model import ModelConfig
from andromeda.utils.errors import ConfigError, nearest

Assignments = Iterator[tuple[str, Any]]
"""Pairs of a dotted path below `model` and its value."""
FlatNames = Mapping[str, Any]
"""Flat names as the user gave them."""

SPEC_DIRECT = {
    "num_tokens": "vocab_size",
    "max_seq_len": "max_seq_len",
    "dim": "hidden_size",
    "depth": "num_layers",
    "dim_head": "attention.head_dim",
    "heads": "attention.num_heads",
    "use_abs_pos_emb": "embedding.absolute",
}
HUGGING_FACE_DIRECT = {
    "max_position_embeddings": "max_seq_len",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "attention.num_heads",
    "num_key_value_heads": "attention.num_kv_heads",
    "head_dim": "attention.head_dim",
    "intermediate_size": "feedforward.intermediate_size",
    "mlp_bias": "feedforward.bias",
    "attention_bias": "attention.bias",
    "rotary_emb_fraction": "rotary.fraction",
    "rope_theta": "rotary.theta",
    "layer_norm_eps": "block.eps",
    "rms_norm_eps": "block.eps",
    "tie_word_embeddings": "head.tied",
}
DIRECT = SPEC_DIRECT | HUGGING_FACE_DIRECT

ACTIVATIONS = {
    **{kind: kind for kind in ("gelu", "gelu_tanh", "relu", "relu2", "swiglu", "geglu", "geglu_tanh", "reglu", "moe")},
    # In the Hugging Face configurations that use these names, silu is the gate of a gated network.
    "silu": "swiglu",
    "swish": "swiglu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu_ungated": "silu",
}
PROVIDERS: dict[str, dict[str, Any]] = {
    "plain": {"embedding.kind": "plain"},
    "AndromedaEmbedding": {"embedding.kind": "plain"},
    "tied": {"embedding.kind": "plain", "head.tied": True},
    "factorized": {"embedding.kind": "factorized"},
    "factorised": {"embedding.kind": "factorized"},
    "value": {"embedding.kind": "plain", "value_embedding.kind": "layered"},
}
"""Embeddings of Andromeda's own, by the name that `embedding_provider` takes."""


class AliasResolver:
    """Collects what a [model] table sets, key by key; two names that give one key different values are refused."""

    def __init__(self, base: ModelConfig, prefix: str) -> None:
        self.base, self.prefix = flatten(base.model_dump()), prefix
        self.values: dict[str, Any] = {}
        self.given_names: dict[str, str] = {}

    def get(self, path: str) -> Any:
        """The value at a path: as set so far, else the base's."""
        return self.values.get(path, self.base[path])

    def assign(self, path: str, value: Any, name: str) -> None:
        """Set a key under the name that the user gave it."""
        name = self.prefix + name
        if path in self.values and self.values[path] != value:
            raise ConfigError(
                f"{self.given_names[path]} and {name} set model.{path} to different values "
                f"({format_value(self.values[path])} and {format_value(value)}): keep one of them."
            )
        self.values[path] = value
        self.given_names[path] = name

    def assign_default(self, path: str, value: Any) -> None:
        """Set a key that follows from another, unless it is set already."""
        self.values.setdefault(path, value)


def _flag(given: FlatNames, name: str, default: bool) -> bool:
    value = given.get(name, default)
    if not isinstance(value, bool):
        raise ConfigError(f"{name} must be true or false, not {format_value(value)}.")
    return value


def _count(given: FlatNames, name: str) -> int:
    value = given[name]
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ConfigError(f"{name} must be a whole number of at least 0, not {format_value(value)}.")
    return value


def _alibi(given: FlatNames, model: AliasResolver) -> Assignments:
    """alibi_num_heads is 12 unless given, and at most half of the heads, so that both kinds of head exist."""
    if not _flag(given, "alibi_pos_bias", True):
        yield "alibi.num_heads", 0
    elif "alibi_num_heads" in given:
        yield "alibi.num_heads", _count(given, "alibi_num_heads")
    elif not model.values.get("alibi.num_heads"):
        yield "alibi.num_heads", _half(model, 12)


def _half(model: AliasResolver, most: int) -> int:
    heads = model.get("attention.num_heads")
    return min(most, max(heads // 2, 1)) if isinstance(heads, int) else most


def _rotary(given: FlatNames, model: AliasResolver) -> Assignments:
    """As in x-transformers, rotary_xpos switches the rotation on; without it only rotary_pos_emb does."""
    alone = "rotary_xpos" not in given
    on = _flag(given, "rotary_pos_emb", False)
    xpos = on and model.get("rotary.kind") == "xpos" if alone else _flag(given, "rotary_xpos", True)
    yield "rotary.kind", "xpos" if xpos else "rope" if on else "none"


def _flash(given: FlatNames, model: AliasResolver) -> Assignments:
    for name in given:
        yield "attention.backend", "auto" if _flag(given, name, True) else "eager"


def _shift(given: FlatNames, model: AliasResolver) -> Assignments:
    tokens = _count(given, "shift_tokens")
    yield "shift.kind", "chunks" if tokens else "none"
    if tokens:
        yield "shift.tokens", tokens


def _one_kv_head(given: FlatNames, model: AliasResolver) -> Assignments:
    yield "attention.num_kv_heads", 1 if _flag(given, "attn_one_kv_head", True) else model.get("attention.num_heads")


def _qk_norm(given: FlatNames, model: AliasResolver) -> Assignments:
    """qk_norm and attn_qk_norm are one switch, attn_qk_norm_dim_scale adds the learned scale; all are on unless given."""
    switches = {name: _flag(given, name, True) for name in ("qk_norm", "attn_qk_norm") if name in given}
    if len(set(switches.values())) > 1:
        raise ConfigError("qk_norm and attn_qk_norm have different values: give one of them, or both the same value.")
    on, scaled = all(switches.values()), _flag(given, "attn_qk_norm_dim_scale", True)
    if not on and given.get("attn_qk_norm_dim_scale"):
        raise ConfigError("attn_qk_norm_dim_scale = true has nothing to scale while the QK norm is off: set attn_qk_norm = true.")
    yield "attention.qk_norm", ("l2_dim_scale" if scaled else "l2") if on else "none"


def _provider(given: FlatNames, model: AliasResolver) -> Assignments:
    provider = given["embedding_provider"]
    if isinstance(provider, str) and ":" not in provider:
        if provider not in PROVIDERS:
            known = ", ".join(PROVIDERS)
            raise ConfigError(
                f"embedding_provider = {provider!r} is not known{nearest(provider, PROVIDERS)}: "
                f"give one of {known}, a class, or its path as package.module:Class."
            )
        yield from PROVIDERS[provider].items()
        return
    if not isinstance(provider, str):
        if not callable(provider):
            raise ConfigError(f"embedding_provider must be a name, a class or a module, not {format_value(provider)}.")
        kind = provider if isinstance(provider, type) else type(provider)
        provider = f"{kind.__module__}:{kind.__qualname__}"
    yield "embedding.kind", "custom"
    yield "embedding.provider", provider


def _deepnorm(given: FlatNames, model: AliasResolver) -> Assignments:
    on = _flag(given, "deepnorm", False)
    yield "block.residual", "deepnorm" if on else "pre"
    if on or model.get("init.kind") == "deepnorm":
        yield "init.kind", "deepnorm" if on else "normal"


def _activation(given: FlatNames, model: AliasResolver) -> Assignments:
    name = str(given["hidden_act"])
    if name.lower() not in ACTIVATIONS:
        raise ConfigError(
            f"hidden_act = {format_value(given['hidden_act'])} is not known{nearest(name.lower(), ACTIVATIONS)}: "
            f"give one of {', '.join(ACTIVATIONS)}."
        )
    yield "feedforward.kind", ACTIVATIONS[name.lower()]


def _heads(given: FlatNames, model: AliasResolver) -> Assignments:
    """What Hugging Face's configurations derive from num_attention_heads when it is not given."""
    heads, width = given["num_attention_heads"], model.get("hidden_size")
    if "num_key_value_heads" not in given:
        yield "attention.num_kv_heads", heads
    if "head_dim" not in given and isinstance(heads, int) and isinstance(width, int) and heads > 0:
        if width % heads:
            raise ConfigError(f"hidden_size = {width} is not a multiple of num_attention_heads = {heads}: change one, or give head_dim.")
        yield "attention.head_dim", width // heads


ROPE_SCALING = {
    "factor": "factor",
    "original_max_position_embeddings": "original_max_seq_len",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "high_freq_factor": "beta_fast",
    "low_freq_factor": "beta_slow",
}


def _rope_scaling(given: FlatNames, model: AliasResolver) -> Assignments:
    """rope_scaling, and rope_parameters, which newer configurations write instead."""
    for name, values in given.items():
        if not isinstance(values, Mapping):
            raise ConfigError(f"{name} must be a table with rope_type and factor, not {format_value(values)}.")
        kind = values.get("rope_type", values.get("type", "default"))
        kinds = ("default", "linear", "dynamic", "ntk", "yarn", "llama3")
        if kind not in kinds:
            raise ConfigError(f"{name}.rope_type must be one of {', '.join(kinds)}, not {format_value(kind)}{nearest(str(kind), kinds)}.")
        yield "rotary.scaling.kind", "none" if kind == "default" else kind
        for key, value in values.items():
            if key == "rope_theta":
                yield "rotary.theta", value
            elif key == "partial_rotary_factor":
                yield "rotary.fraction", value
            elif key in ROPE_SCALING:
                yield f"rotary.scaling.{ROPE_SCALING[key]}", float(value) if key == "factor" and isinstance(value, int) else value
            elif key not in ("rope_type", "type"):
                raise ConfigError(f"there is no key {name}.{key}{nearest(key, ROPE_SCALING)}.")


AliasGroup = Callable[[FlatNames, AliasResolver], Assignments]
SPEC_GROUPS: dict[tuple[str, ...], AliasGroup] = {
    ("alibi_pos_bias", "alibi_num_heads"): _alibi,
    ("rotary_xpos", "rotary_pos_emb"): _rotary,
    ("attn_flash",): _flash,
    ("shift_tokens",): _shift,
    ("attn_one_kv_head",): _one_kv_head,
    ("qk_norm", "attn_qk_norm", "attn_qk_norm_dim_scale"): _qk_norm,
    ("embedding_provider",): _provider,
    ("deepnorm",): _deepnorm,
}
HUGGING_FACE_GROUPS: dict[tuple[str, ...], AliasGroup] = {
    ("hidden_act",): _activation,
    ("use_flash_attention",): _flash,
    ("rope_scaling", "rope_parameters"): _rope_scaling,
}
SPEC_NAMES = frozenset(SPEC_DIRECT) | {name for group in SPEC_GROUPS for name in group}
HUGGING_FACE_NAMES = frozenset(HUGGING_FACE_DIRECT) | {name for group in HUGGING_FACE_GROUPS for name in group}
FLAT_NAMES = SPEC_NAMES | HUGGING_FACE_NAMES


def resolve_aliases(table: Mapping[str, Any], base: ModelConfig, prefix: str = "model.") -> tuple[dict[str, Any], dict[str, str]]:
    """A [model] table that may hold flat names, as structured keys.

    table: as read; a name that is None counts as absent. base: the model that the table changes; names that depend on
    others (attn_one_kv_head on heads) take from it what the table leaves out.
    Returns the nested keys, and for each full dotted path the name that the user typed.
    """
    result = AliasResolver(base, prefix)
    structured = {
        name: value.model_dump() if isinstance(value, BaseConfig) else value for name, value in table.items() if name not in FLAT_NAMES
    }
    for path, value in flatten(structured).items():
        result.assign(path, value, path)
    given = {name: value for name, value in table.items() if name in FLAT_NAMES and value is not None}
    for name, value in given.items():
        if name in DIRECT:
            result.assign(DIRECT[name], value, name)
    for names, group in (SPEC_GROUPS | HUGGING_FACE_GROUPS).items():
        if used := {name: given[name] for name in names if name in given}:
            for path, value in group(used, result):
                result.assign(path, value, " with ".join(used))
    for path, value in _implied(given, result):
        result.assign_default(path, value)
    nested: dict[str, Any] = {}
    for path, value in result.values.items():
        set_path(nested, path, value)
    return nested, {f"model.{path}": name for path, name in result.given_names.items()}


def _implied(given: FlatNames, model: AliasResolver) -> Assignments:
    """Keys that follow from a name and are not set themselves."""
    if "num_attention_heads" in given:
        yield from _heads(given, model)
    if "heads" in given and (most := model.base["alibi.num_heads"]):
        yield "alibi.num_heads", _half(model, most)
    hidden, width = model.base["feedforward.intermediate_size"], model.get("hidden_size")
    if given.keys() & {"dim", "hidden_size"} and hidden and isinstance(width, int):
        # An intermediate size that the base sets keeps its ratio to the hidden size.
        yield "feedforward.intermediate_size", max(64, round(hidden * width / model.base["hidden_size"] / 64) * 64)
