"""How many floating-point operations a model needs, exactly, part by part.

Counted are matrix products: two operations (multiply, add) for each of their M N K terms. Norms, activations, softmax and
rotations are left out, as is the custom of every published figure; they are under one percent at any useful width.

Attention is counted by its mask. `causal` counts the pairs that the mask lets through: (T + 1) / 2 keys for a token of a
causal sequence of T, fewer with a window or with documents. `full` counts T keys for every token, as PaLM (arXiv
2204.02311, appendix B), Megatron (arXiv 2205.05198) and torchtitan do, so that figures can be set beside theirs.

Model FLOPs are what the mathematics needs: three forward passes' worth for one training step. Hardware FLOPs add what is
computed a second time: by checkpointing, and by flash attention's backward pass, which rebuilds the scores (2.5 times its
forward pass instead of 2, arXiv 2307.08691). MFU divides the first by the device's peak, HFU the second.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from andromeda.config.derived import GATED, content_dim, intermediate_size
from andromeda.config.model import ModelConfig
from andromeda.model.attention import layer_window
from andromeda.model.token_shift import Smear
from andromeda.utils.errors import ConfigError
from andromeda.utils.hardware import peak_flops

__all__ = [
    "attention_pairs",
    "forward_flops",
    "forward_flops_per_token",
    "hardware_flops_per_token",
    "mean_keys",
    "peak_flops",
    "prefill_flops",
    "training_flops_per_token",
]

Convention = Literal["causal", "full"]
Checkpointing = Literal["none", "selective", "full"]

OUTSIDE = ("embedding", "smear", "head")
"""Parts that are not in a block, so that no checkpointing recomputes them."""
SCORES = ("scores", "weighted values")


def attention_pairs(length: int, window: int = 0) -> int:
    """Pairs of query and key in one causal document: L(L+1)/2, or with a window w < L: w(w+1)/2 + (L-w)w."""
    reach = min(window, length) if window else length
    return reach * (reach + 1) // 2 + (length - reach) * reach


def mean_keys(sequence: int, window: int = 0, convention: Convention = "causal", documents: Sequence[int] = ()) -> float:
    """Keys that a token meets on average in a sequence of `sequence` tokens, made of documents of the given lengths (none: one)."""
    if documents and sum(documents) != sequence:
        raise ConfigError(f"The documents have {sum(documents)} tokens in all and the sequence has {sequence}: make them equal.")
    if convention == "full":
        return sequence
    return sum(attention_pairs(length, window) for length in documents or (sequence,)) / sequence


def forward_flops_per_token(
    config: ModelConfig,
    sequence: int,
    *,
    convention: Convention = "causal",
    documents: Sequence[int] = (),
    window: int = 0,
) -> dict[str, float]:
    """Forward FLOPs per token of each part, over all layers, when all logits are computed; parts the model lacks are left out.

    window: narrows the layers that have a window, as in `Transformer.hidden` (0: as configured).
    """
    keys = sum(
        mean_keys(sequence, min(own, window) if own and window else own, convention, documents)
        for own in (layer_window(config, layer) for layer in range(config.num_layers))
    )
    return forward_flops(config, keys)


def forward_flops(config: ModelConfig, keys: float) -> dict[str, float]:
    """The same for a token that meets `keys` keys, summed over the layers: one token of decoding, say."""
    a, C = config.attention, config.hidden_size
    D, content = a.head_dim, content_dim(config)
    parts = {
        "embedding": 2.0 * config.embedding.rank * C if config.embedding.kind == "factorized" else 0.0,
        "smear": 2.0 * min(Smear.CHANNELS, C) if config.shift.kind == "smear" else 0.0,
        "query": 2.0 * C * a.num_heads * content * config.num_layers,
        "key": 2.0 * C * a.num_kv_heads * content * config.num_layers,
        "value": 2.0 * C * a.num_kv_heads * D * config.num_layers,
        "scores": 2.0 * a.num_heads * D * keys,
        "weighted values": 2.0 * a.num_heads * D * keys,
        "out": 2.0 * a.num_heads * D * C * config.num_layers,
        **{name: flops * config.num_layers for name, flops in _feedforward(config).items()},
        "head": 2.0 * C * config.vocab_size,
    }
    return {name: flops for name, flops in parts.items() if flops}


def _feedforward(config: ModelConfig) -> dict[str, float]:
    """One layer's: of a mixture, the experts that a token passes through."""
    ff, e = config.feedforward, config.experts
    mixture = ff.kind == "moe"
    kind = e.kind if mixture else ff.kind
    network = 2.0 * (3 if kind in GATED else 2) * config.hidden_size * intermediate_size(config)
    if not mixture:
        return {"feed-forward": network}
    return {
        "router": 2.0 * config.hidden_size * e.num_experts,
        "experts": e.top_k * network,
        "shared experts": e.num_shared_experts * network,
    }


def training_flops_per_token(
    config: ModelConfig,
    sequence: int,
    *,
    convention: Convention = "causal",
    documents: Sequence[int] = (),
    window: int = 0,
) -> float:
    """Model FLOPs of forward and backward pass per token: every product has two gradients, each as large as itself."""
    return 3 * sum(forward_flops_per_token(config, sequence, convention=convention, documents=documents, window=window).values())


def hardware_flops_per_token(
    config: ModelConfig,
    sequence: int,
    checkpointing: Checkpointing = "none",
    *,
    flash: bool = True,
    convention: Convention = "causal",
    documents: Sequence[int] = (),
    window: int = 0,
) -> float:
    """What the device really computes per trained token: model FLOPs plus everything that is computed twice.

    `full` checkpointing runs every block's forward pass again. `selective` keeps the outputs of matrix products and of
    attention, and repeats only what is not counted here. flash: attention's backward pass rebuilds its scores.
    """
    parts = forward_flops_per_token(config, sequence, convention=convention, documents=documents, window=window)
    again = sum(flops for name, flops in parts.items() if name not in OUTSIDE) if checkpointing == "full" else 0.0
    return 3 * sum(parts.values()) + again + (parts["scores"] if flash else 0.0)


def prefill_flops(config: ModelConfig, sequence: int, *, convention: Convention = "causal") -> float:
    """Forward FLOPs of a whole prompt of `sequence` tokens whose last position alone gets logits."""
    parts = forward_flops_per_token(config, sequence, convention=convention)
    head = parts.pop("head")
    return sum(parts.values()) * sequence + head
