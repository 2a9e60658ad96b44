"""How many parameters a model has, by part: counted on the model itself, built without memory on the meta device."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from andromeda.model.transformer import Transformer


@dataclass(frozen=True)
class Parameters:
    """Counts; a shared tensor (a tied head) counts once."""

    parts: dict[str, int]
    active: int
    """Those that take part in computing one token: of a table its one row, of the routed experts the chosen ones."""

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self.parts.values())


PARTS = (
    ("value embedding", "value_embedding."),
    ("attention", ".attention."),
    ("feed-forward", ".feedforward."),
    ("head", "head."),
    ("embedding", "embedding."),
)
"""A parameter belongs to the first part whose mark is in its name; what is left are norms and the weights of mixes."""
OTHER = "norms and mixes"


def count(model: Transformer) -> Parameters:
    """Parameters of a model, wherever it lies."""
    parts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        part = part_of(name)
        parts[part] = parts.get(part, 0) + parameter.numel()
    idle = _idle_rows(model) + _idle_experts(model)
    return Parameters(parts, sum(parts.values()) - idle)


def part_of(name: str) -> str:
    """The part that a parameter's name places it in."""
    dotted = f".{name}"
    return next((part for part, mark in PARTS if mark in dotted), OTHER)


def _idle_rows(model: Transformer) -> int:
    """Numbers in rows that a token does not read. A table that is also the head is read whole."""
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding) and m.weight is not model.head.weight]
    return sum((table.weight.shape[0] - 1) * table.weight.shape[1] for table in tables)


def _idle_experts(model: Transformer) -> int:
    """Numbers of experts that a token is not sent to."""
    e = model.config.experts
    routed = sum(p.numel() for name, p in model.named_parameters() if ".experts." in f".{name}")
    return routed // e.num_experts * (e.num_experts - e.top_k)
