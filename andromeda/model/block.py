"""A layer: attention and feed-forward, one after the other or side by side, pre-norm or DeepNorm.

Serial, pre-norm:    x = x + A(N1 x);  x = x + F(N2 x)
Parallel, pre-norm:  x = x + A(N x) + F(N x)                                     (arXiv 2204.02311)
DeepNorm, serial:    x = N1(a x + A(x));  x = N2(a x + F(x))                     (arXiv 2203.00555)
DeepNorm, parallel:  x = N(a x + A(x) + F(x)), with the same constants: the bound counts branches, of which there are as many
"""

from __future__ import annotations

from torch import Tensor, nn

from andromeda.config.derived import find_class
from andromeda.config.model import MIXERS, ModelConfig
from andromeda.model.add_norm_shift import add_norm_shift
from andromeda.model.feedforward import build_feedforward
from andromeda.model.forward_context import ForwardContext
from andromeda.model.norm import build_norm
from andromeda.model.token_shift import build_shift


def deepnorm_alpha(depth: int) -> float:
    """What DeepNorm multiplies the residual stream with: (2 depth)^(1/4) for a decoder."""
    return (2 * depth) ** 0.25


def deepnorm_beta(depth: int) -> float:
    """DeepNorm's gain of the value, output and feed-forward matrices at the start: (8 depth)^(-1/4) for a decoder."""
    return (8 * depth) ** -0.25


def build_attention(config: ModelConfig, layer: int) -> nn.Module:
    """The attention of layer number `layer`: a registered mechanism, or a user's own `package.module:Class`."""
    name = config.attention.mixer
    return find_class(MIXERS.get(name, name), "model.attention.mixer")(config, layer)


class SerialBlock(nn.Module):
    """Attention, then feed-forward, each on the normalized stream."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm, self.feedforward_norm = build_norm(config), build_norm(config)
        self.attention_shift = build_shift(config, "attention")
        self.feedforward_shift = build_shift(config, "feedforward")
        self.attention = build_attention(config, layer)
        self.feedforward = build_feedforward(config)

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        """x (B, T, C)."""
        y, x = add_norm_shift(x, None, self.attention_norm, self.attention_shift, ctx)
        y, x = add_norm_shift(x, self.attention(y, ctx), self.feedforward_norm, self.feedforward_shift, ctx)
        return x + self.feedforward(y)


class SerialDeepNormBlock(SerialBlock):
    """Serial, normalizing after each sum."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.alpha = deepnorm_alpha(config.num_layers)

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        """x (B, T, C)."""
        x = self.attention_norm(self.alpha * x + self.attention(self.attention_shift(x, ctx), ctx))
        return self.feedforward_norm(self.alpha * x + self.feedforward(self.feedforward_shift(x, ctx)))


class ParallelBlock(nn.Module):
    """Attention and feed-forward on the same normalized, shifted stream."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.norm = build_norm(config)
        self.shift = build_shift(config, "both")
        self.attention = build_attention(config, layer)
        self.feedforward = build_feedforward(config)

    def branches(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        """A(x) + F(x)."""
        x = self.shift(x, ctx)
        return self.attention(x, ctx) + self.feedforward(x)

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        """x (B, T, C)."""
        return x + self.branches(self.norm(x), ctx)


class ParallelDeepNormBlock(ParallelBlock):
    """Parallel, normalizing after the sum."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.alpha = deepnorm_alpha(config.num_layers)

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        """x (B, T, C)."""
        return self.norm(self.alpha * x + self.branches(x, ctx))


BLOCKS: dict[tuple[str, str], type[nn.Module]] = {
    ("serial", "pre"): SerialBlock,
    ("serial", "deepnorm"): SerialDeepNormBlock,
    ("parallel", "pre"): ParallelBlock,
    ("parallel", "deepnorm"): ParallelDeepNormBlock,
}


def build_block(config: ModelConfig, layer: int) -> nn.Module:
    """Layer number `layer`."""
    return BLOCKS[config.block.kind, config.block.residual](config, layer)
