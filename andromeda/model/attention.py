"""The only attention: project, norm, rotate, attend, project back. Everything that varies is a part.

Shapes: B batch, T time, S key time, C width, H query heads, G key/value heads, D head dim.
"""

from __future__ import annotations

from torch import Tensor, nn

from andromeda.config.model import ModelConfig
from andromeda.kernels.attention import Pattern, attend
from andromeda.model.context import Context
from andromeda.model.position import build_alibi, build_rotary, content_dim
from andromeda.model.qk_norm import build_qk_norm
from andromeda.model.registry import mechanism
from andromeda.model.value_embedding import build_value_mix


def layer_window(config: ModelConfig, layer: int) -> int:
    """Reach of a layer in tokens, 0 for unlimited: with `global_every` n, layers n-1, 2n-1, ... see everything."""
    every = config.attention.global_every
    return 0 if every and (layer + 1) % every == 0 else config.attention.window


@mechanism("softmax")
class Attention(nn.Module):
    """Causal softmax attention; multi-query, grouped or full by `kv_heads` (arXiv 1911.02150, 2305.13245).

    Query head h reads key/value head h // (H / G), as Llama and the flash kernels have it.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        a, D = config.attention, content_dim(config)
        self.layer, self.slot = layer, f"{layer}.attention"
        self.heads, self.kv_heads, self.head_dim = a.heads, a.kv_heads, a.head_dim
        self.query = nn.Linear(config.width, a.heads * D, bias=a.bias)
        self.key = nn.Linear(config.width, a.kv_heads * D, bias=a.bias)
        self.value = nn.Linear(config.width, a.kv_heads * a.head_dim, bias=a.bias)
        self.out = nn.Linear(a.heads * a.head_dim, config.width, bias=a.bias)
        self.qk_norm = build_qk_norm(config)
        self.alibi = build_alibi(config)
        self.value_mix = build_value_mix(config)
        self.window, self.softcap, self.backend = layer_window(config, layer), a.softcap, a.backend
        self.scale: float = (a.scale or self.qk_norm.scale) * build_rotary(config).logit_factor

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        """x (B, T, C) -> (B, T, C)."""
        q = self.query(x).unflatten(-1, (self.heads, -1))
        k = self.key(x).unflatten(-1, (self.kv_heads, -1))
        v = self.value(x).unflatten(-1, (self.kv_heads, -1))
        v = self.value_mix(v, ctx.values[self.layer])
        q, k = ctx.rotation(*self.qk_norm(q, k))
        q, k = self.alibi.fold(q, k, self.scale, ctx.cache.length)
        k, v = ctx.cache.extend(self.slot, k, v)
        return self.out(attend(q, k, v, self.pattern(ctx), self.backend).flatten(-2))

    def pattern(self, ctx: Context) -> Pattern:
        """What this layer computes in this pass."""
        documents = None if ctx.documents is None or ctx.key_documents is None else (ctx.documents, ctx.key_documents)
        return Pattern(self.scale, ctx.narrow(self.window), documents, self.alibi.slopes(ctx.ids.device), self.softcap)
