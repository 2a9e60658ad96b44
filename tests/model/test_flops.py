"""FLOP counts against torch's counter, published examples, closed forms and brute force over masks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from andromeda.config.model import ModelConfig
from andromeda.model.flops import (
    attention_pairs,
    forward_flops,
    forward_flops_per_token,
    hardware_flops_per_token,
    mean_keys,
    prefill_flops,
    training_flops_per_token,
)
from andromeda.model.transformer import Transformer
from andromeda.ops.attention import AttentionSpec
from andromeda.utils.errors import ConfigError

T = 32


def config(**changes: Any) -> ModelConfig:
    """A tiny model; tables are merged over the base."""
    base: dict[str, Any] = {
        "vocab_size": 96,
        "max_seq_len": T,
        "hidden_size": 48,
        "num_layers": 3,
        "rotary": {"kind": "rope"},
        "attention": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "backend": "sdpa"},
        "feedforward": {"intermediate_size": 80},
    }
    merged = {k: {**base[k], **v} if isinstance(v, dict) and k in base else v for k, v in changes.items()}
    return ModelConfig.model_validate(base | merged)


VARIANTS: dict[str, dict[str, Any]] = {
    "gelu": {},
    "relu2, bias": {"feedforward": {"kind": "relu2", "bias": True}, "attention": {"bias": True}},
    "swiglu": {"feedforward": {"kind": "swiglu"}},
    "swiglu, default width": {"feedforward": {"kind": "swiglu", "intermediate_size": 0}},
    "gelu, default width": {"feedforward": {"intermediate_size": 0, "mlp_ratio": 3.0}},
    "multi-query": {"attention": {"num_kv_heads": 1}},
    "full heads": {"attention": {"num_kv_heads": 4}},
    "wide attention": {"attention": {"num_heads": 6, "num_kv_heads": 3}},
    "alibi": {"alibi": {"num_heads": 2}},
    "folded alibi": {"alibi": {"num_heads": 2, "fold_into_qk": True}},
    "window": {"attention": {"sliding_window": 5, "full_attention_interval": 2}},
    "soft cap": {"attention": {"softcap": 20.0, "backend": "eager"}},
    "parallel": {"block": {"kind": "parallel"}},
    "deepnorm": {"block": {"residual": "deepnorm"}},
    "value embeddings": {"value_embedding": {"kind": "layered"}},
    "factorized": {"embedding": {"kind": "factorized", "rank": 8}},
    "tied": {"head": {"tied": True, "softcap": 15.0}},
    "smear": {"shift": {"kind": "smear"}},
    "chunks": {"shift": {"kind": "chunks"}},
    "u-net": {"skips": {"first": True, "unet": True}, "embedding": {"norm": True, "absolute": True}},
    "qk norm": {"attention": {"qk_norm": "l2_dim_scale"}},
    "moe": {"feedforward": {"kind": "moe"}, "experts": {"num_experts": 4, "top_k": 2, "kind": "swiglu"}},
    "moe, shared": {"feedforward": {"kind": "moe"}, "experts": {"num_experts": 5, "top_k": 3, "num_shared_experts": 2, "kind": "relu2"}},
}


def counted(model: Transformer, ids: torch.Tensor, *, backward: bool) -> int:
    """FLOPs that torch's counter sees; it knows the MATH path alone on a CPU."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        logits = model(ids)
        if backward:
            logits.square().sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", VARIANTS)
def test_agrees_with_torchs_counter(name: str) -> None:
    c = config(**VARIANTS[name])
    model, ids = Transformer(c), torch.randint(0, c.vocab_size, (2, T))
    forward = sum(forward_flops_per_token(c, T, convention="full").values()) * ids.numel()
    assert forward == pytest.approx(counted(model, ids, backward=False), rel=1e-12)
    training = training_flops_per_token(c, T, convention="full") * ids.numel()
    assert training == pytest.approx(counted(model, ids, backward=True), rel=0.01)


def test_prefill_and_decoding_agree_with_torchs_counter() -> None:
    c = config(attention={"sliding_window": 5, "full_attention_interval": 2}, feedforward={"kind": "swiglu"})
    model, ids = Transformer(c), torch.randint(0, c.vocab_size, (1, T))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.head(model.hidden(ids)[:, -1:])
    assert prefill_flops(c, T, convention="full") == counter.get_total_flops()
    assert sum(forward_flops(c, 17 * c.num_layers).values()) == pytest.approx(
        sum(forward_flops_per_token(c, 17, convention="full").values()), rel=1e-12
    )


