"""A Llama-shaped model as one GGUF file, which llama.cpp and whatever is built on it reads."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from torch import Tensor

from andromeda.config.derived import intermediate_size, original_max_seq_len
from andromeda.config.model import ModelConfig
from andromeda.data.encoders.split_patterns import SPLIT_PATTERNS, pattern_name
from andromeda.data.tokenizer import Tokenizer
from andromeda.hub.export_folder import convert, halves
from andromeda.model.position import build_rotary
from andromeda.model.position.scaling import RULES, Span
from andromeda.train.weights import read_weights
from andromeda.utils.errors import ConfigError, MissingExtra
from andromeda.utils.files import PART, sync_folder
from andromeda.utils.log import get_logger

log = get_logger()

FORMATS = ("F32", "F16", "Q8_0", "Q4_0")
BLOCK = 32
"""Numbers that Q8_0 and Q4_0 quantize together, along a row."""
NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
WIDE = ("token_embd.weight", "output.weight")
"""Tables that Q4_0 files keep in Q8_0."""


def write_gguf(
    to: Path, config: ModelConfig, weights: Mapping[str, Tensor], tokenizer: Tokenizer | None, kind: str, name: str = "model"
) -> None:
    """Write a model of `config` with `weights` (by the run's names). kind: of FORMATS. Raises an AndromedaError, one sentence."""
    gguf = library()
    if kind not in FORMATS:
        raise ConfigError(f"A GGUF file's type must be one of {', '.join(FORMATS)}, not {kind!r}.")
    tensors = gguf_tensors(config, weights)
    vocabulary = None if tokenizer is None else vocabulary_of(tokenizer, config.vocab_size)
    temporary = to.with_name(f"{to.name}.{uuid4().hex}{PART}")
    to.parent.mkdir(parents=True, exist_ok=True)
    try:
        writer = gguf.GGUFWriter(temporary, "llama")
        _add_model(writer, gguf, config, kind, name)
        if vocabulary and tokenizer:
            _add_vocabulary(writer, vocabulary, tokenizer)
        for tensor, values in tensors.items():
            stored = stored_type(tensor, values, kind)
            quantized = gguf.quants.quantize(values.astype(np.float32), gguf.GGMLQuantizationType[stored])
            writer.add_tensor(tensor, quantized, raw_dtype=gguf.GGMLQuantizationType[stored])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        temporary.replace(to)
        sync_folder(to.parent)
    finally:
        temporary.unlink(missing_ok=True)


def export_gguf(run: Path, to: Path, kind: str, *, step: int | None = None, average: bool = False) -> None:
    """Write the model of a run folder to the file `to`. Raises an AndromedaError, one sentence."""
    if to.is_dir():
        raise ConfigError(f"{to} is a folder: name the GGUF file itself.")
    config, weights = read_weights(run, average=average, step=step, warn=log.warning)
    kept = run / "tokenizer"
    write_gguf(to, config, weights, Tokenizer.load(kept) if kept.exists() else None, kind, run.resolve().name)


def gguf_rounding(kind: str) -> Callable[[str, Tensor], Tensor]:
    """What becomes of a weight (by the run's name) in a file of this kind."""
    gguf = library()

    def rounded(name: str, tensor: Tensor) -> Tensor:
        values = tensor.float().numpy()
        there = WIDE[0] if name.startswith(("embedding.tokens", "head.")) else name
        stored = gguf.GGMLQuantizationType[stored_type(there, values, kind)]
        return torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(values, stored), stored).copy()).to(tensor.dtype)

    return rounded


def library() -> Any:
    """The gguf package. Raises MissingExtra."""
    try:
        import gguf
        import gguf.quants
    except ImportError:
        raise MissingExtra("gguf", "gguf", "A GGUF file") from None
    return gguf


