"""What `config.json` says of a model: Llama's own keys where the model is one, else the tables of the exported modeling file."""

from __future__ import annotations

import math
from typing import Any

from andromeda.config.derived import content_dim, intermediate_size, layer_window, original_max_seq_len
from andromeda.config.keys import flatten
from andromeda.config.model import ModelConfig
from andromeda.config.parts import mixer_of, named_mixer, own_classes, qk_norm_name
from andromeda.utils.errors import ConfigError

CLASSES = {
    "AutoConfig": "configuration_andromeda.AndromedaConfig",
    "AutoModel": "modeling_andromeda.AndromedaModel",
    "AutoModelForCausalLM": "modeling_andromeda.AndromedaForCausalLM",
}
TABLES = ("attention", "rotary", "alibi", "embedding", "feedforward", "experts", "block", "shift", "value_embedding", "skips", "head")
"""Tables of the model's configuration that the modeling file reads."""
BY_LAYER = ("layers", "mixers")
"""Keys of a model whose token mixers differ by layer."""
HANDLED: dict[str, str] = {
    "": "vocab_size max_seq_len hidden_size num_layers layers",
    "embedding.": "kind rank provider absolute norm",
    "rotary.": "kind theta fraction head_fraction layout scale_base heads",
    "rotary.scaling.": "kind factor original_max_seq_len beta_fast beta_slow ramp",
    "alibi.": "num_heads fold_into_qk scale",
    "attention.": "mixer num_heads num_kv_heads head_dim bias qk_norm scale softcap sliding_window full_attention_interval backend",
    "feedforward.": "kind intermediate_size mlp_ratio bias",
    "experts.": "num_experts top_k num_shared_experts kind router_activation normalize balance bias_update_rate aux_loss_coef",
    "block.": "kind residual norm eps",
    "shift.": "kind tokens",
    "value_embedding.": "kind init",
    "skips.": "first unet",
    "head.": "tied softcap bias",
    "init.": "kind std",
}
"""Keys whose every value the modeling file computes (or that say nothing of what is computed). A new key must be added to it there."""
NO_CACHE_SCALING = "dynamic"


def refuse_unknown_parts(config: ModelConfig) -> None:
    """Raises ConfigError, one sentence, where a part of the model has no form in the exported modeling file."""
    for key, path in own_classes(config).items():
        raise ConfigError(
            f"{key} = {path!r} is code of your own, which the exported modeling file does not hold: "
            "export a model whose parts are all Andromeda's."
        )
    windows = {window for layer in range(config.num_layers) if (window := layer_window(mixer_of(config, layer).model, layer))}
    if len(windows) > 1:
        raise ConfigError(
            f"model.mixers have sliding windows of {' and '.join(map(str, sorted(windows)))} tokens, and transformers knows one window "
            "for all layers: export a model whose windows are equal."
        )
    handled = {prefix + key for prefix, keys in HANDLED.items() for key in keys.split()}
    given, default = flatten(config.model_dump()), flatten(ModelConfig().model_dump())
    for key, value in given.items():
        if key not in handled and not key.startswith("mixers.") and value != default.get(key):
            raise ConfigError(f"model.{key} = {value!r} has no form in the exported modeling file: export a model without it.")


def remote_config(config: ModelConfig, quantization: str = "") -> dict[str, Any]:
    """`config.json` beside the exported modeling file. quantization: int8 or fp8, where the weights are."""
    values = config.model_dump(mode="json")
    feedforward = values["feedforward"] | {"intermediate_size": intermediate_size(config)}
    attention = {key: value for key, value in values["attention"].items() if key != "backend"}
    return (
        {
            "model_type": "andromeda",
            "architectures": ["AndromedaForCausalLM"],
            "auto_map": CLASSES,
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "num_hidden_layers": config.num_layers,
            "max_position_embeddings": config.max_seq_len,
            "tie_word_embeddings": config.head.tied,
            "quantization": quantization,
        }
        | {name: values[name] for name in TABLES}
        | ({"layers": list(config.layers), "mixers": mixer_tables(config)} if config.layers else {})
        | {"feedforward": feedforward, "attention": attention}
    )


