"""Positions: rotations of queries and keys, and biases on the logits. Off is an identity part."""

from __future__ import annotations

from andromeda.config.model import ModelConfig
from andromeda.model.position.alibi import Alibi, FoldedAlibi, NoAlibi
from andromeda.model.position.rotary import NoRotary, RoPE, XPos

__all__ = ["build_alibi", "build_rotary"]


def build_alibi(config: ModelConfig) -> NoAlibi:
    """The ALiBi part that the configuration names."""
    if not config.alibi.num_heads:
        return NoAlibi()
    return FoldedAlibi(config) if config.alibi.fold_into_qk else Alibi(config)


def build_rotary(config: ModelConfig) -> NoRotary:
    """The rotary part that the configuration names."""
    return {"none": NoRotary, "rope": RoPE, "xpos": XPos}[config.rotary.kind](config)
