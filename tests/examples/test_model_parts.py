"""The examples of parts of a user's own: each file alone adds one, which computes what it says and goes the whole way of a run."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from andromeda.config.load import load
from andromeda.config.model import ModelConfig
from andromeda.config.parts import check_own_parts
from andromeda.config.rules import check_model
from andromeda.model.describe import describe
from andromeda.model.flops import forward_flops_per_token
from andromeda.model.kv_cache.dynamic import DynamicKVCache
from andromeda.model.transformer import Transformer
from andromeda.plan.memory import decode_state
from andromeda.utils.errors import ConfigError
from tests.command import call
from tests.conformance.checks import CHECKS, DOCUMENTS
from tests.conformance.models import T, ids, shaken
from tests.corpora import short_documents

EXAMPLES = Path(__file__).parents[2] / "examples"

TINY: dict[str, Any] = {
    "vocab_size": 29,
    "max_seq_len": 16,
    "hidden_size": 24,
    "num_layers": 4,
    "attention": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16},
    "rotary": {"kind": "rope"},
    "feedforward": {"intermediate_size": 16},
}
LINEAR = {"kind": "add_a_mixer:GatedLinearAttention", "num_heads": 2, "head_dim": 8, "chunk": 5}
MIXED: dict[str, Any] = {"layers": ["linear", "linear", "full"], "mixers": {"linear": LINEAR}}
QK_NORM: dict[str, Any] = {"attention": TINY["attention"] | {"qk_norm": {"kind": "add_a_qk_norm:HeadTemperatures", "sharpest": 8.0}}}
VALUES: dict[str, Any] = {"value_embedding": {"kind": "add_a_value_embedding:SharedValues", "gate": 0.3}}
PARTS = {"mixer": MIXED, "mixer alone": MIXED | {"layers": ["linear"]}, "qk norm": QK_NORM, "value embedding": VALUES}


@pytest.fixture(autouse=True)
def on_the_path(monkeypatch: pytest.MonkeyPatch, allow_code: None) -> Iterator[None]:
    """The folder of the examples, where a user's own module lies."""
    torch.set_num_threads(1)
    monkeypatch.syspath_prepend(EXAMPLES)
    yield
    for file in EXAMPLES.glob("*.py"):
        sys.modules.pop(file.stem, None)


