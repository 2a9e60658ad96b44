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
    layers = f"{c.num_layers} {BLOCKS[c.block.kind, c.block.residual]} of width {c.hidden_size}"
    return f"{layers}, {_heads(c)}, {_network(c)}; {', '.join(_parts(c))}"


def _heads(c: ModelConfig) -> str:
    a = c.attention
    kind = {1: "multi-query", a.num_heads: "multi-head"}.get(a.num_kv_heads, f"{a.num_kv_heads} key/value heads")
    mechanism = "" if a.mixer == "softmax" else f" {a.mixer}"
    return f"{a.num_heads} heads of {a.head_dim} ({kind}{mechanism})"


def _network(c: ModelConfig) -> str:
    e = c.experts
    return f"{e.top_k} of {e.num_experts} {e.kind} experts" if c.feedforward.kind == "moe" else f"{c.feedforward.kind} feed-forward"


def _parts(c: ModelConfig) -> list[str]:
    positions = {"none": "no rotary positions", "rope": "RoPE", "xpos": "xPos"}[c.rotary.kind]
    named = {
        positions: True,
        f"stretched {c.rotary.scaling.factor:g} times ({c.rotary.scaling.kind})": c.rotary.scaling.kind != "none",
        f"ALiBi on {c.alibi.num_heads} heads": c.alibi.num_heads,
        "absolute positions": c.embedding.absolute,
        f"{c.attention.qk_norm} QK norm": c.attention.qk_norm != "none",
        f"window of {c.attention.sliding_window}": c.attention.sliding_window,
        f"{c.shift.kind} token shift": c.shift.kind != "none",
        "value embeddings": c.value_embedding.kind != "none",
        "U-net skips": c.skips.unet,
        "first-embedding mix": c.skips.first,
        f"logits capped at {c.head.softcap:g}": c.head.softcap,
        "tied head": c.head.tied,
        f"context {c.max_seq_len:,}": True,
        f"vocabulary {c.vocab_size:,}": True,
    }
    return [name for name, there in named.items() if there]
