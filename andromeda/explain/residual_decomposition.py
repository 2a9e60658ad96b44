"""The residual stream of one position as a sum of named parts, exact through all operations of the architecture.

A block adds its heads, its output bias and its feed-forward network. A norm (the final one, DeepNorm's) is linear for fixed statistics:
it scales every part alike. A mix with the first embedding and a U-net skip are sums too. So the parts add up to the stream at
every layer, to rounding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from andromeda.explain.trace import ForwardTrace, LayerTrace
from andromeda.model.specs import NormSpec, spec_of
from andromeda.model.transformer import Transformer
from andromeda.utils.errors import RequestError


class ResidualPart(NamedTuple):
    """A contribution to the residual stream. layer: from 0, -1 for the embedding. head: from 0, -1 for none."""

    kind: str
    """embedding, head, attention (if it is not a sum over heads), attention bias or feed-forward."""
    layer: int = -1
    head: int = -1


class ResidualParts(dict[ResidualPart, Tensor]):
    """Parts of one position's stream, each (C,)."""

    def plus(self, other: ResidualParts, factor: Tensor | float = 1.0) -> ResidualParts:
        """This plus `factor` times another."""
        return ResidualParts({part: self.get(part, 0.0) + factor * other.get(part, torch.zeros(())) for part in {**self, **other}})

    def __add__(self, other: ResidualParts) -> ResidualParts:
        """Part by part."""
        return self.plus(other)

    def __mul__(self, factor: Tensor | float) -> ResidualParts:
        """All parts scaled."""
        return ResidualParts({part: factor * x for part, x in self.items()})

    def total(self) -> Tensor:
        """The stream (C,)."""
        return torch.stack(list(self.values())).sum(0)

    def normed(self, norm: nn.Module) -> ResidualParts:
        """After a norm with the statistics of the whole stream."""
        at = self.total()
        return ResidualParts({part: apply_frozen_norm(norm, x, at) for part, x in self.items()})


def apply_frozen_norm(norm: nn.Module, x: Tensor, at: Tensor) -> Tensor:
    """What `norm` makes of x (C,) when its statistics are those of `at` (C,): linear in x, and the norm itself for x = at."""
    spec = spec_of(norm)
    if isinstance(norm, nn.Identity):
        return x
    if not isinstance(spec, NormSpec):
        raise RequestError(
            f"Direct logit attribution knows no rule for the norm {type(norm).__name__}: the norms are rms, rms_plain, layer."
        )
    centered, variance = (x - x.mean(), at.var(correction=0)) if spec.kind == "layer" else (x, at.square().mean())
    scaled: Tensor = centered * torch.rsqrt(variance + spec.eps)
    gain: Tensor | float = norm.weight if spec.gain else 1.0  # type: ignore[assignment]
    return scaled * gain


def block_contributions(layer: LayerTrace, number: int, row: int, position: int) -> tuple[ResidualParts, ResidualParts]:
    """Contributions of a block's attention and feed-forward network at one position."""
    attention = ResidualParts()
    if layer.heads is None:
        attention[ResidualPart("attention", number)] = layer.attention[row, position]
    else:
        for head in range(layer.heads.shape[2]):
            attention[ResidualPart("head", number, head)] = layer.heads[row, position, head]
        if layer.bias is not None:
            attention[ResidualPart("attention bias", number)] = layer.bias
    return attention, ResidualParts({ResidualPart("feed-forward", number): layer.feedforward[row, position]})


@torch.no_grad()
def decompose_residual(model: Transformer, seen: ForwardTrace, position: int, row: int = 0) -> ResidualParts:
    """The last hidden state (after the final norm) of one position, by part."""
    decoder: Any = model.decoder
    first = stream = ResidualParts({ResidualPart("embedding"): seen.embedded[row, position]})
    outputs: list[ResidualParts] = []
    for i, block in enumerate(decoder.blocks):
        if skip := decoder.skip_into(i):
            stream = stream.plus(outputs[skip[0]], skip[1])
        if factors := decoder.mixes[i].factors():
            stream = (stream * factors[0]).plus(first, factors[1])
        branches = block_contributions(seen.layers[i], i, row, position)
        stream = block.combine(stream, *branches, lambda norm, parts: parts.normed(norm))
        outputs.append(stream)
    return stream.normed(model.norm)


@dataclass(frozen=True)
class DirectAttribution:
    """Contributions to one logit; they and `bias` add up to `raw`."""

    parts: dict[ResidualPart, float]
    """Contributions to the target's logit."""
    lead: dict[ResidualPart, float]
    """Contributions to the difference between the target's logit and that of the other token."""
    bias: float
    """Head bias of the target."""
    lead_bias: float
    raw: float
    """The target's logit before the soft cap."""
    logit: float
    """The model's own logit: `raw`, soft-capped where the model has a cap."""
    error: float
    """The larger of two errors: of the sum against `raw`, and of the capped sum against the model's logit."""


@torch.no_grad()
def direct_attribution(
    model: Transformer, seen: ForwardTrace, position: int, target: int, against: int, *, row: int = 0
) -> DirectAttribution:
    """Shares at one position. Raises RequestError for a user-defined norm."""
    head, found = model.head, decompose_residual(model, seen, position, row)
    weight, rival = head.weight[target], head.weight[against]
    parts = {part: float(weight @ x) for part, x in found.items()}
    lead = {part: float((weight - rival) @ x) for part, x in found.items()}
    bias = float(head.bias[target]) if head.bias is not None else 0.0
    rival_bias = float(head.bias[against]) if head.bias is not None else 0.0
    logit = seen.logits[row, position, target]
    raw = float(weight @ model.norm(seen.layers[-1].output[row, position])) + bias
    summed = sum(parts.values()) + bias
    capped = head.softcap * math.tanh(summed / head.softcap) if head.softcap else summed
    error = max(abs(summed - raw), abs(capped - float(logit)))
    return DirectAttribution(parts, lead, bias, bias - rival_bias, raw, float(logit), error)
