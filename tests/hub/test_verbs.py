"""`andromeda export` and `andromeda import`, from a trained run to transformers and back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from andromeda import Andromeda
from andromeda.config.load import from_values
from andromeda.hub.parameter_names import hub_name
from andromeda.hub.quantize import rounding
from andromeda.train.state import load_model, model_tensors
from andromeda.train.trainer import train
from tests.command import call
from tests.corpora import short_documents

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("verbs")
    config = from_values(
        {
            "name": "a [small](http://x) *run*",
            "model": {
                "vocab_size": 257,
                "max_seq_len": 128,
                "hidden_size": 32,
                "num_layers": 2,
                "attention": {"num_heads": 2, "num_kv_heads": 1, "head_dim": 16},
                "rotary": {"kind": "rope"},
                "feedforward": {"kind": "swiglu"},
            },
            "data": {"corpus": str(short_documents(place, 12, 0.2))},
            "train": {"steps": 3, "seq_len": 64, "batch_size": 2, "device": "cpu", "precision": "fp32", "compile": "off", "ema": 0.9},
        }
    )
    train(config, place / "run")
    return place / "run"


def test_export(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("export", str(run), "--to", str(tmp_path / "shared")) == 0
    message = capsys.readouterr().out
    assert "LlamaForCausalLM" in message
    assert f"hf upload YOUR_NAME/shared {tmp_path / 'shared'}" in message
    names = {path.name for path in (tmp_path / "shared").iterdir()}
    assert names >= {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md"}
    ours = Andromeda.from_run(run, device="cpu")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "shared").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "shared")
    prompt = tokenizer("the cat", return_tensors="pt")
    assert prompt["input_ids"].tolist() == [[ours.tokenizer.eos, *ours.tokenizer.encode("the cat")]]
    with torch.no_grad():
        assert torch.allclose(ours(prompt["input_ids"]), theirs(**prompt).logits, atol=1e-5)
    answer = theirs.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert tokenizer.decode(answer[0][prompt["input_ids"].shape[1] :], skip_special_tokens=True) == ours.generate(
        "the cat", max_new_tokens=12, temperature=0.0
    )


def test_the_card_shows_a_runs_words_literally(run: Path, tmp_path: Path) -> None:
    call("export", str(run), "--to", str(tmp_path / "shared"))
    card = (tmp_path / "shared" / "README.md").read_text("utf-8")
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert r"# a \[small\](http://x) \*run\*" in card
    assert "## Training data" in card
    assert "AutoModelForCausalLM.from_pretrained('shared')" in card


def test_average_and_an_older_step_are_exported(run: Path, tmp_path: Path) -> None:
    assert call("export", str(run), "--to", str(tmp_path / "a"), "--ema") == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a").eval()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.allclose(Andromeda.from_run(run, device="cpu", ema=True)(ids), theirs(ids).logits, atol=1e-5)


def test_import_again(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call("export", str(run), "--to", str(tmp_path / "shared"))
    assert call("import", str(tmp_path / "shared"), "--out", str(tmp_path / "back")) == 0
    assert "parameters" in capsys.readouterr().out
    first, second = Andromeda.from_run(run, device="cpu"), Andromeda.from_run(tmp_path / "back", device="cpu")
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True))
    assert second.tokenizer.encode("the cat <|endoftext|>") == first.tokenizer.encode("the cat <|endoftext|>")
    assert second.tokenizer.eos == first.tokenizer.eos
    third = Andromeda.from_pretrained(tmp_path / "shared", device="cpu")
    assert third.generate("the", max_new_tokens=8, temperature=0.0) == first.generate("the", max_new_tokens=8, temperature=0.0)
    assert call("import", str(tmp_path / "shared"), "--out", str(tmp_path / "back")) == 2


def test_wrong_calls(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("export", str(run), "--to", str(tmp_path / "x"), "--dtype", "int3") == 2
    assert call("export", str(tmp_path), "--to", str(tmp_path / "x")) == 2
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    assert call("export", str(run), "--to", str(tmp_path / "full")) == 2
    assert "already holds files" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_eight_bits_with_the_measured_loss(kind: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The folder computes what a model with the rounded weights does, and its card says what that costs."""
    assert call("export", str(run), "--to", str(tmp_path / "x"), "--dtype", kind) == 0
    card = (tmp_path / "x" / "README.md").read_text("utf-8")
    assert f"## Weights in {kind}" in card
    assert "bits per byte of" in card
    assert "compared with" in capsys.readouterr().out
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "x", trust_remote_code=True).eval()
    ours = Andromeda.from_run(run, device="cpu")
    rounded = rounding(kind, hub_name)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        before = ours(ids)
        load_model(ours, {name: rounded(name, tensor) for name, tensor in model_tensors(ours).items()})
        after = ours(ids)
        assert torch.allclose(after, theirs(ids).logits, atol=1e-5)
    assert 0 < float((after - before).square().mean().sqrt() / before.std()) < {"int8": 0.03, "fp8": 0.15}[kind]
    theirs.save_pretrained(tmp_path / "again")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True).eval()
    with torch.no_grad():
        assert torch.equal(again(ids).logits, theirs(ids).logits)
    assert call("import", str(tmp_path / "x"), "--out", str(tmp_path / "back")) == 2
    assert "unquantized" in capsys.readouterr().err


def test_gguf_of_a_run(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gguf", reason="gguf is not installed: pip install gguf")
    assert call("export", str(run), "--to", str(tmp_path / "m.gguf"), "--gguf", "Q8_0") == 2
    assert "--pre-tokenizer" in capsys.readouterr().err
    (tmp_path / "bare").mkdir()
    for name in ("config.toml", "checkpoints"):
        (tmp_path / "bare" / name).symlink_to(run / name)
    assert call("export", str(tmp_path / "bare"), "--to", str(tmp_path / "m.gguf"), "--gguf", "Q8_0") == 0
    assert (tmp_path / "m.gguf").read_bytes()[:4] == b"GGUF"
    assert call("export", str(run), "--to", str(tmp_path / "n.gguf"), "--gguf", "Q8_0", "--dtype", "bf16") == 2