@settings(deadline=None)
@given(T=st.integers(1, 40), window=st.integers(0, 50))
def test_pairs_are_those_that_the_mask_lets_through(T: int, window: int) -> None:
    seen = AttentionSpec(1.0, window=window).mask(T, T, torch.device("cpu"))
    assert attention_pairs(T, window) == int(seen.sum())


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=6), window=st.integers(0, 15))
def test_documents_are_counted_by_the_mask(lengths: list[int], window: int) -> None:
    total = sum(lengths)
    numbers = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    seen = AttentionSpec(1.0, window=window, documents=(numbers, numbers)).mask(total, total, torch.device("cpu"))
    assert mean_keys(total, window, documents=lengths) == pytest.approx(int(seen.sum()) / total, rel=1e-12)


def test_documents_must_fill_the_sequence() -> None:
    with pytest.raises(ConfigError, match="have 3 tokens"):
        mean_keys(4, documents=[1, 2])


def test_a_warming_window_narrows_only_layers_that_have_one() -> None:
    c = config(attention={"sliding_window": 8, "full_attention_interval": 3})
    narrowed = forward_flops_per_token(c, T, window=4)["scores"]
    per_key = 2 * 4 * 16
    assert narrowed == pytest.approx(per_key * (2 * attention_pairs(T, 4) + attention_pairs(T)) / T)


def megatron(h: int, L: int, heads: int, s: int, V: int) -> ModelConfig:
    """GPT as Megatron counts it: full heads, feed-forward of four times the width, one head over V."""
    return ModelConfig.model_validate(
        {
            "vocab_size": V,
            "max_seq_len": s,
            "hidden_size": h,
            "num_layers": L,
            "attention": {"num_heads": heads, "num_kv_heads": heads, "head_dim": h // heads},
        }
    )


def test_megatrons_closed_form_for_gpt3() -> None:
    """72 B s L h^2 (1 + s/6h + V/12Lh), and 96 (... V/16Lh) with full recomputation (arXiv 2104.04473, 2205.05198)."""
    h, L, s, V = 12288, 96, 2048, 51200
    c = megatron(h, L, 96, s, V)
    assert training_flops_per_token(c, s, convention="full") == pytest.approx(
        72 * L * h**2 * (1 + s / (6 * h) + V / (12 * L * h)), rel=1e-12
    )
    recomputed = hardware_flops_per_token(c, s, "full", flash=False, convention="full")
    assert recomputed == pytest.approx(96 * L * h**2 * (1 + s / (6 * h) + V / (16 * L * h)), rel=1e-12)


def test_palm_reached_the_published_utilization() -> None:
    """PaLM 540B: 238.3 k tokens/s on 6144 TPU v4 of 275 TFLOP/s was published as 46.2 % (arXiv 2204.02311, table 3)."""
    palm = ModelConfig.model_validate(
        {
            "vocab_size": 256000,
            "max_seq_len": 2048,
            "hidden_size": 18432,
            "num_layers": 118,
            "attention": {"num_heads": 48, "num_kv_heads": 1, "head_dim": 256},
            "feedforward": {"kind": "swiglu", "intermediate_size": 4 * 18432},
            "block": {"kind": "parallel"},
            "head": {"tied": True},
        }
    )
    per_token = training_flops_per_token(palm, 2048, convention="full")
    assert per_token == pytest.approx(6 * 540.35e9 + 12 * 118 * 48 * 256 * 2048, rel=1e-4)
    assert round(100 * per_token * 238.3e3 / (6144 * 275e12), 1) == 46.2


def test_flash_attention_computes_three_and_a_half_forward_passes() -> None:
    """Its published benchmark counts 4 T^2 H D forward (half of it when causal) and 2.5 times that backward (arXiv 2307.08691)."""
    c = config()
    forward = 4 * 4 * 16 * (T + 1) / 2 * c.num_layers
    without = training_flops_per_token(c, T) - 3 * forward
    assert hardware_flops_per_token(c, T) - without == pytest.approx(3.5 * forward, rel=1e-12)
