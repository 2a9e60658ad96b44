"""Positions: rotations of queries and keys, and biases on the logits. Off is an identity part."""

from __future__ import annotations

from andromeda.config.model import ModelConfig
from andromeda.model.position.alibi import RESERVED, Alibi, FoldedAlibi, NoAlibi
from andromeda.model.position.rotary import NoRotary, Rotary, XPos


def build_alibi(config: ModelConfig) -> NoAlibi:
    """The ALiBi part that the configuration asks for."""
    if not config.alibi.heads:
        return NoAlibi()
    return FoldedAlibi(config) if config.alibi.fold else Alibi(config)


def build_rotary(config: ModelConfig) -> NoRotary | Rotary:
    """The rotary part that the configuration asks for, over the head dimensions that carry content."""
    if config.rotary.kind == "none":
        return NoRotary()
    return {"rope": Rotary, "xpos": XPos}[config.rotary.kind](config, content_dim(config))


def content_dim(config: ModelConfig) -> int:
    """Head dimensions of queries and keys that are projected: all but those that a folded ALiBi reserves."""
    return config.attention.head_dim - (RESERVED if config.alibi.heads and config.alibi.fold else 0)
