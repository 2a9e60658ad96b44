"""The model against x-transformers with the same weights, in float64.

Where the two differ on purpose: x-transformers lets query head h read key/value head h mod G and ours h // (H / G), so
grouped heads are permuted here; its norm keeps the gain's offset from one; its learned absolute positions are scaled by
1/sqrt(C); its interpolation leaves xPos's decay as it was; and its token shift forgets the token before when it decodes
with a cache, for which the oracle is therefore its full pass.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from x_transformers import Decoder, TransformerWrapper
from x_transformers.attend import Attend

from andromeda.config.load import load
from andromeda.config.model import ModelConfig
from andromeda.model.block import deepnorm_alpha
from andromeda.model.kv_cache.dynamic import DynamicKVCache
from andromeda.model.transformer import Transformer
from andromeda.ops.attention import dispatch
from andromeda.ops.attention.spec import AttentionSpec

VOCABULARY, CONTEXT, WIDTH, DEPTH, HEADS, HEAD_DIM = 61, 48, 36, 3, 6, 16
SMALL = (
    f"vocab_size={VOCABULARY}",
    f"max_seq_len={CONTEXT}",
    f"hidden_size={WIDTH}",
    f"num_layers={DEPTH}",
    f"attention.num_heads={HEADS}",
    f"attention.head_dim={HEAD_DIM}",
    "attention.backend=eager",
    "alibi.num_heads=3",
    "alibi.fold_into_qk=false",  # x-transformers adds slopes and reserves no dimensions
)

PRESET: dict[str, Any] = {
    "alibi_pos_bias": True,
    "alibi_num_heads": 3,
    "rotary_xpos": True,
    "shift_tokens": 1,
    "attn_one_kv_head": True,
    "attn_qk_norm": True,
    "attn_qk_norm_dim_scale": True,
}
"""The settings of preset `andromeda`, with 3 of 6 heads under ALiBi for its 12 of 24."""
ROPE: dict[str, Any] = {"rotary_pos_emb": True}
PLAIN = ["alibi.num_heads=0", "shift.kind=none", "attention.qk_norm=none", f"attention.num_kv_heads={HEADS}", "rotary.kind=rope"]

CASES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "preset": (PRESET, []),
    "deepnorm": (
        PRESET | {"pre_norm": False, "scale_residual_constant": deepnorm_alpha(DEPTH)},
        ["block.residual=deepnorm", "init.kind=deepnorm"],
    ),
    "plain": (ROPE, PLAIN),
    "whole heads turned": (ROPE | {"rotary_emb_dim": HEAD_DIM}, [*PLAIN, "rotary.fraction=1.0"]),
    "qk norm": (ROPE | {"attn_qk_norm": True}, [*PLAIN, "attention.qk_norm=l2"]),
    "grouped heads": (ROPE | {"attn_kv_heads": 2}, [*PLAIN, "attention.num_kv_heads=2"]),
    "grouped heads, scaled": (
        ROPE | {"attn_kv_heads": 3, "attn_qk_norm": True, "attn_qk_norm_dim_scale": True},
        [*PLAIN, "attention.num_kv_heads=3", "attention.qk_norm=l2_dim_scale"],
    ),
    "alibi on all heads": ({"alibi_pos_bias": True}, [*PLAIN, "rotary.kind=none", f"alibi.num_heads={HEADS}"]),
    "absolute": ({"use_abs_pos_emb": True}, [*PLAIN, "rotary.kind=none", "embedding.absolute=true"]),
    "no positions": ({}, [*PLAIN, "rotary.kind=none"]),
    "two tokens shifted": (ROPE | {"shift_tokens": 2}, [*PLAIN, "shift.kind=chunks", "shift.tokens=2"]),
    "channels left over": (ROPE | {"shift_tokens": 4}, [*PLAIN, "shift.kind=chunks", "shift.tokens=4"]),
    "interpolated": (
        ROPE | {"rotary_interpolation_factor": 3.0},
        [*PLAIN, "rotary.scaling.kind=linear", "rotary.scaling.factor=3.0"],
    ),
    "ntk": (ROPE | {"rotary_base_rescale_factor": 3.0}, [*PLAIN, "rotary.scaling.kind=ntk", "rotary.scaling.factor=3.0"]),
    "swiglu": (
        ROPE | {"ff_glu": True, "ff_swish": True},
        [*PLAIN, "feedforward.kind=swiglu", f"feedforward.intermediate_size={4 * WIDTH}"],
    ),
    "geglu": (ROPE | {"ff_glu": True}, [*PLAIN, "feedforward.kind=geglu", f"feedforward.intermediate_size={4 * WIDTH}"]),
    "relu squared": (ROPE | {"ff_relu_squared": True, "ff_no_bias": True}, [*PLAIN, "feedforward.kind=relu2", "feedforward.bias=false"]),
    "rms": (ROPE | {"use_rmsnorm": True}, [*PLAIN, "block.norm=rms", "block.eps=1e-20"]),
    "soft cap": (ROPE | {"attn_softclamp_logits": True, "attn_logit_softclamp_value": 2.0}, [*PLAIN, "attention.softcap=2.0"]),
    "tied": (ROPE | {"tie_embedding": True, "tie_embedding_scale": 1.0}, [*PLAIN, "head.tied=true"]),
    "sigmoid": (PRESET | {"attn_sigmoid": True}, ["attention.mixer=sigmoid", "attention.backend=auto"]),
}


def configured(overrides: list[str]) -> ModelConfig:
    """Preset `andromeda`, shrunk, with changes."""
    return load("andromeda", [f"model.{override}" for override in (*SMALL, *overrides)]).model


def build_theirs(settings: dict[str, Any]) -> TransformerWrapper:
    """x-transformers in float64: constants that it keeps in float32 are recomputed, weights are drawn."""
    outer = {name: settings[name] for name in ("use_abs_pos_emb", "tie_embedding", "tie_embedding_scale") if name in settings}
    inner = {name: value for name, value in settings.items() if name not in outer}
    decoder = Decoder(dim=WIDTH, depth=DEPTH, heads=HEADS, attn_dim_head=HEAD_DIM, verbose=False, **inner)
    model = TransformerWrapper(
        num_tokens=VOCABULARY, max_seq_len=CONTEXT, attn_layers=decoder, **({"use_abs_pos_emb": False} | outer)
    ).double()
    rotary = decoder.rotary_pos_emb
    if rotary is not None:
        dim = 2 * len(rotary.inv_freq)
        index = torch.arange(0, dim, 2, dtype=torch.float64)
        base = 10000 * settings.get("rotary_base_rescale_factor", 1.0) ** (dim / (dim - 2))
        rotary.inv_freq = 1.0 / base ** (index / dim)
        if rotary.scale is not None:
            rotary.scale = (index + 0.4 * dim) / (1.4 * dim)
    if decoder.rel_pos is not None:
        decoder.rel_pos.slopes = torch.tensor(decoder.rel_pos._get_slopes(settings.get("alibi_num_heads", HEADS))).double()[:, None, None]
    for attend in (module for module in decoder.modules() if isinstance(module, Attend)):
        # Their softmax is in float32, and their sigmoid without the paper's offset.
        attend.attn_fn = (lambda z: (z - math.log(CONTEXT)).sigmoid()) if "attn_sigmoid" in settings else partial(torch.softmax, dim=-1)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn(parameter.shape, generator=draw, dtype=torch.float64) * 0.3
    return model.eval()


def our_head(theirs: Tensor, kv_heads: int, dim: int) -> Tensor:
    """Their query heads along dimension `dim` (H), in our order: theirs number r G + g is ours number g (H / G) + r."""
    order = torch.arange(HEADS).view(HEADS // kv_heads, kv_heads).T.flatten()
    return theirs.index_select(dim, order)


def translated(theirs: TransformerWrapper, config: ModelConfig) -> dict[str, Tensor]:
    """Their weights by our names."""
    state = {name.replace(".fn.", "."): value for name, value in theirs.state_dict().items()}
    gain = "gamma" if any(name.endswith("gamma") for name in state) else "g"
    ours = {"embedding.tokens.weight": state["token_emb.emb.weight"]}
    ours["head.weight"] = state.get("to_logits.weight", ours["embedding.tokens.weight"])
    if config.embedding.absolute:
        ours["embedding.absolute.table.weight"] = state["pos_emb.emb.weight"] * WIDTH**-0.5
    if config.block.residual == "pre":
        ours["norm.weight"] = state[f"attn_layers.final_norm.{gain}"] + 1.0
    for layer in range(config.num_layers):
        ours |= {f"decoder.blocks.{layer}.{name}": value for name, value in layer_weights(state, layer, gain, config).items()}
    return ours


def layer_weights(state: dict[str, Tensor], layer: int, gain: str, config: ModelConfig) -> dict[str, Tensor]:
    """One of our layers is two of theirs; post-norm gains are the third of a layer's norms."""
    a, f = (f"attn_layers.layers.{2 * layer + i}" for i in (0, 1))
    place = 0 if config.block.residual == "pre" else 2
    G = config.attention.num_kv_heads
    ours = {
        "attention_norm.weight": state[f"{a}.0.{place}.{gain}"] + 1.0,
        "feedforward_norm.weight": state[f"{f}.0.{place}.{gain}"] + 1.0,
        "attention.query.weight": our_head(state[f"{a}.1.to_q.weight"].unflatten(0, (HEADS, -1)), G, 0).flatten(0, 1),
        "attention.key.weight": state[f"{a}.1.to_k.weight"],
        "attention.value.weight": state[f"{a}.1.to_v.weight"],
        "attention.out.weight": our_head(state[f"{a}.1.to_out.weight"].unflatten(1, (HEADS, -1)), G, 1).flatten(1),
        "feedforward.out.weight": state[f"{f}.1.ff.2.weight"],
    }
    if config.attention.qk_norm == "l2_dim_scale":
        ours["attention.qk_norm.query_scale"] = our_head(state[f"{a}.1.qk_norm_q_scale"], G, 0)[:, 0]
        ours["attention.qk_norm.key_scale"] = state[f"{a}.1.qk_norm_k_scale"][:, 0]
    gated = config.feedforward.kind in ("swiglu", "geglu")
    inner = f"{f}.1.ff.0.proj" if gated else f"{f}.1.ff.0.0"
    parts = ("inner", "gate") if gated else ("inner",)
    kinds = ("weight", "bias") if config.feedforward.bias else ("weight",)
    for kind in kinds:
        chunks = state[f"{inner}.{kind}"].chunk(len(parts))
        ours |= {f"feedforward.{part}.{kind}": chunk for part, chunk in zip(parts, chunks, strict=True)}
    if config.feedforward.bias:
        ours["feedforward.out.bias"] = state[f"{f}.1.ff.2.bias"]
    return ours


