"""The blocks and the paths around them: plain, a learned mix with the first embedding, and U-net skips (modded-nanogpt)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from andromeda.config.model import ModelConfig
from andromeda.model.block import build_block
from andromeda.model.forward_context import ForwardContext


class NoEmbeddingMix(nn.Module):
    """The stream as it is."""

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """None: nothing is mixed."""
        return None

    def forward(self, x: Tensor, first: Tensor) -> Tensor:
        """x and first (B, T, C)."""
        return x


def add_scaled(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """x + w y for x and y (B, T, C) and a learned number w (1,)."""
    return x + weight.to(x.dtype) * y


def _another(x: Tensor) -> Tensor:
    """The same values as another tensor: a compiled mix of one tensor with itself would be a graph of its own."""
    return x.view_as(x)


class EmbeddingMix(nn.Module):
    """w0 x + w1 first, from (1, 0)."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.tensor([1.0, 0.0]))

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """Of the stream and of the first embedding, each ()."""
        return self.weights[0], self.weights[1]

    def forward(self, x: Tensor, first: Tensor) -> Tensor:
        """x and first (B, T, C)."""
        w = self.weights.to(x.dtype)
        return w[0] * x + w[1] * first


class DecoderStack(nn.Module):
    """All blocks, one after the other."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(build_block(config, layer) for layer in range(config.num_layers))
        self.mixes = nn.ModuleList(EmbeddingMix() if config.skips.first else NoEmbeddingMix() for _ in range(config.num_layers))

    def compile_mixes(self, **options: Any) -> None:
        """Compile what mixes the residual stream between blocks, which is one pass over it then; options: torch.compile's.

        Uncompiled, a learned factor is a broadcast tensor: six passes forward and backward, a twelfth of the step of preset `speedrun`.
        """
        for mix in self.mixes:
            if any(True for _ in mix.parameters()):
                mix.compile(**options)

    def skip_into(self, index: int) -> tuple[int, Tensor] | None:
        """The layer whose output is added before layer `index`, and its factor (); None without a skip."""
        del index
        return None

    def layer(self, index: int, x: Tensor, first: Tensor, ctx: ForwardContext) -> Tensor:
        """One block with its mix."""
        return self.blocks[index](self.mixes[index](x, first), ctx.for_layer(index))

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        """x (B, T, C), the embedded tokens."""
        first = _another(x)
        for index in range(len(self.blocks)):
            x = self.layer(index, x, first, ctx)
        return x


class UNetDecoderStack(DecoderStack):
    """The second half adds the outputs of the first half, last in first out, each with a learned weight that starts at one."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.skip_weights = nn.Parameter(torch.ones(config.num_layers // 2))
        self.add_skip: Callable[[Tensor, Tensor, Tensor], Tensor] = add_scaled

    def compile_mixes(self, **options: Any) -> None:
        """Also the skips."""
        super().compile_mixes(**options)
        self.add_skip = torch.compile(add_scaled, **options)

    def skip_into(self, index: int) -> tuple[int, Tensor] | None:
        """Last in, first out: layer depth - 1 - index, for the second half."""
        source = len(self.blocks) - 1 - index
        half = len(self.skip_weights)
        return (source, self.skip_weights[half - 1 - source]) if source < half else None

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        """x (B, T, C), the embedded tokens. With an odd depth the middle block has no partner."""
        first = _another(x)
        outputs: list[Tensor] = []
        half, depth = len(self.skip_weights), len(self.blocks)
        weights = self.skip_weights.split(1)
        for index in range(depth):
            if index >= depth - half:
                x = self.add_skip(x, outputs.pop(), weights[index - depth + half])
            x = self.layer(index, x, first, ctx)
            if index < half:
                outputs.append(_another(x))
        return x


def build_decoder_stack(config: ModelConfig) -> DecoderStack:
    """The stack that the configuration asks for."""
    return UNetDecoderStack(config) if config.skips.unet else DecoderStack(config)
