"""Configurations in which every legal pair of values of two different slots occurs at least once (a covering array).

A slot is a choice that a user makes; its values are configuration overrides by dotted path. Pairs that the configuration
refuses are left out, and only those.
"""

from __future__ import annotations

import random
from contextlib import ExitStack
from functools import cache
from itertools import combinations
from typing import Any

from andromeda.config.model import ModelConfig
from andromeda.config.own_code import allow_code
from andromeda.config.parts import check_own_parts
from andromeda.config.rules import check_model
from andromeda.utils.errors import ConfigError

LINEAR = "examples.add_a_mixer:GatedLinearAttention"
# Whoever builds these configurations imports this module: one consent, to this class alone, for all of them.
CONSENT = ExitStack()
CONSENT.enter_context(allow_code([LINEAR]))

Choice = tuple[str, str]
"""A slot and the name of its value."""

BASE: dict[str, Any] = {
    "vocab_size": 29,
    "max_seq_len": 16,
    "hidden_size": 24,
    "num_layers": 3,
    "attention.head_dim": 16,
    "feedforward.intermediate_size": 16,
    "rotary.scale_base": 8,
    "experts.num_experts": 4,
}

ROPE: dict[str, Any] = {"rotary.kind": "rope"}
NOPE: dict[str, Any] = {"rotary.kind": "none"}
XPOS: dict[str, Any] = {"rotary.kind": "xpos"}
EXTENDED: dict[str, Any] = {"rotary.scaling.factor": 4.0, "rotary.scaling.original_max_seq_len": 5}

SLOTS: dict[str, dict[str, dict[str, Any]]] = {
    "position": {
        "rope": ROPE,
        "nope": NOPE,
        "absolute": NOPE | {"embedding.absolute": True},
        "rope-interleaved": ROPE | {"rotary.layout": "interleaved"},
        "rope-partial": ROPE | {"rotary.fraction": 0.5},
        "xpos": XPOS,
        "xpos-partial": XPOS | {"rotary.layout": "interleaved", "rotary.fraction": 0.25},
        "alibi": NOPE | {"alibi.num_heads": 3},
        "alibi-folded": NOPE | {"alibi.num_heads": 3, "alibi.fold_into_qk": True},
        "rope+alibi": ROPE | {"alibi.num_heads": 2, "alibi.scale": 4.0},
        "xpos+alibi": XPOS | {"alibi.num_heads": 2},
        "xpos|alibi": XPOS | {"alibi.num_heads": 2, "rotary.heads": "non_alibi"},
        "xpos+alibi-folded": XPOS | {"alibi.num_heads": 2, "alibi.fold_into_qk": True, "rotary.fraction": 0.5},
    },
    "scaling": {
        "unscaled": {},
        "linear": EXTENDED | {"rotary.scaling.kind": "linear"},
        "ntk": EXTENDED | {"rotary.scaling.kind": "ntk"},
        "dynamic": EXTENDED | {"rotary.scaling.kind": "dynamic"},
        "yarn": EXTENDED | {"rotary.scaling.kind": "yarn"},
        "llama3": EXTENDED | {"rotary.scaling.kind": "llama3"},
        "yarn-rotations": EXTENDED | {"rotary.scaling.kind": "yarn", "rotary.scaling.ramp": "rotations"},
    },
    "qk_norm": {kind: {"attention.qk_norm": kind} for kind in ("none", "l2", "l2_head_scale", "l2_dim_scale", "rms", "rms_dim_scale")},
    "heads": {
        "mha": {"attention.num_heads": 4, "attention.num_kv_heads": 4},
        "gqa": {"attention.num_heads": 6, "attention.num_kv_heads": 3},
        "mqa": {"attention.num_heads": 4, "attention.num_kv_heads": 1},
    },
    "mechanism": {"softmax": {}, "sigmoid": {"attention.mixer": "sigmoid"}},
    "layers": {
        "one-mixer": {},
        "local-full": {"layers": ["local", "full"], "mixers.local.kind": "softmax", "mixers.local.sliding_window": 5},
        "linear-full": {
            "layers": ["linear", "full"],
            "mixers.linear.kind": LINEAR,
            "mixers.linear.num_heads": 2,
            "mixers.linear.head_dim": 8,
            "mixers.linear.chunk": 5,
        },
    },
    "block": {
        "serial": {},
        "sandwich": {"block.residual": "sandwich"},
        "parallel": {"block.kind": "parallel"},
        "deepnorm": {"block.residual": "deepnorm", "init.kind": "deepnorm"},
        "parallel-deepnorm": {"block.kind": "parallel", "block.residual": "deepnorm"},
    },
    "norm": {kind: {"block.norm": kind} for kind in ("rms", "layer", "rms_plain")},
    "feedforward": {
        **{kind: {"feedforward.kind": kind} for kind in ("gelu", "gelu_tanh", "relu", "relu2", "silu")},
        **{kind: {"feedforward.kind": kind} for kind in ("swiglu", "geglu", "geglu_tanh", "reglu")},
        "gelu-bias": {"feedforward.bias": True},
        "moe": {"feedforward.kind": "moe"},
        "moe-shared": {
            "feedforward.kind": "moe",
            "experts.num_shared_experts": 1,
            "experts.router_activation": "softmax",
            "experts.balance": "loss",
        },
        "moe-raw": {"feedforward.kind": "moe", "experts.normalize": False, "experts.kind": "relu2", "experts.balance": "none"},
    },
    "shift": {
        "unshifted": {},
        "chunks": {"shift.kind": "chunks"},
        "chunks-4": {"shift.kind": "chunks", "shift.tokens": 4},
        "lerp": {"shift.kind": "lerp"},
        "smear": {"shift.kind": "smear"},
    },
    "values": {"projected": {}, "embedded": {"value_embedding.kind": "layered"}},
    "skips": {
        "straight": {},
        "first": {"skips.first": True},
        "unet": {"skips.unet": True},
        "both": {"skips.first": True, "skips.unet": True},
    },
    "reach": {
        "everything": {},
        "window": {"attention.sliding_window": 4},
        "window-global": {"attention.sliding_window": 3, "attention.full_attention_interval": 2},
    },
    "softcap": {"uncapped": {}, "capped": {"attention.softcap": 2.0}},
    "scale": {"own-scale": {}, "scaled": {"attention.scale": 0.7}},
    "bias": {"non_alibi": {}, "biased": {"attention.bias": True}},
    "embedding": {
        "plain": {},
        "factorized": {"embedding.kind": "factorized", "embedding.rank": 5},
        "normed": {"embedding.norm": True},
    },
    "head": {"untied": {}, "tied": {"head.tied": True}, "capped-head": {"head.softcap": 3.0, "head.bias": True}},
    "init": {"normal": {}, "zero": {"init.kind": "zero_projections"}},
}

