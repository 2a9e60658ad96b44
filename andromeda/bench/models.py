"""Models of the GPU benchmarks: that of a configuration, and other libraries' models with the same matmuls.

Weights are random, which does not affect speed.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from andromeda.config.derived import intermediate_size
from andromeda.config.model import ModelConfig
from andromeda.model.transformer import Transformer
from andromeda.utils.errors import MissingExtra, RequestError, nearest

GATED = ("swiglu", "geglu", "geglu_tanh", "reglu")
ANDROMEDA_UNFUSED = "Andromeda without flash attention"
LLAMA, X_TRANSFORMERS, X_TRANSFORMERS_ALIBI = "transformers Llama", "x-transformers without ALiBi", "x-transformers"
PEERS = {"llama": LLAMA, "x-transformers": X_TRANSFORMERS, "x-transformers-alibi": X_TRANSFORMERS_ALIBI}
"""Other implementations by their option value; x-transformers' ALiBi materializes T x T numbers per head."""


def parse_peers(text: str) -> list[str]:
    """Names of other implementations from comma-separated words, or all. Raises RequestError."""
    words = list(PEERS) if text == "all" else [word for word in text.split(",") if word]
    for word in words:
        if word not in PEERS:
            raise RequestError(f"There is no peer {word!r}{nearest(word, PEERS)}: give {', '.join(PEERS)} or all.")
    return [PEERS[word] for word in words]


@contextmanager
def unfused_attention() -> Iterator[None]:
    """Causal attention of backend `sdpa` by PyTorch's math kernel: all T x T logits in memory, in the compute dtype."""
    before = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    # By default the math kernel computes in float32, which is slower still.
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(before)


def random_model(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Transformer:
    """A model of this shape with random weights, in evaluation mode."""
    with torch.device(device):
        model = Transformer(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
            if parameter.ndim > 1:
                parameter.normal_(0, 0.02)
    return model.eval()


def llama(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """transformers' Llama of the same hidden size, layers, heads, vocabulary, and feed-forward parameters (SwiGLU)."""
    logging.disable(logging.WARNING)
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        raise MissingExtra("transformers", "bench", "transformers' Llama") from None
    finally:
        logging.disable(logging.NOTSET)
    a = config.attention
    matrices = 3 if config.feedforward.kind in GATED else 2
    shape: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": a.num_kv_heads,
        "head_dim": a.head_dim,
        # A multiple of 128, as fast kernels require.
        "intermediate_size": round(matrices * intermediate_size(config) / 3 / 128) * 128,
        "max_position_embeddings": 1 << 18,
        "attn_implementation": "sdpa",
        "use_cache": False,
    }
    described = LlamaConfig(**shape, num_attention_heads=a.num_kv_heads)
    # LlamaConfig requires that heads divide the hidden size, although its layers do not.
    described.num_attention_heads = a.num_heads
    with torch.device(device):
        model: nn.Module = LlamaForCausalLM(described)
    return model.to(dtype)


def x_transformer(config: ModelConfig, device: torch.device, dtype: torch.dtype, alibi: bool = True) -> nn.Module:
    """x-transformers with the settings of preset `andromeda`, at this size."""
    try:
        from x_transformers import Decoder, TransformerWrapper
    except ImportError:
        raise MissingExtra("x-transformers", "bench", "x-transformers") from None
    a = config.attention
    layers = Decoder(
        dim=config.hidden_size,
        depth=config.num_layers,
        heads=a.num_heads,
        attn_dim_head=a.head_dim,
        attn_one_kv_head=a.num_kv_heads == 1,
        alibi_pos_bias=alibi,
        alibi_num_heads=a.num_heads // 2,
        rotary_xpos=True,
        attn_flash=True,
        shift_tokens=1,
        attn_qk_norm=True,
        attn_qk_norm_dim_scale=True,
    )
    with torch.device(device):
        model: nn.Module = TransformerWrapper(num_tokens=config.vocab_size, max_seq_len=1 << 18, use_abs_pos_emb=False, attn_layers=layers)
    return model.to(device, dtype)
