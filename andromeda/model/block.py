"""A layer: attention and feed-forward, one after the other or in parallel, pre-norm or DeepNorm.

Serial, pre-norm:    x = x + A(N1 x);  x = x + F(N2 x)
Parallel, pre-norm:  x = x + A(N x) + F(N x)                                     (arXiv 2204.02311)
Sandwich, serial:    x = x + N2 A(N1 x);  x = x + N4 F(N3 x)                     (arXiv 2408.00118)
DeepNorm, serial:    x = N1(a x + A(x));  x = N2(a x + F(x))                     (arXiv 2203.00555)
DeepNorm, parallel:  x = N(a x + A(x) + F(x)), with the same constants: the bound counts branches, of which there are as many
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from andromeda.config.model import ModelConfig
from andromeda.config.parts import mixer_of
from andromeda.model import add_norm_shift
from andromeda.model.feedforward import build_feedforward
from andromeda.model.flops_of import flops_of
from andromeda.model.forward_context import ForwardContext
from andromeda.model.norm import build_norm
from andromeda.model.specs import BlockSpec, FusableModule, spec_of
from andromeda.model.token_shift import build_shift

Normalize = Callable[[nn.Module, Any], Any]
"""(norm, a stream) -> the normalized stream."""
Reader = tuple[nn.Module, nn.Module, nn.Module]
"""A part that reads what a norm gives, after a shift, and nothing else; the norm; the shift."""


def deepnorm_alpha(depth: int) -> float:
    """What DeepNorm multiplies the residual stream with: (2 depth)^(1/4) for a decoder."""
    return (2 * depth) ** 0.25


def build_mixer(config: ModelConfig, layer: int) -> nn.Module:
    """The token mixer of layer number `layer`: a registered one, or a user's own `package.module:Class`. Raises ConfigError."""
    mixer: nn.Module = mixer_of(config, layer).build(layer)
    return mixer


class DecoderBlock(FusableModule):
    """What all layers have: a token mixer `attention` and a network `feedforward`."""

    attention: nn.Module
    feedforward: nn.Module

    def match_kernels(self) -> None:
        """Layers that sum and normalize by themselves have none."""

    def normalized_readers(self) -> Iterator[Reader]:
        """Parts that read what a norm gives, after a shift, and nothing else."""
        return iter(())

    def combine(self, x: Any, attention: Any, network: Any, normalize: Normalize) -> Any:
        """The stream after the block, from the stream before it and what both branches gave; any type with sums and factors will do.

        `normalize` applies a norm. `explain` calls this with streams that are sums of named parts.
        """
        del normalize
        return x + attention + network

    def flops(self, keys: Callable[[int], float]) -> dict[str, float]:
        """Of one token; keys(window) is how many keys a token meets on average."""
        return {**flops_of(self.attention, keys), **flops_of(self.feedforward, keys)}


