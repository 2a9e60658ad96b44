"""GGUF files in llama.cpp itself (xllamacpp): the same token ids and the same probabilities."""

from __future__ import annotations

import json
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from andromeda.config.data import BuildConfig
from andromeda.config.model import ModelConfig
from andromeda.data.tokenizer import Tokenizer, train_tokenizer
from andromeda.hub.gguf_file import gguf_rounding, write_gguf
from andromeda.model.transformer import Transformer
from andromeda.train.state import load_model, model_tensors
from andromeda.utils.errors import AndromedaError
from tests.hub.exported import small_preset, stirred
from tests.hub.test_export import llama
from tests.hub.test_tokenizer_files import texts

gguf = pytest.importorskip("gguf", reason="gguf is not installed: pip install gguf")
xllamacpp = pytest.importorskip("xllamacpp", reason="xllamacpp is not installed: pip install xllamacpp")
PATTERNS = ("gpt-2", "llama-bpe", "qwen2")
ROPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "interleaved": {"rotary": {"layout": "interleaved"}},
    "linear": {"rotary": {"scaling": {"kind": "linear", "factor": 4.0}}},
    "yarn": {"rotary": {"scaling": {"kind": "yarn", "factor": 4.0}}},
    "llama3": {"rotary": {"scaling": {"kind": "llama3", "factor": 4.0, "beta_fast": 4.0, "beta_slow": 1.0}}},
    "tied-biases": {"tied": True, "bias": True},
}


class LlamaServer:
    """llama.cpp's server with one file, attention in float32."""

    def __init__(self, path: Path) -> None:
        p = xllamacpp.CommonParams()
        p.model.path = str(path)
        p.n_ctx, p.n_parallel, p.cpuparams.n_threads = 256, 1, 1
        p.cache_type_k = p.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        p.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._server = xllamacpp.Server(p)

    def ask(self, route: str, **values: Any) -> Any:
        request = urllib.request.Request(
            f"{self._server.listening_address}/{route}", json.dumps(values).encode(), {"Content-Type": "application/json"}
        )
        return json.load(urllib.request.urlopen(request, timeout=60))

    def logprobs(self, ids: list[int]) -> dict[int, float]:
        # The chosen token is forced to be a letter: one that ends inside a character, or ends the text, would be told without figures.
        letter = self.ask("tokenize", content="a", add_special=False)["tokens"]
        settings = {"n_predict": 1, "n_probs": 5, "cache_prompt": False, "temperature": 0.0, "logit_bias": [[letter[0], 1000.0]]}
        found = self.ask("completion", prompt=ids, **settings)
        return {entry["id"]: entry["logprob"] for entry in found["completion_probabilities"][0]["top_logprobs"]}


def tokenizer_of(pattern: str) -> Tokenizer:
    config = BuildConfig(vocab_size=420, pre_tokenizer=pattern, special_tokens=("<|mask|>",))
    return train_tokenizer([text.replace("\x00", "") for text in texts(600)], config)


@pytest.fixture(scope="module", params=PATTERNS)
def named(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, LlamaServer]:
    tokenizer, path = tokenizer_of(request.param), tmp_path_factory.mktemp("gguf") / "m.gguf"
    model = stirred(llama().model_copy(update={"vocab_size": 420}))
    write_gguf(path, model.config, model_tensors(model), tokenizer, "F16")
    return tokenizer, LlamaServer(path)


def test_ids_are_equal_on_2000_texts(named: tuple[Tokenizer, LlamaServer]) -> None:
    ours, theirs = named
    for text in texts(2000):
        text = text.replace("\x00", "")  # llama.cpp's texts end there
        assert theirs.ask("tokenize", content=text, add_special=False, parse_special=False)["tokens"] == ours.encode(text), text
    assert theirs.ask("tokenize", content="the", add_special=True)["tokens"] == [ours.eos, *ours.encode("the")]


@pytest.mark.parametrize("shape", ROPES)
@torch.no_grad()
def test_logprobs(shape: str, tmp_path: Path) -> None:
    config = llama(**json.loads(json.dumps(ROPES[shape])))
    model = stirred(config)
    write_gguf(tmp_path / "m.gguf", config, model_tensors(model), tokenizer_for(config), "F32")
    theirs = LlamaServer(tmp_path / "m.gguf")
    for seed in range(4):
        ids = torch.randint(0, 300, (1, 40), generator=torch.Generator().manual_seed(seed))
        expected = model(ids)[0, -1].log_softmax(-1)
        found = theirs.logprobs(ids[0].tolist())
        assert set(found) == set(expected.topk(5).indices.tolist())
        assert all(abs(float(expected[i]) - value) <= 1e-5 for i, value in found.items()), found


def tokenizer_for(config: ModelConfig) -> Tokenizer:
    return train_tokenizer(texts(50), BuildConfig(vocab_size=280, pre_tokenizer="llama-bpe"))


@dataclass(frozen=True)
class RoundedFile:
    """A file of a kind, the same weights in a file of F32, and a model of ours that has them."""

    kind: str
    original: Transformer
    model: Transformer
    own: Path
    wide: Path


