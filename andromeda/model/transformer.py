"""The model on one screen: embed, blocks, norm, head.

Shapes: B batch, T time, S key time, C width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from andromeda.config.model import ModelConfig
from andromeda.config.parts import check_own_parts
from andromeda.model.decoder_stack import build_decoder_stack
from andromeda.model.embedding import InputEmbedding
from andromeda.model.forward_context import ForwardContext
from andromeda.model.head import LMHead, build_heads
from andromeda.model.init import initialize
from andromeda.model.kv_cache.protocol import KVCache, NoKVCache
from andromeda.model.norm import build_norm
from andromeda.model.position import build_alibi, build_rotary
from andromeda.model.value_embedding import build_value_embedding


class Transformer(nn.Module):
    """A decoder-only language model, every technique of which is a part chosen by `config`."""

    def __init__(self, config: ModelConfig, *, embedding: nn.Module | None = None, seed: int = 0) -> None:
        """`embedding` replaces the configured provider and keeps its weights. Built on the meta device, nothing is filled."""
        super().__init__()
        self.config = config
        check_own_parts(config)
        with torch.random.fork_rng(devices=[]):
            # For parts of a user's own that fill themselves; the rest is filled below.
            torch.default_generator.manual_seed(seed)
            self.embedding = InputEmbedding(config, embedding)
            self.value_embedding = build_value_embedding(config)
            self.rotary, self.alibi = build_rotary(config), build_alibi(config)
            self.decoder = build_decoder_stack(config)
        # DeepNorm's blocks end in a norm of their own.
        self.norm = nn.Identity() if config.block.residual == "deepnorm" else build_norm(config)
        self.head = LMHead(config, self.embedding.tokens)
        self.task_heads = build_heads(config)
        self.without_cuda_graph = self._without_cuda_graph()
        if self.head.weight.device.type != "meta":
            initialize(self, config, seed)

    def _without_cuda_graph(self) -> tuple[str, ...]:
        """Names of the parts whose decoding step cannot be recorded as a CUDA graph; a part that does not say it can is one."""
        parts = [self.embedding.tokens, self.value_embedding]
        parts += [part for block in self.decoder.blocks for part in (block.attention, block.feedforward)]
        return tuple(dict.fromkeys(type(part).__name__ for part in parts if not getattr(part, "supports_cuda_graph", False)))

    def context(
        self,
        ids: Tensor,
        *,
        documents: Tensor | None = None,
        cache: KVCache | None = None,
        window: int = 0,
        span: int = 0,
    ) -> ForwardContext:
        """What one pass over ids (B, T) carries; arguments as in `hidden`."""
        cache = cache or NoKVCache()
        positions = cache.positions(ids.shape, documents, ids.device)
        keys = cache.documents(documents)
        wide = torch.promote_types(self.head.weight.dtype, torch.float32)
        return ForwardContext(
            ids=ids,
            positions=positions,
            rotation=self.rotary(positions, span or cache.length + ids.shape[1], wide),
            bias=self.alibi(cache.length, ids.shape[1], ids.device),
            cache=cache,
            state=cache.state(-1),
            documents=None if documents is None or keys is None else (documents, keys),
            index=cache.index,
            values=self.value_embedding(ids),
            window=window,
        )

    def hidden(
        self,
        ids: Tensor,
        *,
        documents: Tensor | None = None,
        cache: KVCache | None = None,
        window: int = 0,
        span: int = 0,
    ) -> Tensor:
        """Last hidden states (B, T, C) of ids (B, T), normalized, before the head.

        documents (B, T): numbers, one a document and never falling, that attention and token shift do not cross. cache: state of earlier
        tokens, which these follow; it is updated. window: narrows layers that have a window (0: as configured). span:
        length the sequence will have in the end, for dynamic frequency scaling (0: the tokens so far).
        """
        ctx = self.context(ids, documents=documents, cache=cache, window=window, span=span)
        x = self.norm(self.decoder(self.embedding(ctx), ctx))
        ctx.cache.advance(ids.shape[1], ctx.positions, ctx.documents and ctx.documents[1])
        return x

    def forward(
        self,
        ids: Tensor,
        *,
        documents: Tensor | None = None,
        cache: KVCache | None = None,
        window: int = 0,
        span: int = 0,
    ) -> Tensor:
        """Logits (B, T, V) of ids (B, T); arguments as in `hidden`."""
        return self.head(self.hidden(ids, documents=documents, cache=cache, window=window, span=span))
