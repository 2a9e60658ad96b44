"""Initial weights. Each part says which rule holds for its matrices; one generator draws all of them, in the order of the parameters.

normal: N(0, std), with std 1/sqrt(fan in) unless given, branch outputs divided by sqrt(2 num_layers) (as in GPT-2), tables
N(0, 0.02). zero_projections: branch outputs and head zero, tables N(0, 1), the rest as before (modded-nanogpt). deepnorm: Xavier
normal, with gain beta on value, output and feed-forward matrices (arXiv 2203.00555), tables N(0, 0.02).
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from andromeda.config.model import ModelConfig

TABLE_STD = 0.02
Rule = Literal["input", "unit_gain", "output", "table", "head"]
"""What a matrix does: reads the residual stream (or an inner activation); the same where DeepNorm leaves the gain at one (queries,
keys, routers, whatever is outside of the blocks); writes into the residual stream; is looked up by ids; gives the logits."""


class InitScheme(NamedTuple):
    """The rules of `model.init` for a model of `num_layers` layers, and the generator that draws."""

    kind: str
    std: float
    num_layers: int
    rng: torch.Generator

    def fill(self, weight: Tensor, rule: Rule) -> None:
        """Draw a matrix (..., fan out, fan in) in place."""
        # Drawn on the CPU in float32, so that a seed gives one model whatever the device and dtype.
        drawn = torch.randn(weight.shape, generator=self.rng, dtype=torch.float32, device="cpu")
        with torch.no_grad():
            weight.copy_(drawn * self.spread(rule, *weight.shape[-2:]))

    def spread(self, rule: Rule, fan_out: int, fan_in: int) -> float:
        """Standard deviation of a matrix."""
        zero = self.kind == "zero_projections"
        if rule == "table":
            return 1.0 if zero else TABLE_STD
        if zero and rule in ("output", "head"):
            return 0.0
        if self.kind == "deepnorm":
            gain = deepnorm_beta(self.num_layers) if rule in ("input", "output") else 1.0
            return gain * math.sqrt(2 / (fan_in + fan_out))
        std = self.std or 1 / math.sqrt(fan_in)
        return std / math.sqrt(2 * self.num_layers) if rule == "output" else std


def deepnorm_beta(num_layers: int) -> float:
    """DeepNorm's gain of the initial value, output and feed-forward matrices: (8 num_layers)^(-1/4) for a decoder."""
    return (8 * num_layers) ** -0.25


def initialize(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Fill all matrices of `model` in place; gains, biases and mixing weights keep the values of their constructors.

    A module that has `init_weights(scheme)` fills its own parameters. Of other modules (of a user's own) parameters of two and more
    dimensions are drawn by the rule `input`, those of `nn.Embedding` as tables; modules whose `role` is "scalar", and those marked
    `keeps_weights`, keep what their constructors gave them.
    """
    scheme = InitScheme(config.init.kind, config.init.std, config.num_layers, torch.Generator().manual_seed(seed))
    _fill(model, scheme, None, set())


def _fill(module: nn.Module, scheme: InitScheme, role: str | None, seen: set[int]) -> None:
    if id(module) in seen or getattr(module, "keeps_weights", False):
        return
    seen.add(id(module))
    role = getattr(module, "role", role)
    fill = getattr(module, "init_weights", None)
    if fill is not None:
        fill(scheme)
    elif role != "scalar":
        for parameter in module._parameters.values():
            if parameter is not None and parameter.ndim >= 2 and id(parameter) not in seen:
                seen.add(id(parameter))
                scheme.fill(parameter, "table" if isinstance(module, nn.Embedding) else "input")
    for child in module.children():
        _fill(child, scheme, role, seen)