def pair(name: str) -> tuple[Transformer, TransformerWrapper]:
    """Both models with the same weights; every one of theirs is used."""
    settings, overrides = CASES[name]
    theirs, config = build_theirs(settings), configured(overrides)
    ours = Transformer(config).double().eval()
    ours.load_state_dict(translated(theirs, config))
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    return ours, theirs


def tokens() -> Tensor:
    return torch.randint(0, VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_logits_are_theirs(name: str) -> None:
    ours, theirs = pair(name)
    expected = theirs(tokens())
    assert expected.std() > 0.1
    torch.testing.assert_close(ours(tokens()), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["preset", "two tokens shifted"])
@torch.no_grad()
def test_decoding_with_a_cache_is_their_full_pass(name: str) -> None:
    ours, theirs = pair(name)
    cache = DynamicKVCache()
    pieces = [ours(part, cache=cache) for part in tokens().split([17, 1, 1, 20, 1], 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), theirs(tokens()), rtol=1e-9, atol=1e-9)


def test_the_preset_has_their_settings_at_full_size() -> None:
    model = load("andromeda", ["model.alibi.fold_into_qk=false"]).model
    assert (model.vocab_size, model.max_seq_len, model.hidden_size, model.num_layers) == (50432, 8192, 2560, 32)
    assert (model.attention.num_heads, model.attention.head_dim, model.attention.num_kv_heads, model.alibi.num_heads) == (24, 128, 1, 12)
    with torch.device("meta"):
        ours = sum(p.numel() for p in Transformer(model).parameters())
        decoder = Decoder(dim=2560, depth=32, heads=24, attn_dim_head=128, verbose=False, **(PRESET | {"alibi_num_heads": 12}))
        theirs = TransformerWrapper(num_tokens=50432, max_seq_len=8192, use_abs_pos_emb=False, attn_layers=decoder)
    assert ours == sum(p.numel() for p in theirs.parameters())


def test_the_soft_cap_comes_before_the_bias() -> None:
    """Ours caps the content alone and theirs the sum with ALiBi's bias: each by its own formula, and why it matters."""
    draw = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(1, 64, HEADS, HEAD_DIM, generator=draw, dtype=torch.float64) for _ in range(3))
    cap, slopes, scale = 2.0, torch.full((HEADS,), 0.25, dtype=torch.float64), HEAD_DIM**-0.5
    spec = AttentionSpec(scale=scale, slopes=slopes, softcap=cap)
    distance = torch.arange(64)[:, None] - torch.arange(64)
    bias = -slopes[:, None, None] * distance
    content = scale * torch.einsum("bthd,bshd->bhts", q, k)

    def result(logits: Tensor) -> tuple[Tensor, Tensor]:
        weights = logits.masked_fill(distance < 0, -math.inf).softmax(-1)
        return weights, torch.einsum("bhts,bshd->bthd", weights, v)

    before, ours = result(cap * (content / cap).tanh() + bias)
    after, theirs = result(cap * ((content + bias) / cap).tanh())
    torch.testing.assert_close(dispatch.attend(q, k, v, spec, "eager"), ours, rtol=1e-12, atol=1e-14)
    attended = Attend(causal=True, heads=HEADS, softclamp_logits=True, logit_softclamp_value=cap, scale=scale)
    attended.attn_fn = partial(torch.softmax, dim=-1)
    found, _ = attended(*(x.transpose(1, 2) for x in (q, k, v)), attn_bias=bias)
    torch.testing.assert_close(found.transpose(1, 2), theirs, rtol=1e-12, atol=1e-14)
    # What lies 40 tokens back or more: nearly forgotten by one order, and half of the weight in the other.
    far = (distance >= 40)[63]
    assert before[:, :, 63, far].sum(-1).max() < 0.01
    assert after[:, :, 63, far].sum(-1).min() > 0.1
