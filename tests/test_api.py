"""What `from andromeda import Andromeda` promises, against closed forms, torch and files read by others."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from andromeda import Andromeda
from andromeda.api import place
from andromeda.config.data import BuildConfig
from andromeda.config.model import ModelConfig
from andromeda.data.tokenizer import train_tokenizer
from andromeda.train import checkpoint
from andromeda.utils.errors import AndromedaError, CheckpointError, ConfigError, RequestError

BYTES = train_tokenizer([], BuildConfig(tokenizer="bytes"))
SMALL: dict[str, Any] = {"num_tokens": 300, "max_seq_len": 64, "dim": 32, "depth": 2, "heads": 4, "dim_head": 16}


def small(**rest: Any) -> Andromeda:
    return Andromeda(**SMALL | rest)


class Doubled(nn.Module):
    """A user's own embedding."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.table = nn.Embedding(config.vocab_size, config.hidden_size)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return 2 * self.table(ids)


def test_without_names_it_is_the_model_of_the_specification() -> None:
    model = Andromeda(device="meta", dtype="bf16")
    c, a = model.config, model.config.attention
    assert (c.vocab_size, c.max_seq_len, c.hidden_size, c.num_layers, a.head_dim, a.num_heads, a.num_kv_heads) == (
        50432,
        8192,
        2560,
        32,
        128,
        24,
        1,
    )
    assert (c.alibi.num_heads, c.rotary.kind, c.shift.tokens, c.embedding.absolute) == (12, "xpos", 1, False)
    assert model.head.weight.is_meta
    assert model.head.weight.dtype == torch.bfloat16
    content = 128 - 4  # of a query's and a key's dimensions: ALiBi has the others
    norms_and_scales = 65 * 2560 + 32 * (24 + 1) * content
    attention = 32 * 2560 * (24 + 1) * (content + 128)
    feedforward = 32 * (2 * 2560 * 10240 + 10240 + 2560)
    assert model.num_parameters() == 2 * 50432 * 2560 + attention + feedforward + norms_and_scales
    assert "2.45 B parameters" in repr(model)


def test_a_shared_weight_counts_once() -> None:
    plain, tied = small(), small(tie_word_embeddings=True)
    assert plain.num_parameters() - tied.num_parameters() == 300 * 32


def test_calling_it_gives_logits_that_learn() -> None:
    model, ids = small(), torch.randint(0, 300, (2, 10))
    logits = model(ids)
    assert logits.shape == (2, 10, 300)
    nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_the_seed_is_the_model() -> None:
    ids = torch.arange(9)[None]
    assert torch.equal(small(seed=4)(ids), small(seed=4)(ids))
    assert not torch.equal(small(seed=4)(ids), small(seed=5)(ids))


def test_a_preset_is_changed_by_names_of_every_kind() -> None:
    model = Andromeda.from_preset("nano", depth=2, vocab_size=300, alibi_num_heads=1, attention={"sliding_window": 8}, seed=3)
    c = model.config
    assert (c.num_layers, c.vocab_size, c.alibi.num_heads, c.attention.sliding_window, c.hidden_size) == (2, 300, 1, 8, 128)
    assert c.feedforward.kind == "relu2"


def test_an_embedding_may_be_a_class_or_a_module_that_keeps_its_weights() -> None:
    built = small(embedding_provider=Doubled)
    assert isinstance(built.embedding.tokens, Doubled)
    config = built.config
    module = Doubled(config)
    kept = module.table.weight.detach().clone()
    for model in (small(embedding_provider=module), Andromeda(config, embedding_provider=module)):
        assert model.embedding.tokens is module
        assert torch.equal(module.table.weight, kept)