def config(**changes: Any) -> ModelConfig:
    made = ModelConfig.model_validate(TINY | changes)
    check_model(made)
    check_own_parts(made)
    return made


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.py")), ids=lambda file: file.stem)
def test_an_example_is_one_file_that_imports_public_modules(file: Path) -> None:
    """Of ours, nothing that begins with an underscore, no tests, tools or other examples."""
    others = {other.stem for other in EXAMPLES.glob("*.py")} | {"tests", "tools", "benchmarks", "examples"}
    for node in ast.walk(ast.parse(file.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            assert name.partition(".")[0] not in others
            assert not (name.startswith("andromeda") and "._" in name)


@pytest.mark.parametrize("name", PARTS)
@torch.no_grad()
def test_all_ways_to_run_a_model_agree(name: str) -> None:
    """Causal, decoding, chunked prefill, packed documents, padding, a cache of fixed size: float64, 1e-10."""
    model = shaken(config(**PARTS[name]))
    full = model(ids(), span=T)
    for check in CHECKS:
        check(model, full)


@torch.no_grad()
def test_linear_attention_is_its_recurrence_in_packed_documents_too() -> None:
    model = shaken(config(**MIXED))
    part, ctx = model.decoder.blocks[0].attention, model.context(ids(), documents=DOCUMENTS).for_layer(0)
    x = torch.randn(2, T, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(part(x, ctx), recurrence(part, x, DOCUMENTS), rtol=1e-9, atol=1e-9)


def recurrence(part: Any, x: Tensor, documents: Tensor) -> Tensor:
    """Token by token, as the formula has it."""
    outputs = []
    heads = [linear(x).unflatten(-1, (part.heads, -1)) for linear in (part.query, part.key, part.value)]
    q, k = (torch.where(t > 0, t + 1, t.exp()) for t in heads[:2])
    decay = torch.sigmoid(part.decay(x)) ** (1 / part.slowness)
    state = x.new_zeros(2, part.heads, part.dim, part.dim)
    for t in range(x.shape[1]):
        if t:
            state = state * (documents[:, t] == documents[:, t - 1])[:, None, None, None]
        state = decay[:, t, :, None, None] * state + k[:, t, :, :, None] * heads[2][:, t, :, None, :]
        y = (q[:, t, :, :, None] * state).sum(2)
        outputs.append((y / y.square().mean(-1, keepdim=True).add(1e-5).sqrt()).flatten(1))
    return part.out(torch.nn.functional.silu(part.gate(x)) * torch.stack(outputs, 1))


@torch.no_grad()
def test_linear_attention_decodes_from_a_state_of_one_size() -> None:
    made, cache = config(**MIXED | {"layers": ["linear"]}), DynamicKVCache()
    model = Transformer(made).bfloat16()
    said = decode_state(made)
    assert said.per_token == 0
    for _ in range(2):
        in_one_go(model, cache)
        assert cache.bytes() == 2 * said.per_sequence == 2 * 4 * 2 * 8 * 8 * 4


def in_one_go(model: Transformer, cache: DynamicKVCache) -> None:
    model(ids()[:, :6], cache=cache)


def test_the_plan_counts_what_the_mixer_says() -> None:
    flops = forward_flops_per_token(config(**MIXED), 16)
    projections = 2 * 24 * 16 * 5 + 2 * 24 * 2
    assert flops["linear attention"] == 3 * (projections + 4 * 2 * 8 * 8)
    assert flops["scores"] == forward_flops_per_token(config(), 16)["scores"] / 4
    assert decode_state(config(**MIXED)).per_token == 2 * 2 * 16 * 2
    assert any("gated linear attention of 2 heads of 8" in line for line in describe(Transformer(config(**MIXED))))


def test_mistakes_are_one_sentence() -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        (MIXED | {"mixers": {"linear": LINEAR | {"num_head": 2}}}, r"no key model.mixers.linear.num_head \(did you mean .*num_heads\?\)"),
        (MIXED | {"mixers": {"linear": LINEAR | {"chunk": 0}}}, "model.mixers.linear.chunk must be above 0"),
        (MIXED | VALUES, "value_embedding does not go with GatedLinearAttention"),
        ({"value_embedding": VALUES["value_embedding"] | {"gates": 1.0}}, r"no key model.value_embedding.gates"),
        ({"layers": ["linaer"], "mixers": {"linear": LINEAR}}, r"did you mean linear\?"),
    ]
    for changes, sentence in wrong:
        with pytest.raises(ConfigError, match=sentence):
            config(**changes)


def test_a_run_with_linear_attention_trains_and_verifies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = short_documents(tmp_path, 30, validation=0.1)
    monkeypatch.chdir(EXAMPLES)
    own = [
        'model.layers=["linear","full"]',
        "model.mixers.linear.kind=add_a_mixer:GatedLinearAttention",
        "model.mixers.linear.num_heads=2",
        "model.mixers.linear.head_dim=8",
        "model.value_embedding.kind=none",
    ]
    sizes = ["hidden_size=16", "num_layers=2", "max_seq_len=64", "vocab_size=257", "attention.num_heads=2", "attention.head_dim=8"]
    train = ["steps=3", "batch_size=2", "precision=fp32", "compile=off", "device=cpu", "schedule.warmup=0", "eval_every=3"]
    settings = [*own, *(f"model.{size}" for size in sizes), *(f"train.{key}" for key in train), f"data.corpus={corpus}"]
    run = str(tmp_path / "run")
    assert load("nano", settings).model.layers == ("linear", "full")
    assert call("train", "nano", *settings, "--out", run, "--allow-code") == 0
    capsys.readouterr()
    assert call("verify", run, "--device", "cpu", "--allow-code") == 0
    assert "checks agree" in capsys.readouterr().out
    assert "linear" in (tmp_path / "run" / "config.toml").read_text()


def test_a_model_trains_in_plain_pytorch(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import train_nano  # type: ignore[import-not-found]

    monkeypatch.setattr(train_nano, "CONTEXT", 32)
    monkeypatch.setattr(train_nano, "BATCH", 4)
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be, that is the question. " * 60)
    trained, held_out = train_nano.read(text)
    model = train_nano.Andromeda.from_preset(
        "nano", vocab_size=256, max_seq_len=32, hidden_size=64, num_layers=2, device="cpu", dtype="fp32"
    )
    before = train_nano.evaluate(model, held_out)
    train_nano.train(model, trained, 40)
    assert train_nano.evaluate(model, held_out) < before - 1
    assert "bits/byte" in capsys.readouterr().out
    assert len((EXAMPLES / "train_nano.py").read_text().splitlines()) <= 150
