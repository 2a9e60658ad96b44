"""Andromeda for transformers: the whole model in one file, which needs transformers alone.

Every technique is one class or function, and the configuration's tables say which of them a model has. Caching, left padding
(`attention_mask`), packed sequences (restarting `position_ids`, no mask) and gradient checkpointing work for all of them.

Shapes: B batch, T time, S keys, C hidden size, H query heads, G key/value heads, D head dimensions, V vocabulary size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_andromeda import AndromedaConfig

FOLDED_DIMS = 4
"""Head dimensions that a folded ALiBi keeps free of content during training; here the bias is added to the logits."""
RMS_EPS = torch.finfo(torch.float32).eps
QUERIES = 256
"""Queries at a time where attention is computed with explicit logits."""

# what a pass carries


class AndromedaCache(DynamicCache):
    """Keys and values, and the last inputs of every token shift."""

    def __init__(self, config: AndromedaConfig | None = None) -> None:
        super().__init__(config=config)
        self.shift_states: dict[str, Tensor] = {}

    def shift_state(self, slot: str, x: Tensor, tokens: int) -> Tensor:
        """The last `tokens` inputs (B, tokens, C) of the shift `slot` before x (B, T, C), which follows them from now on."""
        past = self.shift_states.get(slot)
        if past is None:
            past = x.new_zeros(x.shape[0], tokens, x.shape[2])
        self.shift_states[slot] = torch.cat([past, x], 1)[:, -tokens:]
        return past

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self.shift_states = {slot: x.index_select(0, beam_idx.to(x.device)) for slot, x in self.shift_states.items()}

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.shift_states = {slot: x.repeat_interleave(repeats, 0) for slot, x in self.shift_states.items()}

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.shift_states = {slot: x[indices] for slot, x in self.shift_states.items()}

    def crop(self, *args: Any) -> None:
        if self.shift_states:
            raise NotImplementedError("A model with token shift cannot take tokens back: decode without an assistant model.")
        super().crop(*args)


@dataclass(frozen=True)
class AndromedaPass:
    """What one forward pass carries besides the hidden states."""

    positions: Tensor
    """Position of each token since its document began (B, T)."""
    query_table: tuple[Tensor, Tensor] | None
    """cos and sin (B, 1, T, R/2) for queries, None without rotary positions."""
    key_table: tuple[Tensor, Tensor] | None
    """The same for keys; of all S keys where they are cached before they are rotated."""
    masks: dict[str, Any]
    """Attention mask of each layer type."""
    cache: Any
    kwargs: dict[str, Any]

    def before(self, slot: str, x: Tensor, tokens: int) -> list[Tensor]:
        """x (B, T, C) from 1, 2, ... `tokens` tokens before; zero where that lies before the document's beginning."""
        if self.cache is None:
            past = x.new_zeros(x.shape[0], tokens, x.shape[2])
        elif isinstance(self.cache, AndromedaCache):
            past = self.cache.shift_state(slot, x, tokens)
        else:
            raise ValueError("This model has token shift: give no past_key_values, or an AndromedaCache of its modeling file.")
        joined = torch.cat([past, x], 1)
        shifted = [joined[:, tokens - d : joined.shape[1] - d] for d in range(1, tokens + 1)]
        return [y * (self.positions >= d)[..., None] for d, y in enumerate(shifted, start=1)]


# norms, activations, linear maps


class AndromedaRMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight; the plain variant has no weight."""

    def __init__(self, size: int, eps: float, plain: bool = False) -> None:
        super().__init__()
        self.eps = eps
        self.weight = None if plain else nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], None if self.weight is None else self.weight.to(x.dtype), self.eps)


class AndromedaLayerNorm(nn.Module):
    """(x - mean) / sqrt(variance + eps) * weight, without a bias."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weight.to(x.dtype), None, self.eps)


def build_norm(config: AndromedaConfig) -> nn.Module:
    kind, size, eps = config.block["norm"], config.hidden_size, config.block["eps"]
    return AndromedaLayerNorm(size, eps) if kind == "layer" else AndromedaRMSNorm(size, eps, plain=kind == "rms_plain")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x) * F.relu(x),
    "silu": F.silu,
}
GATES: dict[str, Callable[[Tensor], Tensor]] = {"swiglu": F.silu, "geglu": F.gelu, "geglu_tanh": ACTIVATIONS["gelu_tanh"], "reglu": F.relu}


