"""The only attention: project, norm, rotate, attend, project back. Everything that varies is a part.

Shapes: B batch, T time, S key time, C width, H query heads, G key/value heads, D head dim.
"""

from __future__ import annotations

from torch import Tensor, nn

from andromeda.config.derived import content_dim
from andromeda.config.model import ModelConfig
from andromeda.model import fused_qkv
from andromeda.model.forward_context import ForwardContext
from andromeda.model.layers import Linear
from andromeda.model.position import build_rotary
from andromeda.model.qk_norm import build_qk_norm
from andromeda.model.qk_preprocess import apply, apply_fused_qkv
from andromeda.model.value_embedding import build_value_mix
from andromeda.ops.attention import AttentionSpec, attend
from andromeda.ops.qk_preprocess import QKVLayout


def layer_window(config: ModelConfig, layer: int) -> int:
    """Reach of a layer in tokens, 0 for unlimited: with `full_attention_interval` n, layers n-1, 2n-1, ... see everything."""
    every = config.attention.full_attention_interval
    return 0 if every and (layer + 1) % every == 0 else config.attention.sliding_window


class Attention(nn.Module):
    """Causal softmax attention; multi-query, grouped or full by `num_kv_heads` (arXiv 1911.02150, 2305.13245).

    Query head h reads key/value head h // (H / G), as Llama and the flash kernels have it.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        a, D = config.attention, content_dim(config)
        self.heads, self.kv_heads = a.num_heads, a.num_kv_heads
        self.sizes = QKVLayout(a.num_heads, a.num_kv_heads, D, a.head_dim)
        self.query = Linear(config.hidden_size, a.num_heads * D, bias=a.bias)
        self.key = Linear(config.hidden_size, a.num_kv_heads * D, bias=a.bias)
        self.value = Linear(config.hidden_size, a.num_kv_heads * a.head_dim, bias=a.bias)
        self.out = Linear(a.num_heads * a.head_dim, config.hidden_size, bias=a.bias)
        self.qk_norm = build_qk_norm(config)
        self.value_mix = build_value_mix(config)
        self.window, self.softcap, self.backend = layer_window(config, layer), a.softcap, a.backend
        self.scale = (a.scale or self.qk_norm.scale) * build_rotary(config).logit_factor

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        """x (B, T, C) -> (B, T, C)."""
        # Values first after the queries, where fast kernels may begin to read.
        linears = (self.query, self.value, self.key)
        if fused_qkv.should_fuse(x, linears):
            whole = fused_qkv.project(x, linears)
            return self.out(
                self.attend_prepared(*apply_fused_qkv(whole, self.sizes, self.qk_norm, ctx.rotation, ctx.bias, self.scale), ctx)
            )
        q, v, k = (linear(x) for linear in linears)
        return self.out(self.attend_projected(q, k, v.contiguous(), ctx))

    def attend_projected(self, q: Tensor, k: Tensor, v: Tensor, ctx: ForwardContext) -> Tensor:
        """What lies between the projections: q (B, T, H D), k and v (B, T, G D) as projected -> (B, T, H Dv)."""
        q, k, v = q.unflatten(-1, (self.heads, -1)), k.unflatten(-1, (self.kv_heads, -1)), v.unflatten(-1, (self.kv_heads, -1))
        return self.attend_prepared(*apply(q, k, self.qk_norm, ctx.rotation, ctx.bias, self.scale), v, ctx)

    def attend_prepared(self, q: Tensor, k: Tensor, v: Tensor, ctx: ForwardContext) -> Tensor:
        """Prepared q (B, T, H, D) and k (B, T, G, D), and v (B, T, G, Dv) as projected -> (B, T, H Dv)."""
        k, v = ctx.state.update(k, self.value_mix(v, ctx.value))
        return self.core_attention(q, k, v, self.attention_spec(ctx)).flatten(-2)

    def attention_spec(self, ctx: ForwardContext) -> AttentionSpec:
        """What this layer computes in this pass."""
        return AttentionSpec(self.scale, ctx.clamp_window(self.window), ctx.documents, ctx.bias.slopes, self.softcap, ctx.index)

    def core_attention(self, q: Tensor, k: Tensor, v: Tensor, pattern: AttentionSpec) -> Tensor:
        """q (B, T, H, D), k (B, S, G, D), v (B, S, G, Dv) -> (B, T, H, Dv): what another mechanism does otherwise."""
        return attend(q, k, v, pattern, self.backend)
