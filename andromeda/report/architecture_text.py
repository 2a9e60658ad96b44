"""A model's architecture in words."""

from __future__ import annotations

from andromeda.config.model import ModelConfig

BLOCKS = {
    ("serial", "pre"): "pre-norm blocks",
    ("parallel", "pre"): "parallel pre-norm blocks",
    ("serial", "deepnorm"): "DeepNorm blocks",
    ("parallel", "deepnorm"): "parallel DeepNorm blocks",
}


def architecture(c: ModelConfig) -> str:
    """One sentence of what the model is made of."""
    return f"{c.depth} {BLOCKS[c.block.kind, c.block.residual]} of width {c.width}, {_heads(c)}, {_network(c)}; {', '.join(_parts(c))}"


def _heads(c: ModelConfig) -> str:
    a = c.attention
    kind = {1: "multi-query", a.heads: "multi-head"}.get(a.kv_heads, f"{a.kv_heads} key/value heads")
    mechanism = "" if a.mechanism == "softmax" else f" {a.mechanism}"
    return f"{a.heads} heads of {a.head_dim} ({kind}{mechanism})"


def _network(c: ModelConfig) -> str:
    e = c.experts
    return f"{e.active} of {e.count} {e.kind} experts" if c.feedforward.kind == "moe" else f"{c.feedforward.kind} feed-forward"


def _parts(c: ModelConfig) -> list[str]:
    positions = {"none": "no rotary positions", "rope": "RoPE", "xpos": "xPos"}[c.rotary.kind]
    named = {
        positions: True,
        f"stretched {c.rotary.scaling.factor:g} times ({c.rotary.scaling.kind})": c.rotary.scaling.kind != "none",
        f"ALiBi on {c.alibi.heads} heads": c.alibi.heads,
        "absolute positions": c.embedding.absolute,
        f"{c.attention.qk_norm} QK norm": c.attention.qk_norm != "none",
        f"window of {c.attention.window}": c.attention.window,
        f"{c.shift.kind} token shift": c.shift.kind != "none",
        "value embeddings": c.value_embedding.kind != "none",
        "U-net skips": c.skips.unet,
        "first-embedding mix": c.skips.first,
        f"logits capped at {c.head.softcap:g}": c.head.softcap,
        "tied head": c.head.tied,
        f"context {c.context:,}": True,
        f"vocabulary {c.vocab_size:,}": True,
    }
    return [name for name, there in named.items() if there]
