"""What tests of exports share: small models of every preset and of random legal configurations."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch

from andromeda.config.load import from_values, load, presets
from andromeda.config.model import ModelConfig
from andromeda.hub.export_folder import convert, write_folder
from andromeda.model.transformer import Transformer
from andromeda.train.state import model_tensors
from andromeda.utils.errors import ConfigError

VOCABULARY, CONTEXT = 300, 128
NAMES = sorted(presets())


def small_preset(name: str) -> ModelConfig:
    """A preset's parts at a small size."""
    found = load(name).model
    heads = {1: 1, found.attention.num_heads: 4}.get(found.attention.num_kv_heads, 2)
    changes = [
        f"model.vocab_size={VOCABULARY}",
        f"model.max_seq_len={CONTEXT}",
        "model.hidden_size=64",
        "model.num_layers=4",
        "model.attention.head_dim=32",
        "model.attention.num_heads=4",
        f"model.attention.num_kv_heads={heads}",
        "model.feedforward.intermediate_size=96",
        "train.seq_len=64",
    ]
    if found.alibi.num_heads:
        changes.append("model.alibi.num_heads=2")
    if found.attention.sliding_window:
        changes += ["model.attention.sliding_window=16", "train.window.start=0", "train.window.end=0"]
    if found.attention.full_attention_interval:
        changes.append("model.attention.full_attention_interval=2")
    return load(name, changes).model


def random_config(seed: int) -> ModelConfig:
    """A legal combination of parts drawn by a seed; a draw that the rules refuse is drawn again."""
    draw = random.Random(seed)
    while True:
        try:
            return from_values({"model": _drawn(draw), "train": {"seq_len": 64}}).model
        except ConfigError:
            continue


def _drawn(draw: random.Random) -> dict[str, Any]:
    pick = draw.choice
    window = pick([0, 0, 16])
    return {
        "vocab_size": VOCABULARY,
        "max_seq_len": CONTEXT,
        "hidden_size": pick([48, 64, 72]),
        "num_layers": pick([2, 3, 4]),
        "embedding": {
            "kind": pick(["plain", "plain", "factorized"]),
            "rank": 16,
            "absolute": pick([True, False]),
            "norm": pick([True, False]),
        },
        "rotary": {
            "kind": pick(["none", "rope", "rope", "xpos"]),
            "fraction": pick([1.0, 0.5]),
            "layout": pick(["half", "interleaved"]),
            "heads": pick(["all", "non_alibi"]),
            "head_fraction": pick([1.0, 1.0, 0.5]),
            "scaling": pick(
                [
                    {},
                    {"kind": "linear", "factor": 2.0},
                    {"kind": "ntk", "factor": 2.0},
                    {"kind": "dynamic", "factor": 4.0},
                    {"kind": "yarn", "factor": 4.0, "ramp": pick(["index", "rotations"])},
                    {"kind": "llama3", "factor": 4.0, "beta_fast": 4.0},
                ]
            ),
        },
        "alibi": {"num_heads": pick([0, 2, 3]), "fold_into_qk": pick([True, False]), "scale": pick([1.0, 2.0])},
        "attention": {
            "mixer": pick(["softmax", "softmax", "sigmoid"]),
            "num_heads": 4,
            "num_kv_heads": pick([1, 2, 4]),
            "head_dim": pick([12, 16]),
            "bias": pick([True, False]),
            "qk_norm": pick(["none", "l2", "l2_head_scale", "l2_dim_scale", "rms", "rms_dim_scale"]),
            "scale": pick([0.0, 0.3]),
            "softcap": pick([0.0, 0.0, 5.0]),
            "sliding_window": window,
            "full_attention_interval": pick([0, 2]) if window else 0,
        },
        "feedforward": {
            "kind": pick(["gelu", "gelu_tanh", "relu", "relu2", "silu", "swiglu", "geglu", "geglu_tanh", "reglu", "moe", "moe"]),
            "intermediate_size": 80,
            "bias": pick([True, False]),
        },
        "experts": {
            "num_experts": 4,
            "num_shared_experts": pick([0, 1]),
            "kind": pick(["gelu", "swiglu"]),
            "router_activation": pick(["sigmoid", "softmax"]),
            "normalize": pick([True, False]),
            "bias_update_rate": 0.1,
        },
        "block": {
            "kind": pick(["serial", "parallel"]),
            "residual": pick(["pre", "pre", "sandwich", "deepnorm"]),
            "norm": pick(["rms", "layer", "rms_plain"]),
        },
        "shift": {"kind": pick(["none", "chunks", "lerp", "smear"]), "tokens": pick([1, 2])},
        "value_embedding": {"kind": pick(["none", "layered"])},
        "skips": {"first": pick([True, False]), "unet": pick([True, False])},
        "head": {"tied": pick([True, False]), "softcap": pick([0.0, 15.0]), "bias": pick([True, False])},
    }


def stirred(config: ModelConfig, seed: int = 1) -> Transformer:
    """A model in which every weight and count differs from its start value."""
    model = Transformer(config, seed=seed).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
        for name, buffer in model.named_buffers():
            if name.endswith("votes"):
                buffer.copy_(torch.randint(-3, 3, buffer.shape, generator=generator))
    return model


def exported(model: Transformer, to: Path, **rest: Any) -> Any:
    """The model as transformers loads its exported folder."""
    from transformers import AutoModelForCausalLM

    write_folder(to, convert(model.config, model_tensors(model)), None, **rest)
    return AutoModelForCausalLM.from_pretrained(to, trust_remote_code=True).eval()
