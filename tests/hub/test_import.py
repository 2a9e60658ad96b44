"""Folders of transformers' own classes, made small: the same logits as a run, and the same again when that is exported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from andromeda.hub.export_folder import export_run
from andromeda.hub.import_folder import ImportedModel, read_folder, write_run
from andromeda.model.transformer import Transformer
from andromeda.train.state import load_model
from andromeda.train.weights import load_weights

transformers = pytest.importorskip("transformers")
SIZES = {"vocab_size": 120, "hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "max_position_embeddings": 96}
GATED = SIZES | {"intermediate_size": 80, "num_key_value_heads": 2}
TOLERANCE = 1e-5


def rope(kind: str, **rest: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 500.0, **rest}}


def llama(**rest: Any) -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**GATED | rest))


def qwen2(**rest: Any) -> Any:
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**GATED | rest))


def qwen3(**rest: Any) -> Any:
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**GATED | {"head_dim": 20} | rest))


def gemma2(**rest: Any) -> Any:
    own = {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 16, "attn_logit_softcapping": 5.0}
    return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**GATED | own | rest))


def mistral(**rest: Any) -> Any:
    return transformers.MistralForCausalLM(transformers.MistralConfig(**GATED | rest))


def mixtral(**rest: Any) -> Any:
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**GATED | {"num_local_experts": 4} | rest))


def gpt2(**rest: Any) -> Any:
    sizes = {"vocab_size": 120, "n_embd": 48, "n_layer": 4, "n_head": 4, "n_positions": 96}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes | rest))


def neox(**rest: Any) -> Any:
    return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**SIZES | {"hidden_size": 64, "intermediate_size": 80} | rest))


FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": llama,
    "llama-tied-biases": lambda: llama(tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "llama-wide-heads": lambda: llama(head_dim=20),
    "llama-linear": lambda: llama(**rope("linear", factor=4.0)),
    "llama-dynamic": lambda: llama(**rope("dynamic", factor=4.0)),
    "llama-yarn": lambda: llama(**rope("yarn", factor=4.0, original_max_position_embeddings=24)),
    "llama-yarn-factor": lambda: llama(**rope("yarn", factor=4.0, original_max_position_embeddings=24, attention_factor=1.3)),
    "llama3": lambda: llama(**rope("llama3", factor=8.0, original_max_position_embeddings=32, low_freq_factor=1.0, high_freq_factor=4.0)),
    "llama-gelu": lambda: llama(hidden_act="gelu"),
    "mistral": lambda: mistral(sliding_window=16),
    "mistral-no-window": lambda: mistral(sliding_window=None),
    "qwen2": qwen2,
    "qwen2-windows": lambda: qwen2(
        use_sliding_window=True, sliding_window=16, layer_types=["sliding_attention", "full_attention"] * 2, tie_word_embeddings=True
    ),
    "qwen3": lambda: qwen3(rms_norm_eps=1e-3),
    "qwen3-tied": lambda: qwen3(tie_word_embeddings=True, attention_bias=True),
    "gemma2": gemma2,
    "gemma2-no-caps": lambda: gemma2(attn_logit_softcapping=None, final_logit_softcapping=None),
    "mixtral": lambda: mixtral(sliding_window=None),
    "gpt2": gpt2,
    "gpt2-untied": lambda: gpt2(tie_word_embeddings=False, activation_function="relu", n_inner=64),
    "gpt-neox": neox,
    "gpt-neox-serial": lambda: neox(use_parallel_residual=False, attention_bias=False, hidden_act="gelu_new"),
}


def made(name: str) -> Any:
    """A small model in which no weight has its start value."""
    torch.manual_seed(0)
    model = FAMILIES[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


@pytest.fixture(scope="module", params=list(FAMILIES))
def imported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, ImportedModel, Path]:
    theirs, folder = made(request.param), tmp_path_factory.mktemp("import") / "model"
    theirs.save_pretrained(folder)
    return request.param, theirs, read_folder(folder, tokenizer=False), folder


def tokens() -> Tensor:
    return torch.randint(0, 120, (2, 40), generator=torch.Generator().manual_seed(0))


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / max(1.0, float(a.abs().max())))


def built(read: ImportedModel) -> Transformer:
    model = Transformer(read.config).eval()
    load_model(model, read.weights)
    return model


@torch.no_grad()
def test_logits(imported: tuple[str, Any, ImportedModel, Path]) -> None:
    _, theirs, read, _ = imported
    assert difference(theirs(tokens()).logits, built(read)(tokens())) <= TOLERANCE


@torch.no_grad()
def test_through_a_run_and_back(imported: tuple[str, Any, ImportedModel, Path], tmp_path: Path) -> None:
    """What was not folded comes back bit for bit, under its own name for Llama and its relatives."""
    name, theirs, read, _ = imported
    run = write_run(read, tmp_path / "run")
    kept = load_weights(run)
    assert all(torch.equal(tensor, read.weights[key]) for key, tensor in kept.state_dict().items() if key in read.weights)
    export_run(run, tmp_path / "back")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", trust_remote_code=True).eval()
    if "dynamic" not in name:
        assert difference(theirs(tokens()).logits, back(tokens()).logits) <= TOLERANCE
    if name.startswith(("llama", "qwen2")) and "dynamic" not in name and "gelu" not in name and "windows" not in name:
        assert type(back).__name__ == "LlamaForCausalLM"
    if not name.startswith(("gpt", "mixtral", "gemma2", "qwen3")):
        original, again = theirs.state_dict(), back.state_dict()
        assert all(torch.equal(original[key], again[key]) for key in original)
    once_more = read_folder(tmp_path / "back", tokenizer=False)
    assert once_more.weights.keys() == read.weights.keys()
    assert all(torch.equal(once_more.weights[key], read.weights[key]) for key in read.weights)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_sixteen_bits_and_shards(dtype: torch.dtype, tmp_path: Path) -> None:
    theirs = made("llama").to(dtype)
    theirs.save_pretrained(tmp_path / "x", max_shard_size="40KB")
    assert (tmp_path / "x" / "model.safetensors.index.json").exists()
    read = read_folder(tmp_path / "x", tokenizer=False)
    assert {weight.dtype for weight in read.weights.values()} == {torch.float32}
    wide = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "x", dtype=torch.float32).eval()
    assert difference(wide(tokens()).logits, built(read)(tokens())) <= TOLERANCE
    export_run(write_run(read, tmp_path / "run"), tmp_path / "back", dtype={torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype])
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back").state_dict()
    assert all(torch.equal(tensor, back[key]) for key, tensor in theirs.state_dict().items())


@torch.no_grad()
def test_older_folders(tmp_path: Path) -> None:
    """rope_theta and rope_scaling apart, Mixtral's experts one by one, tables that follow from the configuration."""
    import json

    from safetensors.torch import load_file, save_file

    made("mixtral").save_pretrained(tmp_path / "x")
    config = json.loads((tmp_path / "x/config.json").read_text())
    config.pop("rope_parameters")
    config |= {"rope_theta": 700.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    (tmp_path / "x/config.json").write_text(json.dumps(config))
    tensors = load_file(tmp_path / "x/model.safetensors")
    assert any(".w1.weight" in name for name in tensors)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(6)
    save_file(tensors, tmp_path / "x/model.safetensors", {"format": "pt"})
    read = read_folder(tmp_path / "x", tokenizer=False)
    assert read.config.rotary.theta == 700.0
    assert read.config.rotary.scaling.kind == "linear"