def mixer_tables(config: ModelConfig) -> dict[str, Any]:
    """`[model.mixers]` with the keys that each gives. They stand in place of those of `attention` in the layers that name the mixer."""
    tables: dict[str, Any] = {}
    for name, table in config.mixers.items():
        model = named_mixer(config, name).model
        given = model.attention.model_dump(mode="json") | {"qk_norm": qk_norm_name(model)}
        tables[name] = {"kind": table.kind} | {key: given[key] for key in table.own if key != "backend"}
    return tables


def llama_config(config: ModelConfig) -> dict[str, Any] | str:
    """`config.json` of a plain LlamaForCausalLM, or in a few words why the model is none."""
    c, a, r = config, config.attention, config.rotary
    reasons = {
        "its embedding is not a plain table": c.embedding.kind != "plain" or c.embedding.absolute or c.embedding.norm,
        "its positions are not rotary alone": r.kind != "rope" or r.fraction != 1.0 or r.head_fraction != 1.0 or c.alibi.num_heads,
        "its rotary scaling follows the length": r.scaling.kind == NO_CACHE_SCALING,
        "its token mixers differ by layer": c.layers,
        "its attention is not plain softmax": a.mixer != "softmax" or a.qk_norm != "none" or a.softcap or a.sliding_window,
        "its feed-forward is not SwiGLU": c.feedforward.kind != "swiglu",
        "its blocks are not serial and pre-norm with RMS norms": (c.block.kind, c.block.residual, c.block.norm) != ("serial", "pre", "rms"),
        "it has token shift, value embeddings or skips": c.shift.kind != "none"
        or c.value_embedding.kind != "none"
        or c.skips.first
        or c.skips.unet,
        "its head has a soft cap or biases": c.head.softcap or c.head.bias,
        "its width is no multiple of its heads": c.hidden_size % a.num_heads,
    }
    for reason, holds in reasons.items():
        if holds:
            return reason
    rope = rope_parameters(config)
    if rope is None:
        return "its softmax scale or rotary scaling is none of Llama's"
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "intermediate_size": intermediate_size(c),
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": a.num_heads,
        "num_key_value_heads": a.num_kv_heads,
        "head_dim": a.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": c.max_seq_len,
        "rms_norm_eps": c.block.eps,
        "tie_word_embeddings": c.head.tied,
        "attention_bias": a.bias,
        "mlp_bias": c.feedforward.bias,
        "rope_parameters": rope,
    }


def yarn_factor(factor: float) -> float:
    """What YaRN multiplies the logits with."""
    return (0.1 * math.log(factor) + 1) ** 2


def rope_parameters(config: ModelConfig) -> dict[str, Any] | None:
    """Llama's `rope_parameters`, or None where it has no such ramp, or where the softmax scale belongs to none of its kinds."""
    scaling, theta, dim = config.rotary.scaling, config.rotary.theta, content_dim(config)
    usual = 1 / math.sqrt(dim)
    scale = config.attention.scale or usual
    original = original_max_seq_len(config)
    named = {"rope_theta": theta, "factor": scaling.factor, "original_max_position_embeddings": original}
    if scaling.kind == "yarn":
        if scaling.ramp == "rotations":
            return None
        ends = {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
        factor = math.sqrt(scale * yarn_factor(scaling.factor) / usual)
        own = {} if scale == usual else {"attention_factor": factor}
        return {"rope_type": "yarn", **named, **ends, **own}
    if not math.isclose(scale, usual, rel_tol=1e-9):
        return None
    if scaling.kind == "llama3":
        return {"rope_type": "llama3", **named, "low_freq_factor": scaling.beta_slow, "high_freq_factor": scaling.beta_fast}
    if scaling.kind == "linear":
        return {"rope_type": "linear", "rope_theta": theta, "factor": scaling.factor}
    if scaling.kind == "ntk":
        return {"rope_type": "default", "rope_theta": theta * scaling.factor ** (dim / max(dim - 2, 1))}
    return {"rope_type": "default", "rope_theta": theta}
