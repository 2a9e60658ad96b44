"""The flat names mean what the spec, x-transformers and Hugging Face mean by them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import nn

from andromeda.config.aliases import HUGGING_FACE_NAMES
from andromeda.config.derived import intermediate_size, rotated_dims
from andromeda.config.load import load, model_from_names
from andromeda.model.transformer import Transformer

SPEC: dict[str, Any] = {
    "num_tokens": 50432,
    "max_seq_len": 8192,
    "dim": 2560,
    "depth": 32,
    "dim_head": 128,
    "heads": 24,
    "use_abs_pos_emb": False,
    "alibi_pos_bias": True,
    "alibi_num_heads": 12,
    "rotary_xpos": True,
    "attn_flash": True,
    "shift_tokens": 1,
    "attn_one_kv_head": True,
    "qk_norm": True,
    "attn_qk_norm": True,
    "attn_qk_norm_dim_scale": True,
    "embedding_provider": "AndromedaEmbedding",
    "deepnorm": False,
}
HUGGING_FACE: dict[str, Any] = {
    "vocab_size": 64000,
    "max_position_embeddings": 32768,
    "hidden_size": 8192,
    "num_hidden_layers": 60,
    "num_attention_heads": 64,
    "intermediate_size": 32768,
    "hidden_act": "SwiGLU",
    "rotary_emb_fraction": 1.0,
    "use_flash_attention": True,
    "layer_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "attention_bias": True,
}


def value_at(model: Any, path: str) -> Any:
    for name in path.split("."):
        model = getattr(model, name)
    return model


def test_preset_andromeda_has_the_published_defaults() -> None:
    model = load("andromeda").model
    expected = {
        "vocab_size": 50432,
        "max_seq_len": 8192,
        "hidden_size": 2560,
        "num_layers": 32,
        "attention.head_dim": 128,
        "attention.num_heads": 24,
        "attention.num_kv_heads": 1,
        "embedding.absolute": False,
        "alibi.num_heads": 12,
        "rotary.kind": "xpos",
        "shift.kind": "chunks",
        "shift.tokens": 1,
        "attention.qk_norm": "l2_dim_scale",
        "attention.backend": "auto",
    }
    assert {path: value_at(model, path) for path in expected} == expected
    assert model_from_names(**SPEC) == model_from_names() == model


def test_preset_andromeda_65b_has_the_published_defaults() -> None:
    model = load("andromeda-65b").model
    assert model_from_names(**HUGGING_FACE) == model
    with torch.device("meta"):
        assert sum(p.numel() for p in Transformer(model).parameters()) == pytest.approx(65e9, rel=0.01)


@pytest.mark.parametrize(("name", "millions"), [("125m", 125), ("360m", 360), ("1b", 1000), ("7b", 7000)])
def test_the_family_is_as_large_as_its_names_say(name: str, millions: int) -> None:
    with torch.device("meta"):
        model = Transformer(load(f"andromeda-{name}").model)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)


SWITCHES: list[dict[str, Any]] = [
    {},
    {"attn_one_kv_head": False},
    {"attn_qk_norm_dim_scale": False},
    {"attn_qk_norm": False, "attn_qk_norm_dim_scale": False},
    {"rotary_xpos": False},
    {"rotary_xpos": False, "rotary_pos_emb": True},
    {"alibi_pos_bias": False},
    {"shift_tokens": 0},
    {"shift_tokens": 2, "alibi_num_heads": 3},
]


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_names_build_what_x_transformers_builds(switches: dict[str, Any]) -> None:
    x_transformers = pytest.importorskip("x_transformers")
    from x_transformers.x_transformers import LayerNorm, ShiftTokens, apply_rotary_pos_emb

    names: dict[str, Any] = {"dim": 48, "depth": 2, "dim_head": 32, "heads": 4, "alibi_num_heads": 2, "shift_tokens": 1}
    names |= {"alibi_pos_bias": True, "rotary_xpos": True, "attn_one_kv_head": True, "attn_qk_norm": True, "attn_qk_norm_dim_scale": True}
    names |= switches
    decoder = {("attn_dim_head" if name == "dim_head" else name): value for name, value in names.items()}
    theirs = x_transformers.TransformerWrapper(
        num_tokens=96, max_seq_len=64, use_abs_pos_emb=False, attn_layers=x_transformers.Decoder(**decoder, verbose=False)
    )
    # x-transformers adds slopes and reserves no dimensions of a head.
    model = model_from_names(num_tokens=96, max_seq_len=64, alibi={"fold_into_qk": False}, **names)
    ours = Transformer(model)

    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    assert {m.ln.eps for m in theirs.modules() if isinstance(m, LayerNorm)} == {model.block.eps}
    assert model.block.norm == "layer"
    assert {m.approximate for m in theirs.modules() if isinstance(m, nn.GELU)} == {"none"}
    assert model.feedforward.kind == "gelu"
    assert {m.out_features for m in theirs.modules() if isinstance(m, nn.Linear) and m.bias is not None} == {
        intermediate_size(model),
        model.hidden_size,
    }
    shifts = {len(m.shifts) - 1 for m in theirs.modules() if isinstance(m, ShiftTokens)}
    assert shifts == ({model.shift.tokens} if model.shift.kind == "chunks" else set())
    rotary = theirs.attn_layers.rotary_pos_emb
    assert (rotary is None) == (model.rotary.kind == "none")
    if rotary is not None:
        assert 2 * len(rotary.inv_freq) == rotated_dims(model)
        assert (rotary.scale is not None) == (model.rotary.kind == "xpos")
        torch.testing.assert_close(rotary.inv_freq[-1].item(), model.rotary.theta ** (2 / rotated_dims(model) - 1))
        # The first dimension turns into its partner: the second one, not the one half a head away.
        first = torch.zeros(1, 1, 2, 32).index_fill_(-1, torch.tensor([0]), 1.0)
        turned = apply_rotary_pos_emb(first, rotary(torch.arange(2))[0])[0, 0, 1]
        assert turned.nonzero().flatten().tolist() == [0, 1]
        assert model.rotary.layout == "interleaved"
    if model.rotary.kind == "xpos":
        assert rotary.scale_base == model.rotary.scale_base
    alibi = theirs.attn_layers.rel_pos
    assert (0 if alibi is None else len(alibi.slopes)) == model.alibi.num_heads


def test_hugging_face_names_derive_what_llama_derives() -> None:
    transformers = pytest.importorskip("transformers")
    names = {"hidden_size": 96, "num_attention_heads": 4, "num_hidden_layers": 2}
    llama = transformers.LlamaConfig(**names)
    model = model_from_names(**names)
    assert (model.attention.head_dim, model.attention.num_kv_heads) == (llama.head_dim, llama.num_key_value_heads)
    assert model_from_names(**names, num_key_value_heads=2, head_dim=32).attention.head_dim == 32
    # The names of a llama's config.json that say something about the model are all understood.
    said = {name: value for name, value in llama.to_dict().items() if name in HUGGING_FACE_NAMES}
    model = model_from_names(**said)
    assert (model.hidden_size, model.feedforward.kind, model.feedforward.intermediate_size, model.block.eps) == (96, "swiglu", 11008, 1e-6)


@pytest.mark.parametrize(
    ("names", "path", "value"),
    [
        ({"attn_flash": False}, "attention.backend", "eager"),
        ({"use_flash_attention": False}, "attention.backend", "eager"),
        ({"attn_flash": True}, "attention.backend", "auto"),
        ({"use_abs_pos_emb": True}, "embedding.absolute", True),
        ({"alibi_pos_bias": False}, "alibi.num_heads", 0),
        ({"alibi_pos_bias": False, "alibi_num_heads": 12}, "alibi.num_heads", 0),
        ({"alibi_num_heads": 6}, "alibi.num_heads", 6),
        ({"alibi_num_heads": None}, "alibi.num_heads", 12),
        ({"heads": 8}, "alibi.num_heads", 4),
        ({"heads": 48}, "alibi.num_heads", 12),
        ({"heads": 8, "alibi_num_heads": 8}, "alibi.num_heads", 8),
        ({"heads": 8, "alibi": {"num_heads": 1}}, "alibi.num_heads", 1),
        ({"rotary_xpos": False}, "rotary.kind", "none"),
        ({"rotary_xpos": False, "rotary_pos_emb": True}, "rotary.kind", "rope"),
        ({"rotary_pos_emb": False}, "rotary.kind", "none"),
        ({"shift_tokens": 0}, "shift.kind", "none"),
        ({"shift_tokens": 3}, "shift.tokens", 3),
        ({"attn_one_kv_head": False}, "attention.num_kv_heads", 24),
        ({"attn_one_kv_head": False, "heads": 8}, "attention.num_kv_heads", 8),
        ({"qk_norm": False}, "attention.qk_norm", "none"),
        ({"attn_qk_norm": False}, "attention.qk_norm", "none"),
        ({"attn_qk_norm_dim_scale": False}, "attention.qk_norm", "l2"),
        ({"deepnorm": True}, "block.residual", "deepnorm"),
        ({"deepnorm": True}, "init.kind", "deepnorm"),
        ({"embedding_provider": "tied"}, "head.tied", True),
        ({"embedding_provider": "factorized"}, "embedding.kind", "factorized"),
        ({"embedding_provider": "value"}, "value_embedding.kind", "layered"),
        ({"dim": 1280}, "feedforward.intermediate_size", 0),
        ({"hidden_size": 1024}, "feedforward.intermediate_size", 4096),
        ({"hidden_act": "silu"}, "feedforward.kind", "swiglu"),
        ({"hidden_act": "gelu_new"}, "feedforward.kind", "gelu_tanh"),
        ({"tie_word_embeddings": True}, "head.tied", True),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 8192}}, "rotary.scaling.factor", 4.0),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rotary.scaling.kind", "linear"),
        ({"rope_scaling": None}, "rotary.scaling.kind", "none"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rotary.theta", 5e5),
        ({"dim": 512, "hidden_size": 512}, "hidden_size", 512),
        ({"dim": 512, "attention": {"sliding_window": 128}}, "attention.sliding_window", 128),
    ],
    ids=str,
)
def test_what_one_name_says(names: dict[str, Any], path: str, value: Any) -> None:
    assert value_at(model_from_names(**names), path) == value


def test_names_in_a_file_say_the_same_as_structured_keys(tmp_path: Path) -> None:
    flat, structured = tmp_path / "flat.toml", tmp_path / "structured.toml"
    flat.write_text('preset = "nano"\n[model]\ndim = 128\nheads = 2\nmax_seq_len = 512\nattn_one_kv_head = false\ndim_head = 32\n')
    structured.write_text(
        'preset = "nano"\n[model]\nhidden_size = 128\nmax_seq_len = 512\n'
        "[model.attention]\nnum_heads = 2\nnum_kv_heads = 2\nhead_dim = 32\n"
    )
    assert load(flat) == load(structured)


class Provider(nn.Embedding):
    """An embedding of a user's own."""