@pytest.mark.parametrize("dtype", ["fp64", "fp32", "bf16", torch.bfloat16])
def test_it_writes_in_every_precision(dtype: str | torch.dtype) -> None:
    model = small(dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {model.head.weight.dtype}
    assert len(model.generate([1, 2], max_new_tokens=5, seed=0)) == 5


def test_placing_leaves_float32_buffers_as_they_are() -> None:
    model = small(feedforward={"kind": "moe", "bias": False}, experts={"num_experts": 4, "top_k": 2})
    before = {name: buffer.dtype for name, buffer in model.named_buffers()}
    place(model, torch.device("cpu"), "bf16")
    assert {name: buffer.dtype for name, buffer in model.named_buffers()} == before
    assert model(torch.ones(1, 4, dtype=torch.long)).dtype == torch.bfloat16


def test_an_answer_is_of_its_prompts_kind() -> None:
    model, settings = small(tokenizer=BYTES), {"max_new_tokens": 6, "seed": 2}
    text, ids = model.generate("ab", **settings), model.generate([256, 97, 98], **settings)
    assert BYTES.decode(ids) == text
    assert model.generate(torch.tensor([256, 97, 98]), **settings) == ids
    assert model.generate(["ab", "ab"], **settings) == [text, text]
    assert model.generate([[256, 97, 98], "ab"], **settings) == [ids, text]
    assert model.generate(torch.tensor([[256, 97, 98]] * 2), **settings) == [ids, ids]
    assert "".join(model.generate("ab", stream=True, **settings)) == text
    assert list(model.generate([256, 97, 98], stream=True, **settings)) == ids
    assert model.generate([], **settings) == model.generate([256], **settings)


def test_what_is_saved_comes_back_to_the_bit(tmp_path: Path) -> None:
    model, ids = small(tokenizer=BYTES, seed=7, tie_word_embeddings=True), torch.arange(20)[None]
    model.save(tmp_path / "run")
    back = Andromeda.from_run(tmp_path / "run", device="cpu", dtype="fp32")
    assert not back.training
    assert torch.equal(back(ids), model(ids))
    assert back.tokenizer
    assert back.tokenizer.fingerprint == BYTES.fingerprint
    assert back.config == model.config
    # As a stranger reads it: plain TOML and safetensors.
    assert tomllib.loads((tmp_path / "run/config.toml").read_text())["model"]["hidden_size"] == 32
    saved = load_file(tmp_path / "run/checkpoints/step-00000000/model.safetensors")
    assert sum(tensor.numel() for tensor in saved.values()) == model.num_parameters()
    with pytest.raises(CheckpointError, match="already holds a run"):
        model.save(tmp_path / "run")


def test_ema_and_older_steps_are_read(tmp_path: Path) -> None:
    model, average = small(seed=1), small(seed=2)
    model.save(tmp_path)
    parts = {"model": dict(model.state_dict()), "average": {name: p.detach() for name, p in average.named_parameters()}}
    checkpoint.save(tmp_path / "checkpoints", checkpoint.Snapshot(5, parts, {"healthy": True}))
    ids = torch.arange(20)[None]
    assert torch.equal(Andromeda.from_run(tmp_path, dtype="fp32")(ids), model(ids))
    assert torch.equal(Andromeda.from_run(tmp_path, dtype="fp32", ema=True)(ids), average(ids))
    assert torch.equal(Andromeda.from_run(tmp_path, dtype="fp32", step=0)(ids), model(ids))


def test_it_is_trained_and_saved_by_plain_torch(tmp_path: Path) -> None:
    """An ordinary module: an optimizer of torch's own takes it, and what it learned is what it writes."""
    model, ids = small(), torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = nn.functional.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert model.generate([1, 2], max_new_tokens=6, temperature=0) == [3, 4, 5, 6, 7, 8]
    assert model.training


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: Andromeda(dmi=64), ConfigError, "dmi.*did you mean.*dim"),
        (lambda: Andromeda(ModelConfig(), dim=3), ConfigError, "dim cannot change"),
        (lambda: Andromeda.from_preset("andromedas"), ConfigError, "did you mean andromeda"),
        (lambda: small(device="cuda:99"), ConfigError, "device = 'cuda:99', but this machine shows"),
        (lambda: small(device="gpu"), ConfigError, "no device 'gpu'"),
        (lambda: small(dtype="fp31"), ConfigError, "no dtype 'fp31'.*did you mean fp32"),
        (lambda: small(tokenizer="/nowhere"), AndromedaError, "no tokenizer at /nowhere"),
        (lambda: small(embedding_provider="plane"), ConfigError, "did you mean plain"),
        (lambda: Andromeda.from_run("/nowhere"), CheckpointError, "/nowhere is not a run folder"),
        (lambda: small().generate("text"), RequestError, "no tokenizer"),
        (lambda: small().generate([[1], [2]], stream=True), RequestError, "one prompt"),
        (lambda: small().generate([1], temprature=0), RequestError, "did you mean temperature"),
    ],
)
def test_mistakes_get_one_sentence(make: Any, error: type[AndromedaError], words: str) -> None:
    with pytest.raises(error, match=f"^[^\n]*{words}[^\n]*$"):
        make()