def gguf_tensors(config: ModelConfig, weights: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Tensors by llama.cpp's names, as it computes them. Raises ConfigError where the model is none of its shapes."""
    exported = convert(config, weights)
    if exported.reason:
        raise ConfigError(
            f"llama.cpp has no form for this model, for {exported.reason}: only Llama's shape (RoPE, RMS norms, SwiGLU, plain attention) "
            "can be written as GGUF, so export a Hugging Face folder."
        )
    found: dict[str, np.ndarray] = {}
    for name, tensor in exported.tensors.items():
        if name in NAMES:
            found[NAMES[name]] = tensor.numpy()
            continue
        _, _, layer, *part, leaf = name.split(".")
        inner = LAYER_NAMES[".".join(part)]
        if inner in ("attn_q", "attn_k"):
            tensor = interleaved(tensor, config.attention.head_dim)
        if inner == "attn_q":
            tensor = tensor * logit_ratio(config)
        found[f"blk.{layer}.{inner}.{leaf}"] = tensor.contiguous().numpy()
    factors = frequency_factors(config)
    return found if factors is None else {**found, "rope_freqs.weight": factors}


def interleaved(rows: Tensor, head_dim: int) -> Tensor:
    """The inverse of `halves`: rows of rotary pairs (i, i + D/2) as llama.cpp turns them, (2i, 2i + 1)."""
    pairs: Tensor = rows.unflatten(0, (-1, 2, head_dim // 2))
    return pairs.transpose(1, 2).flatten(0, 2)


def logit_ratio(config: ModelConfig) -> float:
    """What the logits are scaled by over 1/sqrt(D), llama.cpp's scale: it goes into the queries."""
    usual = config.attention.head_dim**-0.5
    ratio = (config.attention.scale or usual) * build_rotary(config).logit_factor / usual
    return 1.0 if math.isclose(ratio, 1.0, rel_tol=1e-9) else ratio


def frequency_factors(config: ModelConfig) -> np.ndarray | None:
    """By what each pair's frequency is divided (D/2,), where the context was extended."""
    if config.rotary.scaling.kind == "none":
        return None
    dims = config.attention.head_dim
    plain = config.rotary.theta ** (-torch.arange(0, dims, 2, dtype=torch.float64) / dims)
    span = Span(dims, config.max_seq_len, original_max_seq_len(config))
    return (plain / RULES[config.rotary.scaling.kind](config.rotary, span).inverse).float().numpy()


def stored_type(name: str, values: np.ndarray, kind: str) -> str:
    """The type that a tensor is stored in."""
    if values.ndim == 1:
        return "F32"
    if kind in ("F32", "F16"):
        return kind
    if values.shape[-1] % BLOCK:
        return "F16"
    return "Q8_0" if name in WIDE else kind


def _add_model(writer: Any, gguf: Any, config: ModelConfig, kind: str, name: str) -> None:
    a = config.attention
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType[{"F32": "ALL_F32"}.get(kind, f"MOSTLY_{kind}")])
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(intermediate_size(config))
    writer.add_head_count(a.num_heads)
    writer.add_head_count_kv(a.num_kv_heads)
    writer.add_key_length(a.head_dim)
    writer.add_value_length(a.head_dim)
    writer.add_rope_dimension_count(a.head_dim)
    writer.add_rope_freq_base(config.rotary.theta)
    writer.add_layer_norm_rms_eps(config.block.eps)


def vocabulary_of(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    """llama.cpp's account of a tokenizer. Raises ConfigError where it cuts text as llama.cpp cannot."""
    if tokenizer.kind != "bpe":
        raise ConfigError(
            f"llama.cpp has no form for a tokenizer of kind {tokenizer.kind}: build the corpus with a bpe tokenizer and "
            f"--pre-tokenizer {' or '.join(SPLIT_PATTERNS)}."
        )
    model = json.loads(tokenizer.model_file)
    name = pattern_name(split_expression(model.get("pre_tokenizer")))
    if name is None:
        raise ConfigError(
            "This tokenizer cuts text by a pattern that llama.cpp does not know, where it would give other tokens: build the corpus "
            f"with --pre-tokenizer {' or '.join(SPLIT_PATTERNS)}."
        )
    if model.get("normalizer"):
        raise ConfigError("This tokenizer normalizes text, which llama.cpp does not: train one without a normalizer.")
    words: dict[str, int] = model["model"]["vocab"]
    special = {number: word for word, number in tokenizer.special_tokens.items()}
    added = {token["id"]: token["content"] for token in model.get("added_tokens", [])}
    by_id = {number: word for word, number in words.items()} | added | special
    tokens = [by_id.get(number, f"<|unused_{number}|>") for number in range(vocab_size)]
    kinds = [3 if number in special else 4 if number in added else 1 if number in by_id else 5 for number in range(vocab_size)]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["model"]["merges"]]
    if not merges:
        raise ConfigError("llama.cpp needs a tokenizer with merges: build the corpus with a larger --vocab-size.")
    return {"pre": name, "tokens": tokens, "kinds": kinds, "merges": merges}


def split_expression(pre_tokenizer: Any) -> str:
    """The regular expression by which a tokenizer.json cuts text; empty where it cuts in another way."""
    if not isinstance(pre_tokenizer, dict):
        return ""
    parts = pre_tokenizer.get("pretokenizers") or [pre_tokenizer]
    splits = [part for part in parts if part.get("type") == "Split"]
    spelling = [part for part in parts if part.get("type") == "ByteLevel"]
    if len(splits) + len(spelling) != len(parts) or len(spelling) != 1 or spelling[0].get("add_prefix_space"):
        return ""
    if not splits:
        return SPLIT_PATTERNS["gpt-2"] if spelling[0].get("use_regex", True) else ""
    regular = (
        len(splits) == 1
        and splits[0].get("behavior") == "Isolated"
        and not splits[0].get("invert")
        and not spelling[0].get("use_regex", True)
    )
    return str(splits[0].get("pattern", {}).get("Regex", "")) if regular else ""


def _add_vocabulary(writer: Any, vocabulary: Mapping[str, Any], tokenizer: Tokenizer) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary["pre"])
    writer.add_token_list(vocabulary["tokens"])
    writer.add_token_types(vocabulary["kinds"])
    writer.add_token_merges(vocabulary["merges"])
    writer.add_bos_token_id(tokenizer.bos)
    writer.add_eos_token_id(tokenizer.eos)
    writer.add_add_bos_token(True)


__all__ = ["FORMATS", "halves", "write_gguf"]
