"""What each family of transformers' models is in parts of ours, and how its weights become ours.

A family gives the keys of `ModelConfig` and its tensors under the names of the exported modeling file (`parameter_names`).
What has no part of its own here is folded into weights where that gives the same function: biases of layer norms into the
linear maps behind them, the two norms of a parallel block into one without a gain, missing output biases as zeros.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from andromeda.hub.hub_config import yarn_factor
from andromeda.hub.hub_folder import ModelSettings
from andromeda.utils.errors import CheckpointError, ConfigError, nearest

Values = dict[str, Any]
Named = Iterator[tuple[str, Tensor]]
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
    "silu": "silu",
    "swish": "silu",
}
GATES = {
    "silu": "swiglu",
    "swish": "swiglu",
    "gelu": "geglu",
    "gelu_new": "geglu_tanh",
    "gelu_pytorch_tanh": "geglu_tanh",
    "relu": "reglu",
}
IGNORED = re.compile(r".*\.(?:rotary_emb\.inv_freq|attn\.(?:masked_)?bias|attention\.(?:masked_bias|bias|rotary_emb\.inv_freq))")
"""Tables that older versions of transformers wrote beside the weights, which follow from the configuration."""


@dataclass(frozen=True)
class Family:
    """How to read one `model_type`."""

    config: Callable[[ModelSettings], Values]
    """Keys of ModelConfig, nested."""
    tensors: Callable[[Mapping[str, Tensor], Values], Named]
    """Names of the modeling file, and tensors."""


def family_of(settings: ModelSettings) -> Family:
    """The family that config.json names. Raises ConfigError with the list of those that are known."""
    name = settings.text("model_type")
    if name not in FAMILIES:
        raise ConfigError(f"model_type = {name[:60]!r} has no form here{nearest(name, FAMILIES)}: there are {', '.join(FAMILIES)}.")
    return FAMILIES[name]


def common(s: ModelSettings, **more: Any) -> Values:
    """What Llama and its relatives have in common."""
    heads, width = s.count("num_attention_heads"), s.count("hidden_size")
    context = s.count("max_position_embeddings")
    if not s.has("head_dim") and width % heads:
        raise ConfigError(f"config.json: hidden_size = {width} is no multiple of num_attention_heads = {heads}: fetch it again.")
    head_dim = s.count("head_dim", width // heads)
    rotary, scale = rope(s, head_dim, context)
    attention = {
        "num_heads": heads,
        "num_kv_heads": s.count("num_key_value_heads", heads),
        "head_dim": head_dim,
        "bias": s.flag("attention_bias", False),
        "scale": scale,
    }
    extended = rotary["scaling"]["kind"] == "dynamic"
    return {
        "vocab_size": s.count("vocab_size"),
        "max_seq_len": round(context * rotary["scaling"]["factor"]) if extended else context,
        "hidden_size": width,
        "num_layers": s.count("num_hidden_layers"),
        "embedding": {"kind": "plain"},
        "rotary": rotary,
        "attention": attention,
        "feedforward": {
            "kind": activation(s, "hidden_act", "silu", GATES),
            "intermediate_size": s.count("intermediate_size"),
            "bias": s.flag("mlp_bias", False),
        },
        "block": {"kind": "serial", "residual": "pre", "norm": "rms", "eps": s.number("rms_norm_eps", 1e-6)},
        "head": {"tied": s.flag("tie_word_embeddings", False)},
    } | more


def activation(s: ModelSettings, key: str, default: str, known: Mapping[str, str]) -> str:
    """Our name of an activation."""
    name = s.text(key, default)
    if name not in known:
        raise ConfigError(f"config.json: {key} = {name[:60]!r} has no form here{nearest(name, known)}: there are {', '.join(known)}.")
    return known[name]


def rope(s: ModelSettings, head_dim: int, context: int, theta: float = 10000.0, fraction: float = 1.0) -> tuple[Values, float]:
    """The rotary part, and the softmax scale (0 for the usual one) where a scaling rule's factor on the logits is not ours."""
    given = s.table("rope_parameters") if s.has("rope_parameters") else s.table("rope_scaling")
    theta = given.number("rope_theta", s.number("rope_theta", theta))
    kind = given.text("rope_type", given.text("type", "default"))
    if not given.has("rope_type") and not given.has("type"):
        kind = "default"
    factor = given.number("factor", 1.0)
    original = given.count("original_max_position_embeddings", context)
    rotary: Values = {"kind": "rope", "theta": theta, "layout": "half", "fraction": given.number("partial_rotary_factor", fraction)}
    scaling: Values = {"kind": kind, "factor": factor, "original_max_seq_len": original}
    scale, usual = 0.0, head_dim**-0.5
    if kind == "default" or (kind in ("linear", "dynamic") and factor == 1.0):
        scaling = {"kind": "none", "factor": 1.0}
    elif kind == "linear":
        scaling = {"kind": "linear", "factor": factor}
    elif kind == "dynamic":
        scaling["original_max_seq_len"] = context
    elif kind == "yarn":
        for name, harmless in (("truncate", True), ("mscale", None), ("mscale_all_dim", None)):
            given.refuse(name, harmless, "YaRN is as in the paper's released code")
        scaling |= {"beta_fast": given.number("beta_fast", 32.0), "beta_slow": given.number("beta_slow", 1.0), "ramp": "index"}
        own = given.number("attention_factor", 0.1 * math.log(factor) + 1)
        if not math.isclose(own**2, yarn_factor(factor), rel_tol=1e-12):
            scale = usual * own**2 / yarn_factor(factor)
    elif kind == "llama3":
        scaling |= {"beta_fast": given.number("high_freq_factor"), "beta_slow": given.number("low_freq_factor")}
    else:
        raise ConfigError(f"config.json: rope_type = {kind[:60]!r} has no form here: there are default, linear, dynamic, yarn and llama3.")
    return rotary | {"scaling": scaling}, scale


