"""The way back: a model's configuration under the spec's names, and as Hugging Face's configurations write it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from andromeda.config.aliases import HUGGING_FACE_NAMES
from andromeda.config.derived import hidden_width
from andromeda.config.keys import flatten, show
from andromeda.config.load import model_from_names
from andromeda.config.mistakes import read
from andromeda.config.model import ModelConfig
from andromeda.config.rules import check_model
from andromeda.utils.errors import ConfigError


def to_names(model: ModelConfig) -> dict[str, Any]:
    """The model under the spec's names, such that `model_from_names(**names)` is this model.

    The attention backend is named as far as attn_flash can. Raises ConfigError for what the names cannot express.
    """
    names: dict[str, Any] = {
        "num_tokens": model.vocab_size,
        "max_seq_len": model.context,
        "dim": model.width,
        "depth": model.depth,
        "dim_head": model.attention.head_dim,
        "heads": model.attention.heads,
        "use_abs_pos_emb": model.embedding.absolute,
        "alibi_pos_bias": model.alibi.heads > 0,
        "alibi_num_heads": model.alibi.heads,
        "rotary_xpos": model.rotary.kind == "xpos",
        "rotary_pos_emb": model.rotary.kind != "none",
        "attn_flash": model.attention.backend != "eager",
        "shift_tokens": model.shift.tokens if model.shift.kind == "chunks" else 0,
        "attn_one_kv_head": model.attention.kv_heads == 1,
        "qk_norm": model.attention.qk_norm != "none",
        "attn_qk_norm": model.attention.qk_norm != "none",
        "attn_qk_norm_dim_scale": model.attention.qk_norm == "l2_dim_scale",
        "embedding_provider": _provider(model),
        "deepnorm": model.block.residual == "deepnorm",
    }
    _compare(model, model_from_names(**names))
    return names


def to_hugging_face(model: ModelConfig) -> dict[str, Any]:
    """The model as a config.json holds it: Hugging Face's names, and every key of ours under `andromeda`."""
    scaling = model.rotary.scaling
    stretched = {
        "rope_type": scaling.kind,
        "factor": scaling.factor,
        "original_max_position_embeddings": scaling.original_context,
        "beta_fast": scaling.beta_fast,
        "beta_slow": scaling.beta_slow,
    }
    return {
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.context,
        "hidden_size": model.width,
        "num_hidden_layers": model.depth,
        "num_attention_heads": model.attention.heads,
        "num_key_value_heads": model.attention.kv_heads,
        "head_dim": model.attention.head_dim,
        "intermediate_size": hidden_width(model),
        "hidden_act": "silu_ungated" if model.feedforward.kind == "silu" else model.feedforward.kind,
        "rotary_emb_fraction": model.rotary.fraction,
        "rope_theta": model.rotary.theta,
        "rope_scaling": None if scaling.kind == "none" else stretched,
        "use_flash_attention": model.attention.backend != "eager",
        "layer_norm_eps": model.block.eps,
        "attention_bias": model.attention.bias,
        "mlp_bias": model.feedforward.bias,
        "tie_word_embeddings": model.head.tied,
        "andromeda": model.model_dump(mode="json"),
    }


def from_hugging_face(values: Mapping[str, Any]) -> ModelConfig:
    """The model of a config.json that `to_hugging_face` wrote; what other libraries added to it is not looked at.

    Raises ConfigError when the keys under `andromeda` are missing or no longer agree with Hugging Face's names.
    """
    if not isinstance(values.get("andromeda"), Mapping):
        raise ConfigError("This config.json holds no key andromeda: it was not written by `andromeda export`.")
    model = read(ModelConfig, values["andromeda"], prefix="andromeda")
    check_model(model)
    written = to_hugging_face(model)
    for name in sorted(HUGGING_FACE_NAMES & values.keys() & written.keys()):
        if values[name] != written[name]:
            raise ConfigError(
                f"config.json says {name} = {show(values[name])}, but its key andromeda says {show(written[name])}: "
                "change both, or export the model again."
            )
    return model


def _provider(model: ModelConfig) -> str:
    if model.embedding.kind == "custom":
        return model.embedding.provider
    if model.embedding.kind == "factorised":
        return "factorised"
    return "tied" if model.head.tied else "plain" if model.value_embedding.kind == "none" else "value"


def _compare(model: ModelConfig, named: ModelConfig) -> None:
    """Refuse a model of which the names say something else."""
    ours, theirs = flatten(model.model_dump()), flatten(named.model_dump())
    for path, value in ours.items():
        if value != theirs[path] and path != "attention.backend":
            raise ConfigError(f"model.{path} = {show(value)} cannot be said with the spec's names, which mean {show(theirs[path])}.")