class AndromedaQuantizedLinear(nn.Module):
    """x W^T + b with W (N, K) in 8 bits, integers or the bytes of float8 (e4m3), and a scale for each row."""

    weight: Tensor
    scale: Tensor

    def __init__(self, inputs: int, outputs: int, bias: bool, kind: str) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(outputs, inputs, dtype=torch.int8 if kind == "int8" else torch.uint8))
        self.register_buffer("scale", torch.ones(outputs, 1))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, dequantized(self.weight, self.scale, x.dtype), self.bias)


def dequantized(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """A matrix (N, K) in 8 bits times the scale of each row (N, 1)."""
    values = weight if weight.dtype == torch.int8 else weight.view(torch.float8_e4m3fn)
    return values.to(dtype) * scale.to(dtype)


def build_linear(config: AndromedaConfig, inputs: int, outputs: int, bias: bool) -> nn.Module:
    """A linear map of a layer."""
    if config.quantization:
        return AndromedaQuantizedLinear(inputs, outputs, bias, config.quantization)
    return nn.Linear(inputs, outputs, bias=bias)


# positions


def content_dim(config: AndromedaConfig) -> int:
    """Head dimensions of queries and keys that are projected."""
    folded = config.alibi["num_heads"] and config.alibi.get("fold_into_qk")
    return config.attention["head_dim"] - (FOLDED_DIMS if folded else 0)


def alibi_slopes(config: AndromedaConfig) -> Tensor:
    """ALiBi slope of each query head (H,), zero for heads without it (arXiv 2108.12409)."""
    heads = config.alibi["num_heads"]
    closest = 1 << (heads.bit_length() - 1)
    h = torch.arange(heads, dtype=torch.float64)
    slopes = torch.exp2(torch.where(h < closest, h + 1, h - closest + 0.5) * (-8 / closest)) / config.alibi.get("scale", 1.0)
    return F.pad(slopes, (0, config.attention["num_heads"] - heads))


class AndromedaRotary:
    """Rotary positions (arXiv 2104.09864), with xPos's decay (arXiv 2212.10554) and frequency scaling where configured."""

    def __init__(self, config: AndromedaConfig) -> None:
        r, scaling = config.rotary, config.rotary.get("scaling") or {}
        self.kind, self.theta = r["kind"], r["theta"]
        self.dim = round(r.get("fraction", 1.0) * content_dim(config) / 2) * 2
        self.interleaved = r.get("layout", "half") == "interleaved"
        self.scale_base, self.context = r.get("scale_base", 512), config.max_position_embeddings
        self.scaling, self.factor = scaling.get("kind", "none"), scaling.get("factor", 1.0)
        self.original = scaling.get("original_max_seq_len") or round(self.context / self.factor)
        self.fast, self.slow, self.ramp = scaling.get("beta_fast", 32.0), scaling.get("beta_slow", 1.0), scaling.get("ramp", "index")
        self.logit_factor = (0.1 * math.log(self.factor) + 1) ** 2 if self.scaling == "yarn" else 1.0
        a, biased = config.attention, config.alibi["num_heads"]
        split = r.get("heads", "all") == "non_alibi"
        kv_heads = a["num_kv_heads"]
        unrotated = biased * kv_heads // a["num_heads"] if split else kv_heads - round(r.get("head_fraction", 1.0) * kv_heads)
        self.unrotated = (biased if split else unrotated * a["num_heads"] // kv_heads, unrotated)

    @property
    def follows_length(self) -> bool:
        """Whether frequencies change with the length, so that keys are cached before they are rotated."""
        return self.scaling == "dynamic"

    def frequencies(self, length: int, device: torch.device) -> tuple[Tensor, float]:
        """Inverse frequency of each pair (R/2,), and by how much the context was extended."""
        pairs = torch.arange(0, self.dim, 2, dtype=torch.float64, device=device)
        inverse = self.theta ** (-pairs / self.dim)
        if self.scaling == "linear":
            return inverse / self.factor, self.factor
        if self.scaling in ("ntk", "dynamic"):
            grown = max(length / self.original, 1.0)
            factor = self.factor if self.scaling == "ntk" else self.factor * grown - (self.factor - 1)
            return (self.theta * factor ** (self.dim / max(self.dim - 2, 1))) ** (-pairs / self.dim), factor
        if self.scaling in ("yarn", "llama3"):
            kept = self._kept(inverse)
            return inverse / self.factor * (1 - kept) + inverse * kept, self.factor
        return inverse, 1.0

    def _kept(self, inverse: Tensor) -> Tensor:
        """YaRN and Llama 3: share of each pair's frequency that stays (arXiv 2309.00071, 2407.21783)."""
        if self.ramp == "rotations" or self.scaling == "llama3":
            rotations = self.original * inverse / (2 * math.pi)
            return ((rotations - self.slow) / (self.fast - self.slow)).clamp(0, 1)

        def index(rotations: float) -> float:
            return self.dim * math.log(self.original / (rotations * 2 * math.pi)) / (2 * math.log(self.theta))

        low, high = max(math.floor(index(self.fast)), 0), min(math.ceil(index(self.slow)), self.dim - 1)
        pairs = torch.arange(self.dim // 2, dtype=torch.float64, device=inverse.device)
        return 1 - ((pairs - low) / max(high - low, 1e-3)).clamp(0, 1)

    def table(self, positions: Tensor, length: int, dtype: torch.dtype, key: bool) -> tuple[Tensor, Tensor]:
        """cos and sin (B, 1, T, R/2) of `positions` (B, T), with xPos's decay in them: that of queries, or of keys."""
        inverse, extended = self.frequencies(length, positions.device)
        t = positions[:, None, :, None].double()
        cos, sin = (t * inverse).cos(), (t * inverse).sin()
        if self.kind == "xpos":
            zeta = (torch.arange(0, self.dim, 2, dtype=torch.float64, device=t.device) / self.dim + 0.4) / 1.4
            grow = zeta ** ((t - self.context // 2) / (self.scale_base * extended))
            cos, sin = (cos / grow, sin / grow) if key else (cos * grow, sin * grow)
        return cos.to(dtype), sin.to(dtype)

    def rotate(self, x: Tensor, table: tuple[Tensor, Tensor] | None, key: bool) -> Tensor:
        """x (B, H, T, D) with the first R dimensions of each head rotated, those of ALiBi's heads excepted where configured."""
        if table is None:
            return x
        unrotated = self.unrotated[key]
        cos, sin = table
        rest = x[:, unrotated:, :, self.dim :]
        rotated = x[:, unrotated:, :, : self.dim].to(cos.dtype)
        a, b = rotated.unflatten(-1, (-1, 2)).unbind(-1) if self.interleaved else rotated.chunk(2, -1)
        halves = (a * cos - b * sin, b * cos + a * sin)
        y = torch.stack(halves, -1).flatten(-2) if self.interleaved else torch.cat(halves, -1)
        return torch.cat([x[:, :unrotated], torch.cat([y.to(x.dtype), rest], -1)], 1)


# token shift


class AndromedaChunkShift(nn.Module):
    """Equal groups of channels from 0, 1, ... n tokens before; channels left over stay."""

    def __init__(self, config: AndromedaConfig, slot: str) -> None:
        super().__init__()
        self.tokens, self.slot = config.shift["tokens"], slot

    def forward(self, x: Tensor, ctx: AndromedaPass) -> Tensor:
        size = x.shape[-1] // (self.tokens + 1)
        earlier = ctx.before(self.slot, x, self.tokens)
        moved = [y[..., d * size : (d + 1) * size] for d, y in enumerate(earlier, start=1)]
        return torch.cat([x[..., :size], *moved, x[..., (self.tokens + 1) * size :]], -1)


class AndromedaLerpShift(nn.Module):
    """Each channel is a learned mix of this token and the one before (as in RWKV, arXiv 2305.13048)."""

    def __init__(self, config: AndromedaConfig, slot: str) -> None:
        super().__init__()
        self.slot = slot
        self.mix = nn.Parameter(torch.linspace(0, 1, config.hidden_size))

    def forward(self, x: Tensor, ctx: AndromedaPass) -> Tensor:
        return torch.lerp(x, ctx.before(self.slot, x, 1)[0], self.mix.to(x.dtype))


class AndromedaSmear(nn.Module):
    """The embedding gets a gated share of the embedding before (modded-nanogpt)."""

    def __init__(self, config: AndromedaConfig) -> None:
        super().__init__()
        self.channels = min(12, config.hidden_size)
        self.gate = nn.Linear(self.channels, 1, bias=False)
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, ctx: AndromedaPass) -> Tensor:
        before = ctx.before("smear", x, 1)[0]
        return x + self.weight.to(x.dtype) * torch.sigmoid(self.gate(x[..., : self.channels])) * before


class AndromedaNoShift(nn.Module):
    """Every channel is of this token."""

    def forward(self, x: Tensor, ctx: AndromedaPass) -> Tensor:
        return x


def build_shift(config: AndromedaConfig, slot: str) -> nn.Module:
    kinds = {"chunks": AndromedaChunkShift, "lerp": AndromedaLerpShift}
    kind = config.shift["kind"]
    return kinds[kind](config, slot) if kind in kinds else AndromedaNoShift()


# attention


class AndromedaQKNorm(nn.Module):
    """Normalization of queries and keys before they are rotated, and the softmax scale that belongs to it."""

    def __init__(self, config: AndromedaConfig, a: dict[str, Any]) -> None:
        super().__init__()
        D = content_dim(config)
        self.kind = a.get("qk_norm", "none")
        self.scale = {"l2": 10.0, "l2_head_scale": 1.0}.get(self.kind, 1 / math.sqrt(D))
        if self.kind == "l2_head_scale":
            self.temperature = nn.Parameter(torch.full((a["num_heads"], 1), 10.0))
        if self.kind == "rms_dim_scale":
            self.eps = config.block["eps"]
            self.query_scale, self.key_scale = nn.Parameter(torch.ones(D)), nn.Parameter(torch.ones(D))
        if self.kind == "l2_dim_scale":
            self.query_scale = nn.Parameter(torch.full((a["num_heads"], D), D**0.25))
            self.key_scale = nn.Parameter(torch.full((a["num_kv_heads"], D), D**0.25))

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """q (B, T, H, D), k (B, T, G, D)."""
        if self.kind == "none":
            return q, k
        if self.kind == "rms":
            return F.rms_norm(q, q.shape[-1:], None, RMS_EPS), F.rms_norm(k, k.shape[-1:], None, RMS_EPS)
        if self.kind == "rms_dim_scale":
            scales = self.query_scale.to(q.dtype), self.key_scale.to(k.dtype)
            return F.rms_norm(q, q.shape[-1:], scales[0], self.eps), F.rms_norm(k, k.shape[-1:], scales[1], self.eps)
        q, k = F.normalize(q, dim=-1).to(q.dtype), F.normalize(k, dim=-1).to(k.dtype)
        if self.kind == "l2_head_scale":
            q = q * self.temperature.to(q.dtype)
        if self.kind == "l2_dim_scale":
            q, k = q * self.query_scale.to(q.dtype), k * self.key_scale.to(k.dtype)
        return q, k


class AndromedaAttention(nn.Module):
    """Causal attention with grouped key/value heads: project, norm, rotate, attend, project back."""

    def __init__(self, config: AndromedaConfig, layer: int) -> None:
        super().__init__()
        a, C, D = config.attention_of(layer), config.hidden_size, content_dim(config)
        self.config, self.layer, self.layer_type = config, layer, config.layer_types[layer]
        self.heads, self.kv_heads, self.head_dim = a["num_heads"], a["num_kv_heads"], a["head_dim"]
        self.num_key_value_groups, self.is_causal = self.heads // self.kv_heads, True
        bias = a.get("bias", False)
        self.q_proj = build_linear(config, C, self.heads * D, bias)
        self.k_proj = build_linear(config, C, self.kv_heads * D, bias)
        self.v_proj = build_linear(config, C, self.kv_heads * self.head_dim, bias)
        self.o_proj = build_linear(config, self.heads * self.head_dim, C, bias)
        self.qk_norm, self.rotary = AndromedaQKNorm(config, a), AndromedaRotary(config)
        self.scaling = (a.get("scale", 0.0) or self.qk_norm.scale) * self.rotary.logit_factor
        self.softcap, self.sigmoid = a.get("softcap", 0.0), a.get("mixer", "softmax") == "sigmoid"
        self.explicit = explicit_logits(config, layer)
        mixed = config.value_embedding["kind"] != "none"
        self.value_mix = nn.Parameter(torch.tensor(config.value_embedding.get("init", 0.5))) if mixed else None

    def forward(self, x: Tensor, embedded_values: Tensor | None, ctx: AndromedaPass) -> Tensor:
        q = self.q_proj(x).unflatten(-1, (self.heads, -1))
        k = self.k_proj(x).unflatten(-1, (self.kv_heads, -1))
        v = self.v_proj(x).unflatten(-1, (self.kv_heads, -1))
        if self.value_mix is not None:
            v = torch.lerp(v, embedded_values.to(v.dtype), self.value_mix.to(v.dtype))
        q, k = self.qk_norm(q, k)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        q = self.rotary.rotate(q, ctx.query_table, key=False)
        late = self.rotary.follows_length
        if not late:
            k = self.rotary.rotate(k, ctx.key_table, key=True)
        if ctx.cache is not None:
            k, v = ctx.cache.update(k, v, self.layer)
        if late and ctx.key_table is not None:
            cos, sin = ctx.key_table
            k = self.rotary.rotate(k, (cos[:, :, -k.shape[2] :], sin[:, :, -k.shape[2] :]), key=True)
        return self.o_proj(self.attend(q, k, v, ctx).flatten(-2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, ctx: AndromedaPass) -> Tensor:
        """q (B, H, T, D), k and v (B, G, S, D) -> (B, T, H, D): by transformers' kernels, or with explicit logits where those cannot."""
        mask = ctx.masks[self.layer_type]
        if self.explicit:
            return self.attend_explicitly(q, k, v, mask)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        window = self.config.sliding_window if self.layer_type == "sliding_attention" else None
        return attend(self, q, k, v, mask, dropout=0.0, scaling=self.scaling, sliding_window=window, **ctx.kwargs)[0]

    def attend_explicitly(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """The same in at least float32, some queries at a time, with ALiBi, soft cap, or sigmoid in the place of softmax."""
        S, T, wide = k.shape[2], q.shape[2], torch.promote_types(q.dtype, torch.float32)
        k, v = (x.to(wide).repeat_interleave(self.num_key_value_groups, 1) for x in (k, v))
        seen = mask if mask.dtype == torch.bool else mask == 0
        keys, outputs = torch.arange(S, device=q.device), []
        for first in range(0, T, QUERIES):
            last = min(first + QUERIES, T)
            logits = q[:, :, first:last].to(wide) @ k.transpose(2, 3) * self.scaling
            if self.softcap:
                logits = self.softcap * torch.tanh(logits / self.softcap)
            if self.config.alibi["num_heads"]:
                index = torch.arange(S - T + first, S - T + last, device=q.device)
                logits = logits + self.slopes(q)[:, None, None] * (keys - index[:, None])
            logits = logits.masked_fill(~seen[:, :, first:last], torch.finfo(wide).min)
            weights = torch.sigmoid(logits - math.log(self.config.max_position_embeddings)) if self.sigmoid else logits.softmax(-1)
            outputs.append(weights @ v)
        return torch.cat(outputs, 2).to(q.dtype).transpose(1, 2)

    def slopes(self, q: Tensor) -> Tensor:
        """ALiBi's slopes (H,); those that were folded into queries during training were rounded to the queries' type."""
        slopes = alibi_slopes(self.config).to(q.device)
        if self.config.alibi.get("fold_into_qk"):
            slopes = (slopes / self.scaling).to(q.dtype).double() * self.scaling
        return slopes.to(torch.promote_types(q.dtype, torch.float32))


def explicit_logits(config: AndromedaConfig, layer: int) -> bool:
    """Whether a layer's attention needs what the kernels behind `attn_implementation` cannot compute."""
    a = config.attention_of(layer)
    return bool(config.alibi["num_heads"] or a.get("softcap") or a.get("mixer", "softmax") == "sigmoid")


def eager_attention(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, **kwargs: Any) -> tuple:
    """attn_implementation "eager": plain matmuls and a softmax in float32."""
    k, v = (x.repeat_interleave(module.num_key_value_groups, 1) for x in (k, v))
    logits = q @ k.transpose(2, 3) * scaling
    logits = logits if mask is None else logits + mask
    weights = logits.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
    return (weights @ v).transpose(1, 2), weights


# feed-forward


class AndromedaMLP(nn.Module):
    """W_down act(W_up x), or W_down (gate(W_gate x) * W_up x) for gated kinds."""

    def __init__(self, config: AndromedaConfig, kind: str, bias: bool) -> None:
        super().__init__()
        C, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = build_linear(config, C, inner, bias) if kind in GATES else None
        self.up_proj = build_linear(config, C, inner, bias)
        self.down_proj = build_linear(config, inner, C, bias)
        self.activation = (ACTIVATIONS | GATES)[kind]

    def forward(self, x: Tensor) -> Tensor:
        if self.gate_proj is None:
            return self.down_proj(self.activation(self.up_proj(x)))
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class AndromedaRouter(nn.Module):
    """Scores in float32, top-k by scores plus a bias of `rate` for each vote (arXiv 2408.15664)."""

    votes: Tensor

    def __init__(self, config: AndromedaConfig) -> None:
        super().__init__()
        e = config.experts
        self.top_k, self.activation, self.normalize, self.rate = e["top_k"], e["router_activation"], e["normalize"], e["bias_update_rate"]
        self.weight = nn.Parameter(torch.empty(e["num_experts"], config.hidden_size))
        self.register_buffer("votes", torch.zeros(e["num_experts"], dtype=torch.int64))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (N, C) -> gates (N, k) and the experts chosen (N, k)."""
        wide = torch.promote_types(x.dtype, torch.float32)
        logits = F.linear(x.to(wide), self.weight.to(wide))
        scores = torch.sigmoid(logits) if self.activation == "sigmoid" else logits.softmax(-1)
        votes = self.votes.float()
        chosen = (scores + self.rate * (votes - votes.mean())).topk(self.top_k, -1).indices
        gates = scores.gather(-1, chosen)
        if self.normalize:
            gates = gates / gates.sum(-1, keepdim=True).clamp_min(torch.finfo(gates.dtype).tiny)
        return gates, chosen


class AndromedaExperts(nn.Module):
    """The experts' weights, stacked: (E, inner, C) in, (E, C, inner) out; in 8 bits with the scale of each row where quantized."""

    def __init__(self, config: AndromedaConfig) -> None:
        super().__init__()
        e, C, inner = config.experts, config.hidden_size, config.intermediate_size
        self.num_experts, self.gated, self.quantization = e["num_experts"], e["kind"] in GATES, config.quantization
        if self.gated:
            self.add_stack("gate_proj", inner, C)
        self.add_stack("up_proj", inner, C)
        self.add_stack("down_proj", C, inner)
        self.activation = (ACTIVATIONS | GATES)[e["kind"]]

    def add_stack(self, name: str, outputs: int, inputs: int) -> None:
        shape = self.num_experts, outputs, inputs
        if not self.quantization:
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))
            return
        self.register_buffer(name, torch.zeros(shape, dtype=torch.int8 if self.quantization == "int8" else torch.uint8))
        self.register_buffer(f"{name}_scale", torch.ones(*shape[:2], 1))

    def linear(self, name: str, expert: int, x: Tensor) -> Tensor:
        """x (N, K) through one matrix of an expert."""
        weight = getattr(self, name)[expert]
        return F.linear(x, dequantized(weight, getattr(self, f"{name}_scale")[expert], x.dtype) if self.quantization else weight)

    def forward(self, x: Tensor, gates: Tensor, chosen: Tensor) -> Tensor:
        """x (N, C) through the experts `chosen` (N, k), weighted by `gates` (N, k)."""
        total = torch.zeros_like(x)
        for expert in range(self.num_experts):
            token, place = torch.where(chosen == expert)
            inner = self.linear("up_proj", expert, x[token])
            inner = self.activation(self.linear("gate_proj", expert, x[token])) * inner if self.gated else self.activation(inner)
            y = self.linear("down_proj", expert, inner) * gates[token, place, None].to(x.dtype)
            total = total.index_add(0, token, y)
        return total


class AndromedaMoE(nn.Module):
    """Shared experts for all tokens, and the top-k of the routed ones for each."""

    def __init__(self, config: AndromedaConfig) -> None:
        super().__init__()
        self.router, self.experts = AndromedaRouter(config), AndromedaExperts(config)
        kind, shared = config.experts["kind"], config.experts["num_shared_experts"]
        self.shared_experts = nn.ModuleList(AndromedaMLP(config, kind, bias=False) for _ in range(shared))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2)
        y = self.experts(flat, *self.router(flat))
        for expert in self.shared_experts:
            y = y + expert(flat)
        return y.view_as(x)


# layers


class AndromedaDecoderLayer(GradientCheckpointingLayer):
    """Attention and feed-forward, one after the other or side by side; pre-norm, sandwich norms (arXiv 2408.00118), or DeepNorm."""

    def __init__(self, config: AndromedaConfig, layer: int) -> None:
        super().__init__()
        ff, self.parallel = config.feedforward, config.block["kind"] == "parallel"
        self.deepnorm = config.block["residual"] == "deepnorm"
        self.alpha = (2 * config.num_hidden_layers) ** 0.25 if self.deepnorm else 1.0
        self.input_layernorm = build_norm(config)
        self.input_shift = build_shift(config, f"{layer}.input")
        self.self_attn = AndromedaAttention(config, layer)
        if not self.parallel:
            self.post_attention_layernorm = build_norm(config)
            self.mlp_shift = build_shift(config, f"{layer}.mlp")
        sandwich = config.block["residual"] == "sandwich"
        self.attention_out_norm = build_norm(config) if sandwich else nn.Identity()
        self.feedforward_out_norm = build_norm(config) if sandwich else nn.Identity()
        self.mlp = AndromedaMoE(config) if ff["kind"] == "moe" else AndromedaMLP(config, ff["kind"], ff.get("bias", False))
        self.first_mix = nn.Parameter(torch.tensor([1.0, 0.0])) if config.skips["first"] else None

    def forward(self, x: Tensor, first: Tensor, embedded_values: Tensor | None, ctx: AndromedaPass) -> Tensor:
        """x (B, T, C), and the first embeddings (B, T, C) for models that mix them in."""
        if self.first_mix is not None:
            w = self.first_mix.to(x.dtype)
            x = w[0] * x + w[1] * first
        if self.parallel:
            y = self.input_shift(x if self.deepnorm else self.input_layernorm(x), ctx)
            y = self.self_attn(y, embedded_values, ctx) + self.mlp(y)
            return self.input_layernorm(self.alpha * x + y) if self.deepnorm else x + y
        if self.deepnorm:
            x = self.input_layernorm(self.alpha * x + self.self_attn(self.input_shift(x, ctx), embedded_values, ctx))
            return self.post_attention_layernorm(self.alpha * x + self.mlp(self.mlp_shift(x, ctx)))
        y = self.self_attn(self.input_shift(self.input_layernorm(x), ctx), embedded_values, ctx)
        x = x + self.attention_out_norm(y)
        return x + self.feedforward_out_norm(self.mlp(self.mlp_shift(self.post_attention_layernorm(x), ctx)))


class AndromedaFactorizedEmbedding(nn.Module):
    """A table V x r and a projection r x C (arXiv 1909.11942)."""

    def __init__(self, config: AndromedaConfig) -> None:
        super().__init__()
        self.table = nn.Embedding(config.vocab_size, config.embedding["rank"])
        self.project = nn.Linear(config.embedding["rank"], config.hidden_size, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.project(self.table(ids))


class AndromedaPreTrainedModel(PreTrainedModel):
    """What transformers needs to know of the model."""

    config_class = AndromedaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("AndromedaDecoderLayer",)
    _skip_keys_device_placement = ("past_key_values",)
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def _init_weights(self, module: nn.Module) -> None:
        """Start values of weights that no checkpoint holds."""
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim > 1 and not isinstance(module, AndromedaQKNorm):
                nn.init.normal_(parameter, std=0.02)
            elif name == "bias":
                nn.init.zeros_(parameter)


class AndromedaModel(AndromedaPreTrainedModel):
    """Embedding, layers, final norm."""

    def __init__(self, config: AndromedaConfig) -> None:
        super().__init__(config)
        self.explicit = any(explicit_logits(config, layer) for layer in range(config.num_hidden_layers))
        if self.explicit and config._attn_implementation not in ("eager", "sdpa"):
            raise ValueError("ALiBi, soft-capped logits and sigmoid attention are computed here: use attn_implementation eager or sdpa.")
        e, v, C = config.embedding, config.value_embedding, config.hidden_size
        plain = e["kind"] == "plain"
        self.embed_tokens = nn.Embedding(config.vocab_size, C) if plain else AndromedaFactorizedEmbedding(config)
        self.embed_positions = nn.Embedding(config.max_position_embeddings, C) if e.get("absolute") else None
        self.embed_norm = AndromedaRMSNorm(C, config.block["eps"], plain=True) if e.get("norm") else nn.Identity()
        self.smear = AndromedaSmear(config) if config.shift["kind"] == "smear" else AndromedaNoShift()
        values = config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        self.embed_values = nn.Embedding(config.vocab_size, values) if v["kind"] != "none" else None
        self.layers = nn.ModuleList(AndromedaDecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.skip_weights = nn.Parameter(torch.ones(config.num_hidden_layers // 2)) if config.skips["unet"] else None
        self.norm = nn.Identity() if config.block["residual"] == "deepnorm" else build_norm(config)
        self.rotary = AndromedaRotary(config)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give input_ids or inputs_embeds, one of them.")
        if input_ids is None and self.embed_values is not None:
            raise ValueError("This model looks its value embeddings up by token: give input_ids.")
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and past_key_values is None:
            past_key_values = AndromedaCache(self.config)
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        ctx = self.prepare(x, attention_mask, position_ids, past_key_values, kwargs)
        if self.embed_positions is not None:
            x = x + self.embed_positions(ctx.positions)
        x = self.smear(self.embed_norm(x), ctx)
        values = (
            None if self.embed_values is None else self.embed_values(input_ids).unflatten(-1, (len(self.layers), -1, self.config.head_dim))
        )
        x, states = self.run_layers(x, values, ctx)
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        output = BaseModelOutputWithPast(
            last_hidden_state=states[-1], past_key_values=past_key_values, hidden_states=tuple(states) if wanted else None
        )
        return output if return_dict is not False else output.to_tuple()

    def run_layers(self, x: Tensor, values: Tensor | None, ctx: AndromedaPass) -> tuple[Tensor, list[Tensor]]:
        """x (B, T, C) through all layers; with U-net skips the second half adds outputs of the first, last in first out."""
        first, states, outputs = x, [x], []
        depth, half = len(self.layers), 0 if self.skip_weights is None else len(self.skip_weights)
        for index, layer in enumerate(self.layers):
            if half and index >= depth - half:
                x = x + self.skip_weights[index - depth + half].to(x.dtype) * outputs.pop()
            x = layer(x, first, None if values is None else values[:, :, index], ctx)
            if index < half:
                outputs.append(x)
            states.append(x)
        states[-1] = self.norm(x)
        return x, states

    def prepare(self, x: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, cache: Any, kwargs: dict) -> AndromedaPass:
        """Positions, rotations and masks of a pass over x (B, T, C)."""
        past = 0 if cache is None else cache.get_seq_length()
        positions = self.positions(x, attention_mask, position_ids, past)
        masks = self.masks(x, attention_mask, position_ids, cache if past else None)
        query_table = key_table = None
        if self.rotary.kind != "none":
            wide = torch.promote_types(x.dtype, torch.float32)
            length = int(positions.max()) + 1 if self.rotary.follows_length else 0
            query_table = self.rotary.table(positions, length, wide, key=False)
            keys = positions
            if self.rotary.follows_length and past:
                keys = (positions[:, -1:] - torch.arange(past + x.shape[1] - 1, -1, -1, device=x.device)).clamp(min=0)
            key_table = self.rotary.table(keys, length, wide, key=True)
        return AndromedaPass(positions, query_table, key_table, masks, cache, kwargs)

    def positions(self, x: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, past: int) -> Tensor:
        """Position of each token since its document began (B, T); padding before a sequence does not count."""
        B, T = x.shape[:2]
        if position_ids is not None:
            return position_ids.expand(B, T)
        if attention_mask is not None and attention_mask.ndim == 2:
            return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -T:]
        return (past + torch.arange(T, device=x.device)).expand(B, T)

    def masks(self, x: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, cache: Any) -> dict[str, Any]:
        """The attention mask of each layer type. Restarting position_ids without a mask separate packed sequences."""
        if isinstance(attention_mask, dict):
            return attention_mask
        makers = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}
        given = {
            "config": self.config,
            "inputs_embeds": x,
            "attention_mask": attention_mask,
            "past_key_values": cache,
            "position_ids": position_ids,
        }
        if self.explicit:
            # Never left out, as it may be where a kernel is causal by itself.
            given["and_mask_function"] = lambda batch, head, query, key: key >= 0
        return {kind: makers[kind](**given) for kind in set(self.config.layer_types)}


class AndromedaForCausalLM(AndromedaPreTrainedModel, GenerationMixin):
    """The model with its head, for generation and training."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    accepts_loss_kwargs = True

    def __init__(self, config: AndromedaConfig) -> None:
        super().__init__(config)
        self.model = AndromedaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.head["bias"])
        # No tokens can be taken back from a shift's state, as assisted decoding would.
        self._is_stateful = config.shift["kind"] != "none"
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """labels (B, T): ids to predict, shifted here; -100 is left out. logits_to_keep: only the last so many logits."""
        counted = {name: kwargs.pop(name) for name in ("num_items_in_batch",) if name in kwargs}
        output = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(output.last_hidden_state[:, kept])
        if cap := self.config.head["softcap"]:
            logits = cap * torch.tanh(logits / cap)
        loss = None if labels is None else self.loss_function(logits=logits, labels=labels, vocab_size=self.vocab_size, **counted)
        whole = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=output.past_key_values, hidden_states=output.hidden_states)
        return whole if return_dict is not False else whole.to_tuple()

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict, *args: Any, **kwargs: Any) -> None:
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            if generation_config.cache_implementation not in (None, "dynamic"):
                raise ValueError(
                    f"This model has no cache of kind {generation_config.cache_implementation}: leave cache_implementation out."
                )
            model_kwargs["past_key_values"] = AndromedaCache(self.config)
            return None
        return super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