class SerialBlock(DecoderBlock):
    """Attention, then feed-forward, each on the normalized stream."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm, self.feedforward_norm = build_norm(config), build_norm(config)
        self.attention_shift = build_shift(config, "attention")
        self.feedforward_shift = build_shift(config, "feedforward")
        self.attention = build_mixer(config, layer)
        self.feedforward = build_feedforward(config)
        self.width = config.hidden_size
        self.match_kernels()

    def match_kernels(self) -> None:
        """What computes residual sum, norm and shift before each branch."""
        self.norm_attention = add_norm_shift.match(spec_of(self.attention_norm), spec_of(self.attention_shift), self.width)
        self.norm_feedforward = add_norm_shift.match(spec_of(self.feedforward_norm), spec_of(self.feedforward_shift), self.width)

    def fused_spec(self) -> BlockSpec | None:
        """One branch after the other, each on the normalized stream."""
        return BlockSpec("serial_prenorm")

    def normalized_readers(self) -> Iterator[Reader]:
        """Both branches."""
        yield self.attention, self.attention_norm, self.attention_shift
        yield self.feedforward, self.feedforward_norm, self.feedforward_shift

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        """x (B, T, C) -> (B, T, C)."""
        y, x = self.norm_attention(x, None, self.attention_norm, self.attention_shift, ctx)
        y, x = self.norm_feedforward(x, self.attention(y, ctx), self.feedforward_norm, self.feedforward_shift, ctx)
        return x + self.feedforward(y)


class SandwichBlock(SerialBlock):
    """Serial, normalizing what each branch gives too, before it is added."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.attention_out_norm, self.feedforward_out_norm = build_norm(config), build_norm(config)

    def fused_spec(self) -> BlockSpec | None:
        """No kernel decodes it."""
        return None

    def combine(self, x: Any, attention: Any, network: Any, normalize: Normalize) -> Any:
        """Both branches normalized, then added."""
        return x + normalize(self.attention_out_norm, attention) + normalize(self.feedforward_out_norm, network)

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        """x (B, T, C) -> (B, T, C)."""
        y, x = self.norm_attention(x, None, self.attention_norm, self.attention_shift, ctx)
        branch = self.attention_out_norm(self.attention(y, ctx))
        y, x = self.norm_feedforward(x, branch, self.feedforward_norm, self.feedforward_shift, ctx)
        return x + self.feedforward_out_norm(self.feedforward(y))


class SerialDeepNormBlock(SerialBlock):
    """Serial, normalizing after each sum."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.alpha = deepnorm_alpha(config.num_layers)

    def normalized_readers(self) -> Iterator[Reader]:
        """None: the norms come after the branches."""
        return iter(())

    def combine(self, x: Any, attention: Any, network: Any, normalize: Normalize) -> Any:
        """Each branch added, then normalized."""
        x = normalize(self.attention_norm, x * self.alpha + attention)
        return normalize(self.feedforward_norm, x * self.alpha + network)

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        """x (B, T, C) -> (B, T, C)."""
        x = self.attention_norm(self.alpha * x + self.attention(self.attention_shift(x, ctx), ctx))
        return self.feedforward_norm(self.alpha * x + self.feedforward(self.feedforward_shift(x, ctx)))


class ParallelBlock(DecoderBlock):
    """Attention and feed-forward on the same normalized, shifted stream."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.norm = build_norm(config)
        self.shift = build_shift(config, "both")
        self.attention = build_mixer(config, layer)
        self.feedforward = build_feedforward(config)

    def normalized_readers(self) -> Iterator[Reader]:
        """Both branches."""
        yield self.attention, self.norm, self.shift
        yield self.feedforward, self.norm, self.shift

    def branches(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        """A(x) + F(x)."""
        x = self.shift(x, ctx)
        return self.attention(x, ctx) + self.feedforward(x)

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        """x (B, T, C) -> (B, T, C)."""
        return x + self.branches(self.norm(x), ctx)


class ParallelDeepNormBlock(ParallelBlock):
    """Parallel, normalizing after the sum."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.alpha = deepnorm_alpha(config.num_layers)

    def normalized_readers(self) -> Iterator[Reader]:
        """None: the norms come after the branches."""
        return iter(())

    def combine(self, x: Any, attention: Any, network: Any, normalize: Normalize) -> Any:
        """Both branches added, then normalized."""
        return normalize(self.norm, x * self.alpha + attention + network)

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        """x (B, T, C) -> (B, T, C)."""
        return self.norm(self.alpha * x + self.branches(x, ctx))


BLOCKS: dict[tuple[str, str], Callable[[ModelConfig, int], DecoderBlock]] = {
    ("serial", "pre"): SerialBlock,
    ("serial", "sandwich"): SandwichBlock,
    ("serial", "deepnorm"): SerialDeepNormBlock,
    ("parallel", "pre"): ParallelBlock,
    ("parallel", "deepnorm"): ParallelDeepNormBlock,
}


def build_block(config: ModelConfig, layer: int) -> DecoderBlock:
    """Layer number `layer`."""
    return BLOCKS[config.block.kind, config.block.residual](config, layer)