def windows(values: Values, layer_types: list[str], window: int) -> None:
    """Set the windows of a model whose layers are full or sliding; a window that covers the whole context is none."""
    if window >= values["max_seq_len"] or "sliding_attention" not in layer_types:
        return
    values["attention"]["sliding_window"] = window
    full = [layer for layer, kind in enumerate(layer_types) if kind == "full_attention"]
    if not full:
        return
    every = full[0] + 1
    if full != list(range(every - 1, len(layer_types), every)):
        raise ConfigError(
            "config.json: layer_types are no repeated pattern that ends in full attention, which is all that has a form here."
        )
    values["attention"]["full_attention_interval"] = every


def llama_values(s: ModelSettings) -> Values:
    """Llama."""
    s.refuse("pretraining_tp", 1, "weights are not sliced")
    return common(s)


def mistral_values(s: ModelSettings) -> Values:
    """Mistral: Llama with a window on every layer."""
    values = common(s)
    if s.has("sliding_window"):
        windows(values, ["sliding_attention"] * values["num_layers"], s.count("sliding_window"))
    return values


def qwen2_values(s: ModelSettings) -> Values:
    """Qwen2: Llama with biases on queries, keys and values."""
    values = common(s)
    values["attention"]["bias"] = True
    qwen_windows(s, values)
    return values


def qwen3_values(s: ModelSettings) -> Values:
    """Qwen3: Llama with a norm of queries and keys."""
    values = common(s)
    values["attention"]["qk_norm"] = "rms_dim_scale"
    qwen_windows(s, values)
    return values


def gemma2_values(s: ModelSettings) -> Values:
    """Gemma 2: norms before and after each branch, soft caps, every other layer with a window; its scaled embedding unties the head."""
    s.refuse("use_bidirectional_attention", False, "attention is causal")
    values = common(s)
    key = "hidden_activation" if s.has("hidden_activation") else "hidden_act"
    values["feedforward"]["kind"] = activation(s, key, "gelu_pytorch_tanh", GATES)
    values["block"]["residual"] = "sandwich"
    values["attention"]["scale"] = s.number("query_pre_attn_scalar", 256) ** -0.5
    values["attention"]["softcap"] = s.number("attn_logit_softcapping", 0.0)
    values["head"] = {"tied": False, "softcap": s.number("final_logit_softcapping", 0.0)}
    default = ["full_attention" if layer % 2 else "sliding_attention" for layer in range(values["num_layers"])]
    if s.has("sliding_window"):
        windows(values, s.words("layer_types") or default, s.count("sliding_window"))
    return values


def qwen_windows(s: ModelSettings, values: Values) -> None:
    """Windows of the layers from `max_window_layers` on, or as `layer_types` says."""
    if not s.flag("use_sliding_window", False) or not s.has("sliding_window"):
        return
    depth, first = values["num_layers"], s.count("max_window_layers", 28) if s.has("max_window_layers") else 28
    default = ["full_attention" if layer < first else "sliding_attention" for layer in range(depth)]
    windows(values, s.words("layer_types") or default, s.count("sliding_window"))


