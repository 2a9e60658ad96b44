"""Softmax attention: project, normalize, rotate, attend, project back. Everything that varies is a part.

Shapes: B batch, T time, S key time, C width, H query heads, G key/value heads, D head dimensions that are projected, Dv of values.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from andromeda.config.derived import content_dim, layer_window
from andromeda.config.model import ModelConfig
from andromeda.model import fused_qkv, qk_preprocess
from andromeda.model.forward_context import ForwardContext
from andromeda.model.kv_cache.protocol import CacheBytes
from andromeda.model.layers import Linear
from andromeda.model.position import build_rotary
from andromeda.model.qk_norm import build_qk_norm
from andromeda.model.specs import FusableModule, MixerSpec, spec_of
from andromeda.model.tensor_plan import TensorPlan, check_divides, plan_of, splits_kv_heads
from andromeda.model.value_embedding import build_value_mix
from andromeda.ops.attention import AttentionSpec, attend
from andromeda.ops.qk_preprocess import QKVLayout


class Attention(FusableModule):
    """Causal softmax attention; multi-query, grouped or full by `num_kv_heads` (arXiv 1911.02150, 2305.13245).

    Query head h reads key/value head h // (H / G), as Llama and the flash kernels have it.
    """

    supports_cuda_graph = True
    supports_split_sequences = True

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        a, D = config.attention, content_dim(config)
        self.heads, self.kv_heads = a.num_heads, a.num_kv_heads
        self.sizes = QKVLayout(a.num_heads, a.num_kv_heads, D, a.head_dim)
        self.query = Linear(config.hidden_size, a.num_heads * D, bias=a.bias, init="unit_gain")
        self.key = Linear(config.hidden_size, a.num_kv_heads * D, bias=a.bias, init="unit_gain")
        self.value = Linear(config.hidden_size, a.num_kv_heads * a.head_dim, bias=a.bias)
        self.out = Linear(a.num_heads * a.head_dim, config.hidden_size, bias=a.bias, init="output")
        self.qk_norm = build_qk_norm(config)
        self.value_mix = build_value_mix(config, layer)
        self.window, self.softcap, self.backend = layer_window(config, layer), a.softcap, a.backend
        rotary = build_rotary(config)
        self.rotary_spec = spec_of(rotary)
        self.scale = (a.scale or self.qk_norm.scale) * rotary.logit_factor
        self.match_kernels()

    def match_kernels(self) -> None:
        """How queries, values and keys are projected, and what prepares queries and keys for attention."""
        # Values come right after the queries, at an offset where fast kernels may begin to read.
        self.project_qkv = fused_qkv.match((self.query, self.value, self.key))
        self.qk_kernel = qk_preprocess.match(spec_of(self.qk_norm), self.rotary_spec)

    def fused_spec(self) -> MixerSpec | None:
        """Softmax attention."""
        return MixerSpec("softmax_attention")

    def tensor_plan(self, count: int) -> TensorPlan:
        """Each process has its query heads, and their keys and values; a single key/value head is whole on all."""
        check_divides(count, self.heads, "model.attention.num_heads")
        split = {"query.weight": 0, "query.bias": 0, "out.weight": 1}
        if splits_kv_heads(count, self.kv_heads):
            split |= {f"{name}.{kind}": 0 for name in ("key", "value") for kind in ("weight", "bias")}
        plan = TensorPlan(split, ("out.bias",)) | plan_of(self.qk_norm, count, "attention").below("qk_norm")
        return plan if self.value_mix is None else plan | plan_of(self.value_mix, count, "attention").below("value_mix")

    def keep_heads(self, heads: range, kv_heads: range) -> None:
        """Compute only these query heads and key/value heads from now on; the parameters are theirs."""
        self.heads, self.kv_heads = len(heads), len(kv_heads)
        self.sizes = self.sizes._replace(heads=len(heads), kv_heads=len(kv_heads))

    def input_layers(self) -> tuple[Linear, ...]:
        """Layers that read the input of the part itself."""
        return self.query, self.key, self.value

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        """x (B, T, C) -> (B, T, C)."""
        linears = (self.query, self.value, self.key)
        qkv = self.project_qkv(x, linears)
        if qkv is None:
            q, v, k = (linear(x) for linear in linears)
            return self.out(self.attend_projected(q, k, v.contiguous(), ctx))
        parts = self.qk_kernel, self.qk_norm, ctx.rotation, ctx.bias, self.scale
        return self.out(self.attend_prepared(*qk_preprocess.preprocess_qkv(qkv, self.sizes, *parts), ctx))

    def attend_projected(self, q: Tensor, k: Tensor, v: Tensor, ctx: ForwardContext) -> Tensor:
        """q (B, T, H D), k (B, T, G D) and v (B, T, G Dv) as projected -> (B, T, H Dv)."""
        q, k, v = q.unflatten(-1, (self.heads, -1)), k.unflatten(-1, (self.kv_heads, -1)), v.unflatten(-1, (self.kv_heads, -1))
        q, k = qk_preprocess.preprocess(q, k, self.qk_kernel, self.qk_norm, ctx.rotation, ctx.bias, self.scale)
        return self.attend_prepared(q, k, v, ctx)

    def attend_prepared(self, q: Tensor, k: Tensor, v: Tensor, ctx: ForwardContext) -> Tensor:
        """Prepared q (B, T, H, D) and k (B, T, G, D), and v (B, T, G, Dv) as projected -> (B, T, H Dv)."""
        if self.value_mix is not None:
            v = self.value_mix(v, ctx.value)
        return ctx.state.attend(self.core_attention, q, k, v, self.attention_spec(ctx)).flatten(-2)

    def attention_spec(self, ctx: ForwardContext) -> AttentionSpec:
        """What the attention kernel computes in this pass."""
        return AttentionSpec(self.scale, ctx.clamp_window(self.window), ctx.documents, ctx.bias.slopes, self.softcap, ctx.index)

    def core_attention(self, q: Tensor, k: Tensor, v: Tensor, pattern: AttentionSpec) -> Tensor:
        """q (B, T, H, D), k (B, S, G, D), v (B, S, G, Dv) -> (B, T, H, Dv): what another mechanism overrides."""
        return attend(q, k, v, pattern, self.backend)

    def flops(self, keys: Callable[[int], float]) -> dict[str, float]:
        """Of one token; keys(window) is how many keys a token meets on average. Scores are counted with all D dimensions."""
        scores = 2.0 * self.heads * self.sizes.v_head_dim * keys(self.window)
        projections = {name: getattr(self, name).flops() for name in ("query", "key", "value")}
        return {**projections, "scores": scores, "weighted values": scores, "out": self.out.flops()}

    def cache_bytes(self, dtype: torch.dtype) -> CacheBytes:
        """Keys and values. A window does not shorten them: the cache keeps all."""
        return CacheBytes(per_token=2 * self.kv_heads * self.sizes.v_head_dim * dtype.itemsize)

    def saved_per_token(self) -> int:
        """Numbers that the backward pass keeps at least: queries, keys, values and the output."""
        return 2 * (self.heads + self.kv_heads) * self.sizes.v_head_dim

    def describe(self) -> str:
        """What it is, in a few words."""
        window = f", window of {self.window}" if self.window else ""
        return f"attention of {self.heads} heads ({self.kv_heads} of keys and values{window})"
