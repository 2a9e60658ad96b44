"""`andromeda export` and `andromeda import`, from a trained run to transformers and back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from andromeda import Andromeda
from andromeda.config.load import from_values
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
    told = capsys.readouterr().out
    assert "LlamaForCausalLM" in told
    assert f"hf upload YOUR_NAME/shared {tmp_path / 'shared'}" in told
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