def test_an_embedding_of_ones_own_by_class_instance_and_path() -> None:
    path = f"{__name__}:Provider"
    for provider in (Provider, Provider(4, 4), path):
        embedding = model_from_names(embedding_provider=provider).embedding
        assert (embedding.kind, embedding.provider) == ("custom", path)


def spec_names() -> st.SearchStrategy[dict[str, Any]]:
    """Names that fit together, any of them left out."""
    on = st.booleans()
    optional: dict[str, st.SearchStrategy[Any]] = {
        "num_tokens": st.integers(1, 10**6),
        "max_seq_len": st.integers(1, 60000),
        "dim": st.integers(4, 8192),
        "depth": st.integers(1, 200),
        "dim_head": st.sampled_from([16, 64, 128]),
        "heads": st.integers(12, 64),
        "use_abs_pos_emb": on,
        "alibi_pos_bias": on,
        "alibi_num_heads": st.integers(0, 12),
        "rotary_xpos": on,
        "rotary_pos_emb": on,
        "attn_flash": on,
        "shift_tokens": st.integers(0, 3),
        "attn_one_kv_head": on,
        "qk_norm": on,
        "embedding_provider": st.sampled_from(["plain", "tied", "factorized", "value"]),
        "deepnorm": on,
    }
    # A factorized table is 128 wide inside.
    return st.fixed_dictionaries({}, optional=optional).filter(
        lambda n: n.get("embedding_provider") != "factorized" or n.get("dim", 2560) > 128
    )
