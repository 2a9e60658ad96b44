"""A token mixer of your own: gated linear attention, with keys of its own, in one file.

    S_t = g_t S_(t-1) + f(k_t) v_t^T        o_t = S_t^T f(q_t)        f(x) = elu(x) + 1, for each head

with a decay g_t in (0, 1) that each token computes for each head (arXiv 2312.06635 with one decay a head, as Mamba-2 has it,
arXiv 2405.21060). A pass computes it in chunks: within a chunk by matmuls over pairs of tokens, between chunks by the state S. So the
state of a sequence is D x Dv numbers a head, whatever its length, and decoding continues from it.

Use it for some layers and softmax attention for the others:

    [model]
    layers = ["linear", "linear", "linear", "full"]

    [model.mixers.linear]
    kind = "add_a_mixer:GatedLinearAttention"
    num_heads = 4
    head_dim = 32

and train with `andromeda train my.toml --allow-code` in the folder that holds this file.

Shapes: B batch, T time, C width, H heads, D head dim (of queries, keys and values), L tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from andromeda.config.base import BaseConfig
from andromeda.config.model import ModelConfig
from andromeda.model.forward_context import ForwardContext
from andromeda.model.kv_cache.protocol import CacheBytes
from andromeda.model.layers import Linear


class GatedLinearAttention(nn.Module):
    """Causal linear attention with a decay for each token and head; x (B, T, C) -> (B, T, C)."""

    supports_cuda_graph = True

    class Config(BaseConfig):
        """Keys of `[model.mixers.NAME]` besides `kind`."""

        num_heads: PositiveInt = 4
        head_dim: PositiveInt = 32
        chunk: PositiveInt = 64
        """Tokens that are computed by matmuls over pairs at once."""
        slowness: PositiveFloat = 16.0
        """The decay is sigmoid(logit)^(1 / slowness)."""

    def __init__(self, config: ModelConfig, layer: int, own: Config) -> None:
        super().__init__()
        self.heads, self.dim, self.chunk, self.slowness = own.num_heads, own.head_dim, own.chunk, own.slowness
        width, inner = config.hidden_size, own.num_heads * own.head_dim
        self.query, self.key = Linear(width, inner, bias=False, init="unit_gain"), Linear(width, inner, bias=False, init="unit_gain")
        self.value, self.gate = Linear(width, inner, bias=False), Linear(width, inner, bias=False)
        self.decay = Linear(width, own.num_heads, bias=True)
        self.out = Linear(inner, width, bias=False, init="output")

    @staticmethod
    def unsupported_reason(config: ModelConfig, own: Config) -> str | None:
        """Why this mixer does not go with the rest of a model, one clause, or None."""
        if config.value_embedding.kind != "none":
            return "model.value_embedding does not go with GatedLinearAttention, which has no values for it: set its kind to none"
        return None

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        """x (B, T, C) -> (B, T, C); the state is in the slot `linear` of the layer's decode state."""
        wide = torch.promote_types(x.dtype, torch.float32)
        q, k, v = (linear(x).unflatten(-1, (self.heads, -1)).to(wide) for linear in (self.query, self.key, self.value))
        # Positive features (arXiv 2006.16236): values add up with positive weights, so that the norm below is well conditioned.
        q, k = F.elu(q) + 1, F.elu(k) + 1
        log_decay = F.logsigmoid(self.decay(x).to(wide)) / self.slowness
        # 1 where a token begins a document: nothing of before reaches it.
        begins = 1 - ctx.within_document(torch.ones_like(x[..., :1]), 1)[..., 0].round().long()
        state = ctx.state.get("linear", q, (x.shape[0], self.heads, self.dim, self.dim))
        outputs = []
        with torch.autocast(x.device.type, enabled=False):
            for parts in zip(*(t.split(self.chunk, 1) for t in (q, k, v, log_decay, begins)), strict=True):
                y, state = chunk_pass(*parts, state)
                outputs.append(y)
        ctx.state.put("linear", state)
        y = F.rms_norm(torch.cat(outputs, 1), (self.dim,), eps=1e-5).flatten(-2).to(x.dtype)
        return self.out(F.silu(self.gate(x)) * y)

    def flops(self, keys: Callable[[int], float]) -> dict[str, float]:
        """Of one token: the projections, and the recurrence, which adds to the state and reads it."""
        projections = (self.query, self.key, self.value, self.gate, self.decay, self.out)
        return {"linear attention": sum(linear.flops() for linear in projections) + 4.0 * self.heads * self.dim**2}

    def cache_bytes(self, dtype: torch.dtype) -> CacheBytes:
        """The state, in float32 at least, whatever the number of tokens."""
        return CacheBytes(per_sequence=self.heads * self.dim**2 * max(dtype.itemsize, 4))

    def saved_per_token(self) -> int:
        """Numbers that the backward pass keeps at least: queries, keys, values and gates."""
        return 4 * self.heads * self.dim

    def describe(self) -> str:
        """What it is, in a few words."""
        return f"gated linear attention of {self.heads} heads of {self.dim}"


def chunk_pass(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, begins: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One chunk: q, k, v (B, L, H, D), log_decay (B, L, H), begins (B, L), the state before (B, H, D, D) -> outputs (B, L, H, D), state."""
    total = log_decay.cumsum(1)
    document = begins.cumsum(1)
    # What token t sees of token s <= t of its own document: the decays after s up to t. Differences of what comes later are masked.
    seen = (document[:, :, None] == document[:, None, :]) & torch.ones_like(document[0, :, None] == document[0, None, :]).tril()
    decays = (total[:, :, None] - total[:, None, :]).masked_fill(~seen[..., None], -torch.inf).exp()
    within = torch.einsum("blhd,bshd,blsh,bshe->blhe", q, k, decays, v)
    of_first = (document == 0).to(q.dtype)[..., None]
    before = torch.einsum("blhd,blh,bhde->blhe", q, of_first * total.exp(), state)
    to_end = decays[:, -1]
    state = state * (of_first[:, -1] * total[:, -1].exp())[..., None, None] + torch.einsum("bshd,bsh,bshe->bhde", k, to_end, v)
    return within + before, state
