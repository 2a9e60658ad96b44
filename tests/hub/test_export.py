"""Exported folders in transformers: the same logits, cached, padded, packed, recomputed and saved again, for every preset and part."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from andromeda.config.load import from_values
from andromeda.config.model import ModelConfig
from andromeda.hub.export_folder import convert, write_folder
from andromeda.hub.parameter_names import hub_name
from andromeda.hub.quantize import rounding
from andromeda.model.meta_model import meta_model
from andromeda.train.state import load_model, model_tensors
from andromeda.utils.errors import AndromedaError
from tests.hub.exported import CONTEXT, NAMES, VOCABULARY, exported, random_config, small_preset, stirred

pytest.importorskip("transformers")
MODELS = [(name, lambda name=name: small_preset(name)) for name in NAMES]
MODELS += [(f"random-{seed}", lambda seed=seed: random_config(seed)) for seed in range(20)]
TOLERANCE = 1e-5


def by_layer() -> ModelConfig:
    """Three token mixers in turn, two of which change keys of [model.attention], one with a window."""
    mixers = {
        "local": {"kind": "softmax", "sliding_window": 16, "softcap": 5.0, "bias": True},
        "sigmoid": {"kind": "sigmoid", "qk_norm": "l2_head_scale", "scale": 0.7},
    }
    values = small_preset("nano").model_dump() | {"layers": ("full", "local", "sigmoid"), "mixers": mixers, "num_layers": 4}
    return from_values({"model": values, "train": {"seq_len": 64}}).model


MODELS.append(("by-layer", by_layer))


@pytest.fixture(scope="module", params=MODELS, ids=[name for name, _ in MODELS])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    """A model of ours, the same in transformers, and the folder between them."""
    model = stirred(request.param[1]())
    folder = tmp_path_factory.mktemp("export") / "model"
    return model, exported(model, folder), folder


def tokens(batch: int = 2, length: int = 48) -> Tensor:
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(0))


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / max(1.0, float(a.abs().max())))


@torch.no_grad()
def test_logits(pair: tuple[Any, Any, Path]) -> None:
    ours, theirs, _ = pair
    assert difference(ours(tokens()), theirs(tokens()).logits) <= TOLERANCE


@torch.no_grad()
def test_cached_steps_equal_one_pass(pair: tuple[Any, Any, Path]) -> None:
    """A prefill, a step of several tokens, then single ones. Frequencies that follow the length differ between the two by design."""
    ours, theirs, _ = pair
    if ours.config.rotary.scaling.kind == "dynamic":
        pytest.skip("each step has frequencies of its own length")
    ids, cache, logits = tokens(), None, []
    for part in ids.split([20, 5, *[1] * 23], 1):
        output = theirs(part, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits.append(output.logits)
    assert difference(theirs(ids).logits, torch.cat(logits, 1)) <= TOLERANCE


@torch.no_grad()
def test_generation_with_and_without_a_cache(pair: tuple[Any, Any, Path]) -> None:
    """Greedy and with beams; the prompts of unequal length are padded at the left."""
    _, theirs, _ = pair
    ids = tokens(2, 12)
    ids[0, :5] = 0
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    settings = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": VOCABULARY + 1}
    for beams in (1, 2):
        cached = theirs.generate(ids, use_cache=True, num_beams=beams, **settings)
        assert torch.equal(cached, theirs.generate(ids, use_cache=False, num_beams=beams, **settings))
        if theirs.config.model_type == "llama" or theirs.config.rotary.get("scaling", {}).get("kind") != "dynamic":
            alone = theirs.generate(ids[:1, 5:], num_beams=beams, **settings | {"attention_mask": mask[:1, 5:]})
            assert torch.equal(alone[0], cached[0, 5:])


@torch.no_grad()
def test_left_padding_changes_nothing(pair: tuple[Any, Any, Path]) -> None:
    _, theirs, _ = pair
    ids, before = tokens(), torch.zeros(2, 5, dtype=torch.int64)
    mask = torch.cat([before, torch.ones_like(ids)], 1)
    padded = theirs(torch.cat([before, ids], 1), attention_mask=mask).logits[:, 5:]
    assert difference(theirs(ids).logits, padded) <= TOLERANCE


@torch.no_grad()
def test_packed_sequences_are_as_alone(pair: tuple[Any, Any, Path]) -> None:
    """Restarting position_ids and no mask, as TRL packs. The first sequence is the longest, whose length dynamic scaling follows."""
    _, theirs, _ = pair
    ids = tokens()
    a, b = ids[:1, :28], ids[1:, :28]
    positions = torch.arange(28).repeat(2)[None]
    theirs.train()  # no cache is wanted, as in training
    packed = theirs(torch.cat([a, b], 1), position_ids=positions, use_cache=False).logits
    theirs.eval()
    assert difference(torch.cat([theirs(a).logits, theirs(b).logits], 1), packed) <= TOLERANCE


def test_gradient_checkpointing(pair: tuple[Any, Any, Path]) -> None:
    """The same loss and gradients; labels are shifted and -100 is left out."""
    _, theirs, _ = pair
    ids = tokens()
    labels = ids.clone()
    labels[:, :7] = -100
    theirs.train()
    found = []
    for recompute in (False, True):
        theirs.gradient_checkpointing_enable() if recompute else theirs.gradient_checkpointing_disable()
        theirs.zero_grad()
        loss = theirs(ids, labels=labels).loss
        loss.backward()
        found.append((float(loss), {name: p.grad.clone() for name, p in theirs.named_parameters() if p.grad is not None}))
    theirs.gradient_checkpointing_disable()
    theirs.eval()
    (plain, grads), (again, recomputed) = found
    assert again == pytest.approx(plain, rel=1e-6)
    assert grads.keys() == recomputed.keys()
    assert all(torch.allclose(grads[name], recomputed[name], atol=1e-6) for name in grads)
    with torch.no_grad():
        logits = theirs(ids).logits[:, 6:-1]
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 7:].flatten())
    assert plain == pytest.approx(float(expected), rel=1e-5)


def test_save_and_load_again_is_bit_equal(pair: tuple[Any, Any, Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    _, theirs, folder = pair
    theirs.save_pretrained(tmp_path / "again")
    first, second = load_file(folder / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    with torch.no_grad():
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True).eval()
        assert torch.equal(again(tokens()).logits, theirs(tokens()).logits)


@pytest.mark.parametrize("name", ["andromeda-tuned", "andromeda-125m", "andromeda-65b"])
@torch.no_grad()
def test_sixteen_bits_and_shards(name: str, tmp_path: Path) -> None:
    """bf16 weights in several files: the values of the fp32 ones, rounded."""
    model = stirred(small_preset(name))
    theirs = exported(model, tmp_path / "x", dtype="bf16", shard_bytes=1 << 16)
    assert len(list((tmp_path / "x").glob("model-*.safetensors"))) > 1
    for parameter in model.parameters():
        parameter.copy_(parameter.bfloat16())
    assert theirs.dtype == torch.bfloat16
    assert difference(model(tokens()), theirs.float()(tokens()).logits) <= TOLERANCE


def llama(**changes: Any) -> ModelConfig:
    """A Llama-shaped model, small."""
    model = {
        "vocab_size": VOCABULARY,
        "max_seq_len": CONTEXT,
        "hidden_size": 64,
        "num_layers": 2,
        "attention": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "bias": changes.pop("bias", False)} | changes.pop("attention", {}),
        "rotary": {"kind": "rope", "theta": 500.0} | changes.pop("rotary", {}),
        "feedforward": {"kind": "swiglu", "intermediate_size": 96, "bias": changes.pop("mlp_bias", False)},
        "block": {"norm": "rms"},
        "head": {"tied": changes.pop("tied", False)},
    }
    return from_values({"model": model, "train": {"seq_len": 64}}).model


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tied": True, "bias": True, "mlp_bias": True},
        {"rotary": {"layout": "interleaved"}},
        {"rotary": {"scaling": {"kind": "linear", "factor": 4.0}}},
        {"rotary": {"scaling": {"kind": "ntk", "factor": 4.0}}},
        {"rotary": {"scaling": {"kind": "yarn", "factor": 4.0}}},
        {"rotary": {"scaling": {"kind": "llama3", "factor": 4.0, "beta_fast": 4.0, "beta_slow": 1.0}}},
        {"rotary": {"scaling": {"kind": "yarn", "factor": 4.0}}, "attention": {"scale": 0.3}},
    ],
    ids=["plain", "biases-tied", "interleaved", "linear", "ntk", "yarn", "llama3", "yarn-scale"],
)
@torch.no_grad()
def test_llama_shapes_need_no_code(changes: dict[str, Any], tmp_path: Path) -> None:
    model = stirred(llama(**changes))
    theirs = exported(model, tmp_path / "x")
    assert type(theirs).__name__ == "LlamaForCausalLM"
    assert not list((tmp_path / "x").glob("*.py"))
    assert difference(model(tokens()), theirs(tokens()).logits) <= TOLERANCE


def test_the_modeling_file_needs_transformers_alone() -> None:
    for path in files("andromeda.hub").joinpath("transformers_files").iterdir():
        if path.name.endswith(".py"):
            modules = set(re.findall(r"^(?:from|import) ([\w.]+)", path.read_text("utf-8"), flags=re.MULTILINE))
            standard = {"__future__", "collections.abc", "dataclasses", "functools", "math", "typing"}
            assert {module.split(".")[0] for module in modules - standard} - {""} <= {"torch", "transformers"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"embedding": {"kind": "custom", "provider": "torch.nn:Identity"}}, "model.embedding.provider"),
        ({"attention": {"mixer": "andromeda.model.attention:Attention"}}, "model.attention.mixer"),
        ({"attention": {"qk_norm": {"kind": "andromeda.model.qk_norm:L2Norm"}}}, "model.attention.qk_norm"),
        ({"layers": ["full", "mine"], "mixers": {"mine": {"kind": "andromeda.model.attention:Attention"}}}, "model.mixers.mine.kind"),
        (
            {
                "layers": ["near", "far"],
                "mixers": {"near": {"kind": "softmax", "sliding_window": 8}, "far": {"kind": "softmax", "sliding_window": 64}},
            },
            "windows of 8 and 64",
        ),
    ],
)
def test_code_of_a_users_own_has_no_form(changes: dict[str, Any], words: str) -> None:
    config = from_values({"model": changes}).model
    with pytest.raises(AndromedaError, match=words) as error:
        convert(config, {})
    assert str(error.value).count(". ") == 0


def test_mixers_by_layer_come_back(tmp_path: Path) -> None:
    from andromeda.hub.import_folder import read_folder

    model = stirred(by_layer())
    write_folder(tmp_path / "x", convert(model.config, model_tensors(model)), None)
    read = read_folder(tmp_path / "x", tokenizer=False)
    assert (read.config.layers, read.config.mixers) == (model.config.layers, model.config.mixers)
    assert all(torch.equal(tensor, read.weights[name]) for name, tensor in model_tensors(model).items())


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@torch.no_grad()
def test_experts_in_8_bits(kind: str, tmp_path: Path) -> None:
    """Routed and shared experts are stored in 8 bits, and compute what a model with the rounded weights does."""
    from transformers import AutoModelForCausalLM

    parts = {"feedforward": {"kind": "moe", "intermediate_size": 40}, "experts": {"num_experts": 4, "num_shared_experts": 1}}
    model = stirred(from_values({"model": small_preset("nano").model_dump() | parts, "train": {"seq_len": 64}}).model)
    write_folder(tmp_path / "x", convert(model.config, model_tensors(model), kind), None)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "x", trust_remote_code=True).eval()
    stacks = {name: tensor for name, tensor in load_file(tmp_path / "x" / "model.safetensors").items() if ".experts." in name}
    assert {tensor.element_size() for name, tensor in stacks.items() if not name.endswith("scale")} == {1}
    before = model(tokens())
    rounded = rounding(kind, hub_name)
    load_model(model, {name: rounded(name, tensor) for name, tensor in model_tensors(model).items()})
    assert difference(before, model(tokens())) > 10 * TOLERANCE
    assert difference(model(tokens()), theirs(tokens()).logits) <= TOLERANCE


def test_every_key_of_the_model_has_a_form_or_a_reason() -> None:
    """A key that is new in ModelConfig must be given a form in the modeling file: until then it is refused, never dropped."""
    from andromeda.config.keys import flatten
    from andromeda.hub.hub_config import HANDLED

    handled = {prefix + key for prefix, keys in HANDLED.items() for key in keys.split()}
    assert handled <= flatten(ModelConfig().model_dump()).keys()


def test_every_parameter_has_a_name() -> None:
    for _, build in MODELS:
        config = build()
        convert(config, {name: torch.empty(0) for name in model_tensors(meta_model(config))})


def test_save_pretrained(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from andromeda import Andromeda

    model = Andromeda.from_preset("nano", seed=3, vocab_size=VOCABULARY)
    model.save_pretrained(tmp_path / "shared")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "shared", trust_remote_code=True).eval()
    with torch.no_grad():
        assert difference(model.eval()(tokens()), theirs(tokens()).logits) <= TOLERANCE
    with pytest.raises(AndromedaError, match="already holds files"):
        model.save_pretrained(tmp_path / "shared")


def test_nothing_is_left_of_a_write_that_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = stirred(llama())

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("andromeda.hub.export_folder.write_tensors", full)
    with pytest.raises(OSError, match="No space"):
        write_folder(tmp_path / "x", convert(model.config, model_tensors(model)), None)
    assert not list(tmp_path.iterdir())