@pytest.fixture(scope="module", params=["F16", "Q8_0", "Q4_0"])
def rounded_file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> RoundedFile:
    config, place = llama(attention={"head_dim": 32}), tmp_path_factory.mktemp("rounded")
    original, model, rounded = stirred(config), Transformer(config).eval(), gguf_rounding(request.param)
    load_model(model, {name: rounded(name, tensor) for name, tensor in model_tensors(original).items()})
    write_gguf(place / "own.gguf", config, model_tensors(original), tokenizer_for(config), request.param)
    write_gguf(place / "wide.gguf", config, model_tensors(model), tokenizer_for(config), "F32")
    return RoundedFile(request.param, original, model, place / "own.gguf", place / "wide.gguf")


def prompts(count: int) -> list[torch.Tensor]:
    return [torch.randint(0, 300, (1, 40), generator=torch.Generator().manual_seed(seed)) for seed in range(count)]


def differences(model: Transformer, server: LlamaServer) -> list[float]:
    """Largest difference of the five largest log-probabilities after each of four prompts."""
    found = []
    for ids in prompts(4):
        expected, theirs = model(ids)[0, -1].log_softmax(-1), server.logprobs(ids[0].tolist())
        found.append(max(abs(float(expected[i]) - value) for i, value in theirs.items()))
    return found


def test_stored_weights_are_those_of_the_rounded_model(rounded_file: RoundedFile) -> None:
    """Dequantized by the gguf library, bit for bit; and near the original ones."""
    own, wide = (gguf.GGUFReader(path).tensors for path in (rounded_file.own, rounded_file.wide))
    assert [tensor.name for tensor in own] == [tensor.name for tensor in wide]
    assert next(tensor for tensor in own if tensor.name == "blk.0.ffn_up.weight").tensor_type.name == rounded_file.kind
    for a, b in zip(own, wide, strict=True):
        assert np.array_equal(gguf.quants.dequantize(a.data, a.tensor_type).ravel(), b.data.ravel()), a.name
    exact = rounded_file.original.decoder.blocks[0].feedforward.inner.weight.detach()
    rounded = rounded_file.model.decoder.blocks[0].feedforward.inner.weight.detach()
    assert float((exact - rounded).abs().max()) <= {"F16": 2e-4, "Q8_0": 4e-3, "Q4_0": 0.08}[rounded_file.kind]


@torch.no_grad()
def test_rounded_weights_in_llama_cpp(rounded_file: RoundedFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same weights in F32, llama.cpp agrees within 1e-5. In the file's own kind it rounds activations too, which is all the rest.

    Activations are rounded to blocks of Q8_0 for Q8_0 and Q4_0; a number between two steps may go to either, as one prompt of the
    four may show. In F16 files they are rounded to float16, in an order of sums that depends on the processor.
    """
    assert max(differences(rounded_file.model, LlamaServer(rounded_file.wide))) <= 1e-5
    own = LlamaServer(rounded_file.own)
    found = differences(rounded_file.model, own)
    assert 1e-4 < max(found) <= {"F16": 5e-3, "Q8_0": 0.15, "Q4_0": 0.15}[rounded_file.kind]
    if rounded_file.kind == "F16":
        return
    blocks, plain = gguf.GGMLQuantizationType.Q8_0, torch.nn.functional.linear

    def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        y = gguf.quants.dequantize(gguf.quants.quantize(x.numpy(), blocks), blocks)
        return plain(torch.from_numpy(y.copy()).view_as(x), weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    assert sorted(differences(rounded_file.model, own))[2] <= 1e-5


@pytest.mark.parametrize("name", ["nano", "andromeda", "andromeda-125m"])
def test_other_shapes_are_refused(name: str, tmp_path: Path) -> None:
    model = stirred(small_preset(name))
    with pytest.raises(AndromedaError, match=r"llama\.cpp has no form for this model"):
        write_gguf(tmp_path / "m.gguf", model.config, model_tensors(model), None, "F16")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (BuildConfig(tokenizer="bytes"), "kind bytes"),
        (BuildConfig(tokenizer="unigram", vocab_size=400), "kind unigram"),
        (BuildConfig(vocab_size=300), "does not know"),
    ],
)
def test_other_tokenizers_are_refused(config: BuildConfig, words: str, tmp_path: Path) -> None:
    model = stirred(llama().model_copy(update={"vocab_size": 420}))
    tokenizer = train_tokenizer([text.replace("\x00", "") for text in texts(400)], config)
    with pytest.raises(AndromedaError, match=words) as error:
        write_gguf(tmp_path / "m.gguf", model.config, model_tensors(model), tokenizer, "F16")
    assert "--pre-tokenizer" in str(error.value)


def test_an_unknown_type(tmp_path: Path) -> None:
    with pytest.raises(AndromedaError, match="Q5_K"):
        write_gguf(tmp_path / "m.gguf", llama(), {}, None, "Q5_K")