CHOICES: tuple[Choice, ...] = tuple((slot, value) for slot, values in SLOTS.items() for value in values)
DEFAULTS: dict[str, str] = {slot: next(iter(values)) for slot, values in SLOTS.items()}


def model_config(choices: dict[str, str]) -> ModelConfig:
    """The configuration with a value for every slot; those not given take their first. Raises ConfigError when it is refused."""
    values: dict[str, Any] = {}
    overrides = dict(BASE)
    for slot, value in (DEFAULTS | choices).items():
        overrides |= SLOTS[slot][value]
    for path, setting in overrides.items():
        *tables, last = path.split(".")
        table = values
        for name in tables:
            table = table.setdefault(name, {})
        table[last] = setting
    config = ModelConfig.model_validate(values)
    check_model(config)
    check_own_parts(config)
    return config


@cache
def legal_pairs() -> frozenset[frozenset[Choice]]:
    """Pairs of values of different slots that the configuration accepts, all else being default."""
    return frozenset(frozenset(pair) for pair in combinations(CHOICES, 2) if pair[0][0] != pair[1][0] and _accepted(dict(pair)))


def _accepted(choices: dict[str, str]) -> bool:
    try:
        model_config(choices)
    except ConfigError:
        return False
    return True


@cache
def rows() -> dict[str, ModelConfig]:
    """The covering array: configurations by a name that lists what differs from the defaults.

    Greedy: each row starts from a pair that is still missing and takes, slot after slot, the value that brings most of
    the missing pairs among those that go with all values taken before.
    """
    legal, draw = legal_pairs(), random.Random(0)
    missing = set(legal)
    found: dict[str, ModelConfig] = {}
    while missing:
        row = dict(min(missing, key=lambda pair: sorted(pair)))
        others = [slot for slot in SLOTS if slot not in row]
        draw.shuffle(others)
        for slot in others:
            row[slot] = _best(slot, row, legal, missing)
        missing -= {frozenset(pair) for pair in combinations(row.items(), 2)}
        found["_".join(row[slot] for slot in SLOTS if row[slot] != DEFAULTS[slot]) or "defaults"] = model_config(row)
    return found


def _best(slot: str, row: dict[str, str], legal: frozenset[frozenset[Choice]], missing: set[frozenset[Choice]]) -> str:
    pairs = {value: [frozenset([(slot, value), taken]) for taken in row.items()] for value in SLOTS[slot]}
    fitting = [value for value in SLOTS[slot] if legal.issuperset(pairs[value])]
    return max(fitting, key=lambda value: len(missing.intersection(pairs[value])))
