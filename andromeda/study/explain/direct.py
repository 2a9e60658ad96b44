"""Direct logit attribution: how much each part of the model adds to a logit, by itself and on the way straight to the head."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from andromeda.model.transformer import Transformer
from andromeda.study.explain.ledger import Part, ledger
from andromeda.study.explain.trace import Trace


@dataclass(frozen=True)
class Direct:
    """Shares of one logit; they and `bias` add up to `raw`."""

    parts: dict[Part, float]
    """Shares of the target's logit."""
    lead: dict[Part, float]
    """Shares of the difference between the target's logit and that of the token beside it."""
    bias: float
    """Of the head, for the target."""
    lead_bias: float
    raw: float
    """The target's logit before a soft cap."""
    logit: float
    """The model's own logit: `raw`, soft-capped where the model has a cap."""
    error: float
    """Of the sum of the shares against `raw`, and of the capped sum against the model's own logit: the larger."""


@torch.no_grad()
def direct(model: Transformer, seen: Trace, position: int, target: int, beside: int, *, row: int = 0) -> Direct:
    """Shares at one position. Raises RequestError for a norm or block of a user's own, whose rule is not known."""
    head, found = model.head, ledger(model, seen, position, row)
    weight, rival = head.weight[target], head.weight[beside]
    parts = {part: float(weight @ x) for part, x in found.items()}
    lead = {part: float((weight - rival) @ x) for part, x in found.items()}
    bias = float(head.bias[target]) if head.bias is not None else 0.0
    rival_bias = float(head.bias[beside]) if head.bias is not None else 0.0
    logit = seen.logits[row, position, target]
    raw = float(weight @ model.norm(seen.layers[-1].output[row, position])) + bias
    summed = sum(parts.values()) + bias
    capped = head.softcap * math.tanh(summed / head.softcap) if head.softcap else summed
    error = max(abs(summed - raw), abs(capped - float(logit)))
    return Direct(parts, lead, bias, bias - rival_bias, raw, float(logit), error)
