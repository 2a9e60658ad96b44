"""Llama's settings against transformers' LlamaForCausalLM with the same weights, in float64.

transformers computes norms, angles and softmax in float32 whatever the model's type; here it is made to take float64
instead, so that the comparison is as sharp as the arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, modeling_rope_utils
from transformers.models.llama import modeling_llama

from andromeda.config.model import AttentionConfig, BlockConfig, FeedForwardConfig, HeadConfig, ModelConfig, RopeScalingConfig, RotaryConfig
from andromeda.model.kv_cache.dynamic import DynamicKVCache
from andromeda.model.transformer import Transformer

VOCABULARY, WIDTH, DEPTH, HEADS, HEAD_DIM, HIDDEN, ORIGINAL, LENGTH = 53, 32, 3, 4, 8, 40, 24, 96

CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "grouped": ({"num_key_value_heads": 2}, {}),
    "one kv head": ({"num_key_value_heads": 1}, {}),
    "tied": ({"tie_word_embeddings": True}, {}),
    "attention bias": ({"attention_bias": True}, {}),
    "theta": ({}, {"rope_theta": 500.0}),
    "linear": ({"num_key_value_heads": 2}, {"rope_type": "linear", "factor": 4.0}),
    "dynamic": ({}, {"rope_type": "dynamic", "factor": 2.0}),
    "yarn": ({"num_key_value_heads": 2}, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL}),
    "yarn, betas": (
        {},
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": ORIGINAL,
            "beta_fast": 4.0,
            "beta_slow": 0.5,
            "rope_theta": 100.0,
        },
    ),
}


class InFloat64:
    """torch, for a module that asks it for float32."""

    float32 = float = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@pytest.fixture(autouse=True)
def in_float64(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for module in (modeling_llama, modeling_rope_utils):
        monkeypatch.setattr(module, "torch", InFloat64())
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def build_theirs(settings: dict[str, Any], rope: dict[str, Any]) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=HIDDEN,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        max_position_embeddings=LENGTH if rope.get("rope_type") == "yarn" else ORIGINAL,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0} | rope,
        rms_norm_eps=1e-6,
        attn_implementation="eager",
        **settings,
    )
    model = LlamaForCausalLM(config).eval()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.mean() + torch.randn(parameter.shape, generator=draw, dtype=torch.float64) * 0.4)
    return model


def build_ours(theirs: LlamaForCausalLM, rope: dict[str, Any]) -> Transformer:
    c = theirs.config
    kind = rope.get("rope_type", "none")
    betas = {name: rope[name] for name in ("beta_fast", "beta_slow") if name in rope}
    scaling = RopeScalingConfig(kind=kind, factor=rope.get("factor", 1.0), original_max_seq_len=ORIGINAL if kind != "none" else 0, **betas)
    config = ModelConfig(
        vocab_size=VOCABULARY,
        max_seq_len=LENGTH,
        hidden_size=WIDTH,
        num_layers=DEPTH,
        attention=AttentionConfig(
            num_heads=HEADS, num_kv_heads=c.num_key_value_heads, head_dim=HEAD_DIM, bias=c.attention_bias, backend="eager"
        ),
        rotary=RotaryConfig(kind="rope", theta=rope.get("rope_theta", 10000.0), scaling=scaling),
        feedforward=FeedForwardConfig(kind="swiglu", intermediate_size=HIDDEN),
        block=BlockConfig(norm="rms", eps=1e-6),
        head=HeadConfig(tied=c.tie_word_embeddings),
    )
    model = Transformer(config).double().eval()
    model.load_state_dict(translated(theirs.state_dict()))
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in theirs.parameters())
    return model


NAMES = SimpleNamespace(
    ends={"model.embed_tokens.weight": "embedding.tokens.weight", "model.norm.weight": "norm.weight", "lm_head.weight": "head.weight"},
    layer={
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "feedforward_norm",
        "self_attn.q_proj": "attention.query",
        "self_attn.k_proj": "attention.key",
        "self_attn.v_proj": "attention.value",
        "self_attn.o_proj": "attention.out",
        "mlp.gate_proj": "feedforward.gate",
        "mlp.up_proj": "feedforward.inner",
        "mlp.down_proj": "feedforward.out",
    },
)


def translated(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Their weights by our names; both turn the pairs (i, i + D/2)."""
    ours = {}
    for name, value in theirs.items():
        if name in NAMES.ends:
            ours[NAMES.ends[name]] = value
        else:
            _, _, layer, part = name.split(".", 3)
            module, kind = part.rsplit(".", 1)
            ours[f"decoder.blocks.{layer}.{NAMES.layer[module]}.{kind}"] = value
    return ours


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_logits_are_theirs_beyond_the_original_context(name: str) -> None:
    settings, rope = CASES[name]
    theirs = build_theirs(settings, rope)
    ours = build_ours(theirs, rope)
    for length in (ORIGINAL // 2, LENGTH):
        ids = torch.randint(0, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(1))
        expected = theirs(ids, use_cache=False).logits
        assert expected.std() > 0.1
        torch.testing.assert_close(ours(ids), expected, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_dynamic_scaling_with_a_cache_is_their_full_pass() -> None:
    """Theirs rescales as the sequence grows, and with it the keys it has cached under other frequencies; the oracle is its full pass."""
    settings, rope = CASES["dynamic"]
    theirs = build_theirs(settings, rope)
    ours, cache = build_ours(theirs, rope), DynamicKVCache()
    ids = torch.randint(0, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    pieces = [ours(part, cache=cache, span=LENGTH) for part in ids.split([50, 1, 1, 43, 1], 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), theirs(ids, use_cache=False).logits, rtol=1e-9, atol=1e-9)


def test_gradients_are_theirs() -> None:
    settings, rope = CASES["yarn"]
    theirs = build_theirs(settings, rope)
    ours = build_ours(theirs, rope)
    ids = torch.randint(0, VOCABULARY, (2, 30), generator=torch.Generator().manual_seed(1))
    for model, logits in ((theirs, theirs(ids, use_cache=False).logits), (ours, ours(ids))):
        model.zero_grad()
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    expected = translated({name: p.grad for name, p in theirs.named_parameters() if p.grad is not None})
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-9, atol=1e-11)