def mixtral_values(s: ModelSettings) -> Values:
    """Mixtral: Mistral with experts."""
    values = mistral_values(s)
    values["feedforward"] |= {"kind": "moe", "bias": False}
    values["experts"] = {
        "num_experts": s.count("num_local_experts", 8),
        "top_k": s.count("num_experts_per_tok", 2),
        "kind": activation(s, "hidden_act", "silu", GATES),
        "router_activation": "softmax",
        "normalize": True,
        "balance": "loss",
        "aux_loss_coef": s.number("router_aux_loss_coef", 0.001),
    }
    return values


def gpt2_values(s: ModelSettings) -> Values:
    """GPT-2: learned positions, layer norms with biases (folded), a tied head (with a bias, from the last norm's)."""
    s.refuse("scale_attn_weights", True, "logits are always scaled")
    s.refuse("scale_attn_by_inverse_layer_idx", False, "all layers have one softmax scale")
    s.refuse("add_cross_attention", False, "there is no encoder")
    width, heads = s.count("n_embd"), s.count("n_head")
    if width % heads:
        raise ConfigError(f"config.json: n_embd = {width} is no multiple of n_head = {heads}: fetch it again.")
    return {
        "vocab_size": s.count("vocab_size"),
        "max_seq_len": s.count("n_positions"),
        "hidden_size": width,
        "num_layers": s.count("n_layer"),
        "embedding": {"kind": "plain", "absolute": True},
        "rotary": {"kind": "none"},
        "attention": {"num_heads": heads, "num_kv_heads": heads, "head_dim": width // heads, "bias": True},
        "feedforward": {
            "kind": activation(s, "activation_function", "gelu_new", ACTIVATIONS),
            "intermediate_size": s.count("n_inner", 4 * width),
            "bias": True,
        },
        "block": {"norm": "layer", "eps": s.number("layer_norm_epsilon", 1e-5)},
        "head": {"tied": s.flag("tie_word_embeddings", True), "bias": True},
    }


def neox_values(s: ModelSettings) -> Values:
    """GPT-NeoX: parallel (or serial) blocks, rotary positions on a share of each head, layer norms with biases (folded)."""
    width, heads, context = s.count("hidden_size"), s.count("num_attention_heads"), s.count("max_position_embeddings")
    if width % heads:
        raise ConfigError(f"config.json: hidden_size = {width} is no multiple of num_attention_heads = {heads}: fetch it again.")
    rotary, scale = rope(s, width // heads, context, s.number("rotary_emb_base", 10000.0), s.number("rotary_pct", 0.25))
    if rotary["scaling"]["kind"] == "yarn" and rotary["fraction"] != 1.0:
        raise ConfigError("config.json: yarn or llama3 scaling on a share of each head has no form here: import another model.")
    return {
        "vocab_size": s.count("vocab_size"),
        "max_seq_len": context,
        "hidden_size": width,
        "num_layers": s.count("num_hidden_layers"),
        "embedding": {"kind": "plain"},
        "rotary": rotary,
        "attention": {"num_heads": heads, "num_kv_heads": heads, "head_dim": width // heads, "bias": True, "scale": scale},
        "feedforward": {
            "kind": activation(s, "hidden_act", "gelu", ACTIVATIONS),
            "intermediate_size": s.count("intermediate_size"),
            "bias": True,
        },
        "block": {
            "kind": "parallel" if s.flag("use_parallel_residual", True) else "serial",
            "norm": "layer",
            "eps": s.number("layer_norm_eps", 1e-5),
        },
        "head": {"tied": s.flag("tie_word_embeddings", False), "bias": True},
    }


def as_they_are(tensors: Mapping[str, Tensor], values: Values) -> Named:
    """Llama's own names."""
    for name in tensors:
        if not IGNORED.fullmatch(name) and not (values["head"]["tied"] and name == "lm_head.weight"):
            yield name, tensors[name]


def with_output_biases(tensors: Mapping[str, Tensor], values: Values) -> Named:
    """Llama's names, with zeros for the output projection's bias, which Qwen2 does not have."""
    yield from as_they_are(tensors, values)
    for layer in range(values["num_layers"]):
        yield f"model.layers.{layer}.self_attn.o_proj.bias", torch.zeros(values["hidden_size"])


def qwen3_tensors(tensors: Mapping[str, Tensor], values: Values) -> Named:
    """Llama's names; the norms' gains are ours under other names."""
    for name, tensor in as_they_are(tensors, values):
        name = name.replace(".self_attn.q_norm.weight", ".self_attn.qk_norm.query_scale")
        yield name.replace(".self_attn.k_norm.weight", ".self_attn.qk_norm.key_scale"), tensor


GEMMA_NORMS = {
    "input_layernorm": "input_layernorm",
    "post_attention_layernorm": "attention_out_norm",
    "pre_feedforward_layernorm": "post_attention_layernorm",
    "post_feedforward_layernorm": "feedforward_out_norm",
}


def gemma2_tensors(tensors: Mapping[str, Tensor], values: Values) -> Named:
    """Gains are kept less one there. The embedding is multiplied by sqrt(width), which goes into a table apart from the head's."""
    for name in tensors:
        if IGNORED.fullmatch(name) or name == "lm_head.weight":
            continue
        part = name.split(".")
        if name == "model.embed_tokens.weight":
            table = tensors[name]
            yield name, table * torch.tensor(values["hidden_size"] ** 0.5, dtype=table.dtype)
            yield "lm_head.weight", tensors.get("lm_head.weight", table)
        elif part[-1] == "weight" and (part[-2] in GEMMA_NORMS or name == "model.norm.weight"):
            kept = ".".join([*part[:-2], GEMMA_NORMS.get(part[-2], part[-2]), "weight"])
            yield kept, tensors[name].float() + 1.0
        else:
            yield name, tensors[name]


def mixtral_tensors(tensors: Mapping[str, Tensor], values: Values) -> Named:
    """Experts one by one (w1, w2, w3), or stacked as newer versions write them."""
    expert = re.compile(r"model\.layers\.\d+\.(?:block_sparse_moe|mlp)\..*")
    yield from as_they_are({name: tensors[name] for name in tensors if not expert.fullmatch(name)}, values)
    count = values["experts"]["num_experts"]
    for layer in range(values["num_layers"]):
        to = f"model.layers.{layer}.mlp"
        base = next(
            (
                f"model.layers.{layer}.{name}"
                for name in ("block_sparse_moe", "mlp")
                if f"model.layers.{layer}.{name}.gate.weight" in tensors
            ),
            to,
        )
        yield f"{to}.router.weight", wanted(tensors, f"{base}.gate.weight")
        if f"{base}.experts.gate_up_proj" in tensors:
            gate, up = tensors[f"{base}.experts.gate_up_proj"].chunk(2, 1)
            stacks = {"gate": gate, "up": up, "down": wanted(tensors, f"{base}.experts.down_proj")}
        else:
            parts = {"gate": "w1", "up": "w3", "down": "w2"}
            stacks = {
                name: torch.stack([wanted(tensors, f"{base}.experts.{e}.{w}.weight") for e in range(count)]) for name, w in parts.items()
            }
        for name, stack in stacks.items():
            yield f"{to}.experts.{name}_proj", stack


def gpt2_tensors(tensors: Mapping[str, Tensor], values: Values) -> Named:
    """Matrices are transposed and queries, keys and values side by side; the biases of the norms go into the maps behind them."""
    prefix = "transformer." if "transformer.wte.weight" in tensors else ""

    def get(name: str) -> Tensor:
        return wanted(tensors, prefix + name)

    yield "model.embed_tokens.weight", get("wte.weight")
    yield "model.embed_positions.weight", get("wpe.weight")
    for layer in range(values["num_layers"]):
        old, new = f"h.{layer}", f"model.layers.{layer}"
        yield f"{new}.input_layernorm.weight", get(f"{old}.ln_1.weight")
        yield f"{new}.post_attention_layernorm.weight", get(f"{old}.ln_2.weight")
        joined, bias = get(f"{old}.attn.c_attn.weight").T, get(f"{old}.attn.c_attn.bias")
        bias = folded(joined, bias, get(f"{old}.ln_1.bias"))
        for name, w, b in zip("qkv", joined.chunk(3), bias.chunk(3), strict=True):
            yield f"{new}.self_attn.{name}_proj.weight", w
            yield f"{new}.self_attn.{name}_proj.bias", b
        yield f"{new}.self_attn.o_proj.weight", get(f"{old}.attn.c_proj.weight").T
        yield f"{new}.self_attn.o_proj.bias", get(f"{old}.attn.c_proj.bias")
        up = get(f"{old}.mlp.c_fc.weight").T
        yield f"{new}.mlp.up_proj.weight", up
        yield f"{new}.mlp.up_proj.bias", folded(up, get(f"{old}.mlp.c_fc.bias"), get(f"{old}.ln_2.bias"))
        yield f"{new}.mlp.down_proj.weight", get(f"{old}.mlp.c_proj.weight").T
        yield f"{new}.mlp.down_proj.bias", get(f"{old}.mlp.c_proj.bias")
    head = get("wte.weight") if values["head"]["tied"] else wanted(tensors, "lm_head.weight")
    yield from ending(head, get("ln_f.weight"), get("ln_f.bias"), values)


def neox_tensors(tensors: Mapping[str, Tensor], values: Values) -> Named:
    """Queries, keys and values of each head lie together; a parallel block's two norms become one without a gain."""
    heads, parallel = values["attention"]["num_heads"], values["block"]["kind"] == "parallel"

    def get(name: str) -> Tensor:
        return wanted(tensors, f"gpt_neox.{name}")

    yield "model.embed_tokens.weight", get("embed_in.weight")
    for layer in range(values["num_layers"]):
        old, new = f"layers.{layer}", f"model.layers.{layer}"
        joined = get(f"{old}.attention.query_key_value.weight")
        bias = tensors.get(f"gpt_neox.{old}.attention.query_key_value.bias", torch.zeros(len(joined)))
        norms = {name: (get(f"{old}.{name}.weight"), get(f"{old}.{name}.bias")) for name in ("input_layernorm", "post_attention_layernorm")}
        bias = folded(joined, bias, norms["input_layernorm"][1])
        up = get(f"{old}.mlp.dense_h_to_4h.weight")
        up_bias = folded(up, get(f"{old}.mlp.dense_h_to_4h.bias"), norms["post_attention_layernorm"][1])
        if parallel:
            joined, up = joined * norms["input_layernorm"][0], up * norms["post_attention_layernorm"][0]
            yield f"{new}.input_layernorm.weight", torch.ones(values["hidden_size"])
        else:
            for name, (gain, _) in norms.items():
                yield f"{new}.{name}.weight", gain
        by_head = zip("qkv", joined.unflatten(0, (heads, 3, -1)).unbind(1), bias.unflatten(0, (heads, 3, -1)).unbind(1), strict=True)
        for name, w, b in by_head:
            yield f"{new}.self_attn.{name}_proj.weight", w.flatten(0, 1)
            yield f"{new}.self_attn.{name}_proj.bias", b.flatten()
        yield f"{new}.self_attn.o_proj.weight", get(f"{old}.attention.dense.weight")
        yield f"{new}.self_attn.o_proj.bias", tensors.get(f"gpt_neox.{old}.attention.dense.bias", torch.zeros(values["hidden_size"]))
        yield f"{new}.mlp.up_proj.weight", up
        yield f"{new}.mlp.up_proj.bias", up_bias
        yield f"{new}.mlp.down_proj.weight", get(f"{old}.mlp.dense_4h_to_h.weight")
        yield f"{new}.mlp.down_proj.bias", get(f"{old}.mlp.dense_4h_to_h.bias")
    head = get("embed_in.weight") if values["head"]["tied"] else wanted(tensors, "embed_out.weight")
    yield from ending(head, get("final_layer_norm.weight"), get("final_layer_norm.bias"), values)


def ending(head: Tensor, gain: Tensor, bias: Tensor, values: Values) -> Named:
    """The last norm, whose bias becomes the head's."""
    yield "model.norm.weight", gain
    yield "lm_head.bias", folded(head, torch.zeros(len(head)), bias)
    if not values["head"]["tied"]:
        yield "lm_head.weight", head


def folded(weight: Tensor, bias: Tensor, before: Tensor) -> Tensor:
    """Bias of a map (N, K) that takes over the bias (K,) of the norm before it."""
    if weight.shape[-1:] != before.shape or weight.shape[:1] != bias.shape:
        raise CheckpointError(
            f"Weights of shapes {tuple(weight.shape)}, {tuple(bias.shape)} and {tuple(before.shape)} do not belong together."
        )
    return (bias.double() + weight.double() @ before.double()).to(torch.promote_types(bias.dtype, torch.float32))


def wanted(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """A tensor that must be there."""
    if name not in tensors:
        raise CheckpointError(f"The weights hold no {name}: fetch the folder again.")
    return tensors[name]


FAMILIES: dict[str, Family] = {
    "llama": Family(llama_values, as_they_are),
    "mistral": Family(mistral_values, as_they_are),
    "qwen2": Family(qwen2_values, with_output_biases),
    "qwen3": Family(qwen3_values, qwen3_tensors),
    "gemma2": Family(gemma2_values, gemma2_tensors),
    "mixtral": Family(mixtral_values, mixtral_tensors),
    "gpt2": Family(gpt2_values, gpt2_tensors),
    "gpt_neox": Family(neox_values, neox_tensors),
}
