"""An imported Llama with its tokenizer does what a run of our own does: it is measured, explained, extended, trained on and exported."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from andromeda import Andromeda
from andromeda.config.data import BuildConfig
from andromeda.data.build import build
from andromeda.hub.import_folder import read_folder
from andromeda.utils.errors import AndromedaError
from tests.command import call
from tests.corpora import WORDS

transformers = pytest.importorskip("transformers")


def texts(place: Path) -> Path:
    draw = random.Random(0)
    place.mkdir()
    for number in range(24):
        (place / f"{number:02}.txt").write_text(" ".join(draw.choices(WORDS, k=120)) + f" {number}.\n")
    return place


def byte_level(place: Path, normalizer: str = "") -> None:
    """tokenizer.json of a byte-level BPE as Hugging Face's tokenizers train one."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    if normalizer:
        made.normalizer = getattr(normalizers, normalizer)()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator([" ".join(WORDS)] * 20, trainer)
    made.save(str(place / "tokenizer.json"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("imported") / "theirs"
    sizes = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}
    config = transformers.LlamaConfig(**sizes, intermediate_size=48, bos_token_id=0, eos_token_id=0)
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(place)
    byte_level(place)
    return place


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    assert call("import", str(folder), "--out", str(folder.parent / "run")) == 0
    return folder.parent / "run"


@pytest.fixture(scope="module")
def corpus(folder: Path, run: Path) -> Path:
    config = BuildConfig(tokenizer=str(run / "tokenizer"), validation_fraction=0.2)
    build([str(texts(folder.parent / "texts"))], folder.parent / "corpus", config)
    return folder.parent / "corpus"


def test_generation_and_tokenizer(folder: Path, run: Path) -> None:
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    ours = Andromeda.from_run(run, device="cpu")
    assert ours.tokenizer.eos == 0
    ids = [0, *ours.tokenizer.encode("the cat sat")]
    expected = theirs.generate(torch.tensor([ids]), max_new_tokens=20, do_sample=False, pad_token_id=0)[0, len(ids) :].tolist()
    found = ours.generate(ids, max_new_tokens=20, temperature=0.0)
    assert found == expected[: len(found)]


def test_measured_and_explained(run: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("eval", str(run), "bits", "--corpus", str(corpus), "--device", "cpu", "--json") == 0
    bits = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert 2 < bits["result"]["bits_per_byte"] < 9
    assert call("explain", str(run), "the cat sat", "--out", str(run.parent / "explain.html")) == 0
    assert "DOES NOT HOLD" not in capsys.readouterr().out


def test_extended_trained_on_and_exported(run: Path, corpus: Path, tmp_path: Path) -> None:
    """The continued training learns; of an extension without training every weight is the same, bit for bit."""
    settings = [f"data.corpus={corpus}", "train.batch_size=2", "train.micro_batch_size=2", "train.precision=fp32", "train.compile=off"]
    common = ["--to", "128", "--device", "cpu", "--samples", "2"]
    assert call("extend", str(run), *settings, *common, "--steps", "2", "--out", str(tmp_path / "longer")) == 0
    assert Andromeda.from_run(tmp_path / "longer", device="cpu").config.max_seq_len == 128
    assert call("export", str(tmp_path / "longer"), "--to", str(tmp_path / "shared")) == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "shared").eval()
    assert type(theirs).__name__ == "LlamaForCausalLM"
    assert theirs.config.rope_parameters["rope_type"] == "yarn"
    ids = torch.randint(0, 300, (1, 100))
    with torch.no_grad():
        assert torch.allclose(Andromeda.from_run(tmp_path / "longer", device="cpu")(ids), theirs(ids).logits, atol=2e-5)


def test_a_normalization_is_left_out_and_told(folder: Path, tmp_path: Path) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    byte_level(tmp_path, "NFC")
    read = read_folder(tmp_path)
    assert any("NFC" in note for note in read.notes)
    assert read.tokenizer is not None
    assert read.tokenizer.decode(read.tokenizer.encode("e\u0301")) == "e\u0301"


def test_tokenizers_that_change_text_are_named(folder: Path, tmp_path: Path) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    byte_level(tmp_path, "Lowercase")
    with pytest.raises(AndromedaError, match=r"changes text.*--no-tokenizer"):
        read_folder(tmp_path)


def test_another_beginning_of_text_is_told(folder: Path) -> None:
    """transformers puts nothing before this tokenizer's texts, and Andromeda the end-of-text token."""
    assert any("Texts begin with the end-of-text token 0" in note for note in read_folder(folder).notes)


def test_training_begins_with_the_imported_weights(run: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bit for bit before the first step; afterwards only what a gradient reached has moved, which is everything."""
    new = tmp_path / "tuned"
    settings = ["train.steps=2", "train.seq_len=32", "train.batch_size=2", "train.compile=off", "train.precision=fp32"]
    kept = ["train.checkpoints.every=1", "train.checkpoints.keep=9"]
    assert call("train", "--init-from", str(run), f"data.corpus={corpus}", *settings, *kept, "--device", "cpu", "--out", str(new)) == 0
    theirs, first, last = (
        load_file(folder / "checkpoints" / f"step-{step:08}" / "model.safetensors") for folder, step in ((run, 0), (new, 0), (new, 2))
    )
    assert theirs.keys() == first.keys()
    assert all(torch.equal(theirs[name], first[name]) for name in theirs)
    assert not any(torch.equal(theirs[name], last[name]) for name in theirs)
    capsys.readouterr()
    assert call("train", "--init-from", str(run), f"data.corpus={corpus}", "--keep-optimizer", "--out", str(tmp_path / "kept")) == 2
    assert "optimizer.safetensors is missing" in capsys.readouterr().err
