"""Floating-point operations of a model, exact, part by part: each part says its own (`flops`), this module sums them.

Counted are matmuls: two operations (multiply, add) for each of their M N K terms. Norms, activations, softmax and rotations are
left out, as in all published figures; they are under one percent at any useful width.

Attention is counted by its mask. `causal` counts the pairs that the mask lets through: (T + 1) / 2 keys for a token of a causal
sequence of T, fewer with a window or with documents. `full` counts T keys for every token, as PaLM (arXiv 2204.02311, appendix B),
Megatron (arXiv 2205.05198) and torchtitan do, so that figures can be compared with theirs.

Model FLOPs are what the mathematics needs: three forward passes for one training step. Hardware FLOPs add what is computed a second
time: by activation checkpointing, and by flash attention's backward pass, which recomputes the scores (2.5 times its forward pass
instead of 2, arXiv 2307.08691). MFU divides the first by the device's peak, HFU the second.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Literal

from andromeda.config.model import ModelConfig
from andromeda.model.flops_of import flops_of
from andromeda.model.meta_model import shared_meta_model
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
    outside, inside = _split_flops(config, _keys(sequence, convention, documents, window))
    return _ordered(outside, inside)


def forward_flops(config: ModelConfig, keys: float) -> dict[str, float]:
    """The same for a token that meets `keys` keys, summed over the layers: one token of decoding, for example."""
    outside, inside = _split_flops(config, lambda window: keys / config.num_layers)
    return _ordered(outside, inside)


def _keys(sequence: int, convention: Convention, documents: Sequence[int], window: int) -> Callable[[int], float]:
    """How many keys a token meets on average in a layer with a window of its own, each window computed once."""
    found: dict[int, float] = {}

    def keys(own: int) -> float:
        reach = min(own, window) if own and window else own
        if reach not in found:
            found[reach] = mean_keys(sequence, reach, convention, documents)
        return found[reach]

    return keys


def _split_flops(config: ModelConfig, keys: Callable[[int], float]) -> tuple[dict[str, float], dict[str, float]]:
    """FLOPs per token of what is outside of the layers, which no activation checkpointing recomputes, and of all layers."""
    model = shared_meta_model(config)
    return _summed([flops_of(part, keys) for part in (model.embedding, model.head, *model.task_heads.values())]), _summed(
        flops_of(block, keys) for block in model.decoder.blocks
    )


def _summed(parts: Iterable[dict[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for part in parts:
        for name, flops in part.items():
            total[name] = total.get(name, 0.0) + flops
    return {name: flops for name, flops in total.items() if flops}


def _ordered(outside: dict[str, float], inside: dict[str, float]) -> dict[str, float]:
    """In the order of a forward pass: the head is last."""
    return {**{name: flops for name, flops in outside.items() if name != "head"}, **inside, "head": outside["head"]}


def training_flops_per_token(
    config: ModelConfig,
    sequence: int,
    *,
    convention: Convention = "causal",
    documents: Sequence[int] = (),
    window: int = 0,
) -> float:
    """Model FLOPs of forward and backward pass per token: every matmul has two gradients, each as large as itself."""
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

    `full` checkpointing runs every block's forward pass again. `selective` keeps the outputs of matmuls and of
    attention, and repeats only what is not counted here. flash: attention's backward pass rebuilds its scores.
    """
    outside, inside = _split_flops(config, _keys(sequence, convention, documents, window))
    again = sum(inside.values()) if checkpointing == "full" else 0.0
    return 3 * sum(_ordered(outside, inside).values()) + again + (inside.get("scores", 0.0) if flash else 0.0)


def prefill_flops(config: ModelConfig, sequence: int, *, convention: Convention = "causal") -> float:
    """Forward FLOPs of a whole prompt of `sequence` tokens whose last position alone gets logits."""
    parts = forward_flops_per_token(config, sequence, convention=convention)
    head = parts.pop("head")
    return sum(parts.values()) * sequence + head
