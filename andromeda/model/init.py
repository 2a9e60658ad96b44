"""How weights start. Every rule is a function of a matrix's place and shape; one generator fills the whole model."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from andromeda.config.model import ModelConfig
from andromeda.model.block import deepnorm_beta
from andromeda.model.embedding import FactorizedEmbedding, TokenEmbedding

if TYPE_CHECKING:
    from andromeda.model.transformer import Transformer

EMBEDDING_STD = 0.02
TABLES = ("tokens.weight", "tokens.table.weight", "absolute.table.weight", "value_embedding.table.weight")
UNIT_GAIN = ("attention.query", "attention.key", "router.project", "embedding.", "head.")
"""Matrices whose gain DeepNorm leaves at one; all others are value, output and feed-forward matrices."""


def initialize(model: Transformer, config: ModelConfig, seed: int) -> None:
    """Fill all matrices in place; gains, biases, mixing weights and a user's own embedding keep the values they came with.

    normal: N(0, std), with std 1/sqrt(fan in) unless given, branch outputs divided by sqrt(2 depth) (as in GPT-2),
    embeddings N(0, 0.02).
    zero_projections: branch outputs and head zero, embeddings N(0, 1), the rest as before (modded-nanogpt).
    deepnorm: Xavier normal, with gain beta on value, output and feed-forward matrices (arXiv 2203.00555), embeddings N(0, 0.02).
    """
    generator = torch.Generator().manual_seed(seed)
    own = () if isinstance(model.embedding.tokens, TokenEmbedding | FactorizedEmbedding) else model.embedding.tokens.parameters()
    kept = {id(parameter) for parameter in own}
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or "qk_norm" in name or id(parameter) in kept:
            continue
        # Drawn on the CPU in float32, so that a seed gives one model whatever the device and precision.
        drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float32, device="cpu") * _std(name, parameter, config)
        with torch.no_grad():
            parameter.copy_(drawn)


def _std(name: str, parameter: Tensor, config: ModelConfig) -> float:
    fan_out, fan_in = parameter.shape[-2:]
    zero = config.init.kind == "zero_projections"
    output = "out" in name.split(".")
    if name.endswith(TABLES):
        return 1.0 if zero else EMBEDDING_STD
    if zero and (output or name == "head.weight"):
        return 0.0
    if config.init.kind == "deepnorm":
        gain = 1.0 if any(part in name for part in UNIT_GAIN) else deepnorm_beta(config.num_layers)
        return gain * math.sqrt(2 / (fan_in + fan_out))
    std = config.init.std or 1 / math.sqrt(fan_in)
    return std / math.sqrt(2 * config.num_layers) if output else std
