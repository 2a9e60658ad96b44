"""How weights start. Every rule is a function of the module it fills, its place and one generator."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from andromeda.config.model import ModelConfig
from andromeda.model.block import deepnorm_beta

EMBEDDING_STD = 0.02
BRANCH_OUTPUTS = ("attention.out", "feedforward.out", "experts.out")


def initialise(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Fill all matrices in place; gains, biases and mixing weights keep the values that their parts gave them.

    normal: N(0, std), with std 1/sqrt(fan in) unless given, branch outputs divided by sqrt(2 depth) (as in GPT-2).
    zero_projections: the same, branch outputs and head zero, embeddings N(0, 1) (modded-nanogpt).
    deepnorm: Xavier normal with gain beta on value, output and feed-forward matrices (arXiv 2203.00555).
    """
    generator = torch.Generator().manual_seed(seed)
    seen: set[int] = set()
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or id(parameter) in seen or "qk_norm" in name:
            continue
        seen.add(id(parameter))
        std = _std(name, parameter, config)
        # Drawn on the CPU in float32, so that a seed gives one model whatever the device and precision.
        drawn = torch.randn(parameter.shape, generator=generator) * std
        with torch.no_grad():
            parameter.copy_(drawn)


def _std(name: str, parameter: Tensor, config: ModelConfig) -> float:
    fan_out, fan_in = parameter.shape[-2:]
    output = any(part in name for part in BRANCH_OUTPUTS)
    is_table = name.startswith("embedder.") and name != "embedder.tokens.project.weight" or "value_embedding" in name
    if config.init.kind == "zero_projections":
        if output or name == "head.weight":
            return 0.0
        return 1.0 if is_table else 1 / math.sqrt(fan_in)
    if is_table:
        return EMBEDDING_STD
    if config.init.kind == "deepnorm":
        plain = name == "head.weight" or any(part in name for part in ("attention.query", "attention.key", "router"))
        return (1.0 if plain else deepnorm_beta(config.depth)) * math.sqrt(2 / (fan_in + fan_out))
    std = config.init.std or 1 / math.sqrt(fan_in)
    return std / math.sqrt(2 * config.depth) if output else std
