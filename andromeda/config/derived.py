"""Figures that follow from a model's configuration and that several rooms need to agree on."""

from __future__ import annotations

import math

from andromeda.config.model import FULL, ModelConfig

FOLDED_DIMS = 4
"""Head dimensions that a folded ALiBi takes from the content."""
FOLDED_MAX_POSITIONS = 1 << 24
"""Positions that three base-256 digits tell apart."""
XPOS_BITS = math.log2(1.4 / 0.4)
"""Powers of two by which xPos's fastest pair decays over `scale_base` tokens: zeta is 0.4 / 1.4 there."""
GATED = ("swiglu", "geglu", "geglu_tanh", "reglu")


def in_steps(value: int | float, steps: int) -> int:
    """A part of a schedule in steps: a whole number as it is, a fraction (a float below 1) of a run of `steps` steps."""
    return value if isinstance(value, int) else round(value * steps)


def intermediate_size(model: ModelConfig) -> int:
    """Inner width of the feed-forward: `hidden`, or mult x width; gated kinds take two thirds of that, to a multiple of 64."""
    ff = model.feedforward
    kind = model.experts.kind if ff.kind == "moe" else ff.kind
    inner = ff.mlp_ratio * model.hidden_size
    return ff.intermediate_size or (max(64, round(inner * 2 / 3 / 64) * 64) if kind in GATED else int(inner))


def content_dim(model: ModelConfig) -> int:
    """Head dimensions of queries and keys that are projected: all but those that a folded ALiBi takes."""
    return model.attention.head_dim - (FOLDED_DIMS if model.alibi.num_heads and model.alibi.fold_into_qk else 0)


def rotated_dims(model: ModelConfig) -> int:
    """Head dimensions that rotary turns: `fraction` of the content dimensions, in whole pairs."""
    return round(model.rotary.fraction * content_dim(model) / 2) * 2


def original_max_seq_len(model: ModelConfig) -> int:
    """Tokens that the rotary frequencies were trained on, before they were scaled."""
    scaling = model.rotary.scaling
    return scaling.original_max_seq_len or round(model.max_seq_len / scaling.factor)


def smallest_scale_base(model: ModelConfig, bits: int) -> int:
    """The least xPos `scale_base` whose factors stay within 2^-bits and 2^bits over the whole context.

    Positions are counted from the middle of the context, so the largest factor is (1.4/0.4)^(context / 2 / base), with
    base = scale_base x the scaling's factor (the decay is scaled like the angles; dynamic scaling leaves short sequences alone).
    """
    scaling = model.rotary.scaling
    return math.ceil(XPOS_BITS * model.max_seq_len / 2 / bits / (1.0 if scaling.kind == "dynamic" else scaling.factor))


def mixer_name(model: ModelConfig, layer: int) -> str:
    """Name of the token mixer of layer number `layer`: `full` for `[model.attention]`, or a key of `model.mixers`."""
    name = model.layers[layer % len(model.layers)] if model.layers else FULL[0]
    return FULL[0] if name in FULL else name


def layer_window(model: ModelConfig, layer: int) -> int:
    """Sliding window of a layer in tokens, 0 for unlimited: with `full_attention_interval` n, layers n-1, 2n-1, ... see everything."""
    every = model.attention.full_attention_interval
    return 0 if every and (layer + 1) % every == 0 else model.attention.sliding_window


def layer_cycle(model: ModelConfig) -> int:
    """Number of layers after which windows, mixers and, with U-net skips, pairs of layers repeat."""
    return math.lcm(2 if model.skips.unet else 1, model.attention.full_attention_interval or 1, len(model.layers) or 1)
