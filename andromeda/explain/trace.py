"""One forward pass with its intermediate results: the residual stream, the output of each head and network, the attention weights.

Branch outputs come from hooks on the model's own modules. Attention weights come from the model's own attention call with unit
vectors as values: for any mixer that averages values, the averages of unit vectors are its weights.

Shapes: B batch, T tokens, C hidden size, H query heads, G key/value heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from andromeda.model.transformer import Transformer
from andromeda.ops.attention import AttentionSpec
from andromeda.ops.attention.eager import weighted_values

RELATIVE_TOLERANCE = 1e-6
"""Relative difference up to which a recomputed branch output counts as equal."""


@dataclass
class LayerTrace:
    """Intermediate results of one block."""

    attention: Tensor
    """(B, T, C), added to the residual stream."""
    feedforward: Tensor
    """(B, T, C)."""
    output: Tensor
    """(B, T, C), the residual stream after the block."""
    heads: Tensor | None = None
    """(B, T, H, C): each head's share of `attention`, without the bias; None if attention is not a sum over heads."""
    bias: Tensor | None = None
    """(C,): of the output projection."""
    weights: Tensor | None = None
    """(B, H, T, T): weight of each key for each query; None if the mixer does not average values."""
    weights_error: float = 0.0
    """Largest difference between values averaged by `weights` and the attention output."""


@dataclass
class ForwardTrace:
    """One pass over ids (B, T)."""

    ids: Tensor
    embedded: Tensor
    """(B, T, C), input of the first block."""
    layers: list[LayerTrace]
    logits: Tensor
    """(B, T, V)."""


@torch.no_grad()
def trace(model: Transformer, ids: Tensor, documents: Tensor | None = None) -> ForwardTrace:
    """Run `model` over ids (B, T) and record the intermediate results; documents as in `Transformer.hidden`."""
    kept: dict[str, Any] = {}
    blocks: Any = model.decoder.blocks
    with ExitStack() as hooks:
        hooks.enter_context(hooked(model.embedding, _keep(kept, "embedded")))
        for i, block in enumerate(blocks):
            hooks.enter_context(hooked(block, _keep(kept, f"{i}.output")))
            hooks.enter_context(hooked(block.attention, _keep(kept, f"{i}.attention")))
            hooks.enter_context(hooked(block.feedforward, _keep(kept, f"{i}.feedforward")))
            hooks.enter_context(_watched(block.attention, kept, f"{i}.mix"))
        logits = model(ids, documents=documents)
    layers = [_layer(block, kept, i) for i, block in enumerate(blocks)]
    return ForwardTrace(ids, kept["embedded"], layers, logits)


def _layer(block: Any, kept: dict[str, Any], i: int) -> LayerTrace:
    layer = LayerTrace(kept[f"{i}.attention"], kept[f"{i}.feedforward"], kept[f"{i}.output"])
    seen = kept.get(f"{i}.mix")
    if seen is not None:
        layer.weights, layer.weights_error = _weights(block.attention, *seen)
        layer.heads, layer.bias = _heads(block.attention, seen[-1], layer.attention)
    return layer


def _weights(attention: Any, q: Tensor, k: Tensor, v: Tensor, pattern: AttentionSpec, mixed: Tensor) -> tuple[Tensor | None, float]:
    """Weights (B, H, T, S) and their error against the attention output; None if the mixer does not average values."""
    B, S, G = k.shape[:3]
    units = torch.eye(S, dtype=v.dtype, device=v.device)[None, :, None].expand(B, S, G, S)
    with _reference(attention):
        weights = type(attention).core_attention(attention, q, k, units, pattern).transpose(1, 2)
    error = float((weighted_values(weights, v) - mixed).abs().max())
    return (weights, error) if error <= RELATIVE_TOLERANCE * max(1.0, float(mixed.abs().max())) else (None, error)


def _heads(attention: Any, mixed: Tensor, output: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The output projection applied to each head of mixed (B, T, H, D) by itself, and its bias."""
    out = getattr(attention, "out", None)
    if not isinstance(out, nn.Linear) or out.in_features != mixed.shape[2] * mixed.shape[3]:
        return None, None
    heads = torch.einsum("bthd,chd->bthc", mixed, out.weight.unflatten(1, mixed.shape[2:]))
    whole = heads.sum(2) if out.bias is None else heads.sum(2) + out.bias
    if float((whole - output).abs().max()) > RELATIVE_TOLERANCE * max(1.0, float(output.abs().max())):
        return None, None
    return heads, out.bias


@contextmanager
def hooked(module: nn.Module, hook: Callable[..., Any]) -> Iterator[None]:
    """A forward hook within a `with` block."""
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _keep(kept: dict[str, Any], name: str) -> Callable[..., None]:
    def hook(module: nn.Module, given: Any, output: Tensor) -> None:
        kept[name] = output

    return hook


@contextmanager
def _watched(attention: Any, kept: dict[str, Any], name: str) -> Iterator[None]:
    """Write down q, k, v, the pattern and the result of every call of `core_attention`; a mechanism without one is left alone."""
    if not hasattr(attention, "core_attention"):
        yield
        return
    own = attention.core_attention

    def core_attention(q: Tensor, k: Tensor, v: Tensor, pattern: AttentionSpec) -> Tensor:
        mixed: Tensor = own(q, k, v, pattern)
        kept[name] = (q, k, v, pattern, mixed)
        return mixed

    attention.core_attention = core_attention
    try:
        yield
    finally:
        del attention.core_attention


@contextmanager
def _reference(attention: Any) -> Iterator[None]:
    """The eager backend, which takes values of any dimension."""
    before = getattr(attention, "backend", None)
    if before is not None:
        attention.backend = "eager"
    try:
        yield
    finally:
        if before is not None:
            attention.backend = before


@dataclass(frozen=True)
class LogitLens:
    """Predictions after the embedding and after each of L layers; N = L + 1, K most likely tokens."""

    tokens: Tensor
    """(N, T, K), the most likely first."""
    probabilities: Tensor
    """(N, T, K)."""
    target: Tensor
    """(N, T): probability of the target token."""
    entropy: Tensor
    """(N, T) in bits."""
    error: float
    """Largest difference between the logits of the last layer and the model's."""


@torch.no_grad()
def logit_lens(model: Transformer, seen: ForwardTrace, target: int, *, row: int = 0, top_k: int = 5) -> LogitLens:
    """The logit lens (nostalgebraist, 2020): final norm and head applied to the residual stream after every layer.

    With DeepNorm the stream is normalized already and the final norm is the identity; with U-net skips a layer of the first half
    is shown without the skip connections that it feeds.
    """
    found: list[tuple[Tensor, ...]] = []
    logits = seen.logits[row]
    for x in (seen.embedded, *(layer.output for layer in seen.layers)):
        logits = model.head(model.norm(x[row]))
        log_p = logits.log_softmax(-1)
        top = log_p.topk(min(top_k, log_p.shape[-1]), -1)
        entropy = -(log_p.exp() * log_p).sum(-1) / torch.log(torch.tensor(2.0, dtype=log_p.dtype))
        found.append((top.indices, top.values.exp(), log_p[:, target].exp(), entropy))
    tokens, probabilities, on_target, entropy = (torch.stack(parts) for parts in zip(*found, strict=True))
    return LogitLens(tokens, probabilities, on_target, entropy, float((logits - seen.logits[row]).abs().max()))
