"""Tokenizers of SentencePiece's kind and tokens that begin a text: the ids that transformers gives, and the text back."""

from __future__ import annotations

import json
import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

from andromeda import Andromeda
from andromeda.config.data import BuildConfig
from andromeda.data.build import build
from andromeda.data.corpus import open_corpus, verify_corpus
from andromeda.data.tokenizer import Tokenizer
from andromeda.hub.import_folder import read_folder
from andromeda.utils.errors import AndromedaError
from tests.command import call
from tests.hub.test_tokenizer_files import texts

transformers = pytest.importorskip("transformers")
MARK = "\u2581"
SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": MARK}
PREPEND = {"type": "Prepend", "prepend": MARK}
METASPACE = {"type": "Metaspace", "replacement": MARK, "prepend_scheme": "first", "split": False}
KINDS: dict[str, dict[str, Any]] = {
    "llama2": {"normalizer": {"type": "Sequence", "normalizers": [PREPEND, SPACES]}, "pre_tokenizer": None},
    "metaspace": {"normalizer": None, "pre_tokenizer": METASPACE},
    "gemma": {
        "normalizer": SPACES,
        "pre_tokenizer": {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False},
    },
}
SPECIAL = ["<unk>", "<s>", "</s>"]


def tokenizer_json(kind: str) -> dict[str, Any]:
    """A tokenizer.json as Llama 2's: special tokens, 256 bytes, characters and merges; every text begins with <s>."""
    from tokenizers import Tokenizer as Library
    from tokenizers import models, pre_tokenizers, trainers

    learned = Library(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.Metaspace()
    # Without names of special tokens, which merges would spell otherwise.
    words = [re.sub(rf"\x00|{MARK}|<.*?>", "", text) for text in texts(300)]
    learned.train_from_iterator(words, trainers.BpeTrainer(vocab_size=300, show_progress=False))
    model = json.loads(learned.to_str())["model"]
    order = sorted(model["vocab"], key=model["vocab"].get)
    tokens = [*SPECIAL, *(f"<0x{b:02X}>" for b in range(256)), *(word for word in order if word not in SPECIAL)]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": name, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
            for i, name in enumerate(SPECIAL)
        ],
        **deepcopy(KINDS[kind]),
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [{"type": "Replace", "pattern": {"String": MARK}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}],
        },
        "model": model
        | {"vocab": {word: i for i, word in enumerate(tokens)}, "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True},
    }


def fast(path: Path) -> Any:
    """transformers' tokenizer of a file, which reads the names of special tokens as text, as ours does."""
    return transformers.PreTrainedTokenizerFast(tokenizer_file=str(path), split_special_tokens=True)


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place: Path = tmp_path_factory.mktemp("tokenizer") / request.param
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64, "intermediate_size": 48}
    torch.manual_seed(0)
    content = tokenizer_json(request.param)
    config = transformers.LlamaConfig(vocab_size=len(content["model"]["vocab"]), bos_token_id=1, eos_token_id=2, **sizes)
    transformers.LlamaForCausalLM(config).save_pretrained(place)
    (place / "tokenizer.json").write_text(json.dumps(content))
    return place


def test_ids_are_equal_on_2000_texts(folder: Path, tmp_path: Path) -> None:
    """From the beginning of a text, U+2581 left out, which is a space there; inside of one, every character comes back."""
    ours, theirs = read_folder(folder).tokenizer, fast(folder / "tokenizer.json")
    assert ours is not None
    assert (ours.kind, ours.bos, ours.eos) == ("sentencepiece_bpe", 1, 2)
    ours.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert (again.fingerprint, again.bos) == (ours.fingerprint, 1)
    for text in texts(2000):
        plain = text.replace(MARK, "")
        assert [ours.bos, *ours.encode_start(plain)] == theirs(plain)["input_ids"], plain
        assert ours.decode(ours.encode(text)) == text
        start = ours.decode(ours.encode_start(text))
        assert start in (text, f" {text}")
    # Without its mark, the beginning of a text and what follows it are the whole.
    assert ours.encode_start("the cat") + ours.encode("\n sat") == theirs("the cat\n sat", add_special_tokens=False)["input_ids"]


def test_generation_and_export(folder: Path, tmp_path: Path) -> None:
    assert call("import", str(folder), "--out", str(tmp_path / "run")) == 0
    ours, theirs = Andromeda.from_run(tmp_path / "run", device="cpu"), transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    prompt = fast(folder / "tokenizer.json")("the cat", return_tensors="pt")["input_ids"]
    answer = theirs.generate(prompt, max_new_tokens=12, do_sample=False, pad_token_id=0)[0, prompt.shape[1] :].tolist()
    found = ours.generate("the cat", max_new_tokens=12, temperature=0.0)
    assert found == ours.tokenizer.decode(answer)
    assert call("export", str(tmp_path / "run"), "--to", str(tmp_path / "back")) == 0
    back = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    assert (back.bos_token_id, back.eos_token_id) == (1, 2)
    original = fast(folder / "tokenizer.json")
    assert all(back(text)["input_ids"] == original(text)["input_ids"] for text in texts(200))
    once_more = read_folder(tmp_path / "back").tokenizer
    assert once_more is not None
    assert (once_more.bos, once_more.eos) == (1, 2)


def test_a_corpus_begins_documents_with_both_tokens(folder: Path, tmp_path: Path) -> None:
    call("import", str(folder), "--out", str(tmp_path / "run"))
    (tmp_path / "texts").mkdir()
    for number in range(12):
        (tmp_path / "texts" / f"{number}.txt").write_text(f"the cat sat {number}.\n" * 20)
    config = BuildConfig(tokenizer=str(tmp_path / "run" / "tokenizer"), validation_fraction=0.2)
    build([str(tmp_path / "texts")], tmp_path / "corpus", config)
    verify_corpus(tmp_path / "corpus")
    documents = open_corpus(tmp_path / "corpus", "train").documents
    starts = documents.offsets[:-1]
    assert [documents.tokens.read(int(a), int(a) + 2).tolist() for a in starts] == [[2, 1]] * len(starts)
    # A corpus can be built of it again, byte for byte.
    build([str(tmp_path / "corpus")], tmp_path / "again", config)
    verify_corpus(tmp_path / "again")


@pytest.mark.parametrize(
    ("files", "config", "expected"),
    [
        ({"tokenizer_config.json": {"tokenizer_class": "LlamaTokenizerFast"}}, {}, 1),
        ({"tokenizer_config.json": {"tokenizer_class": "LlamaTokenizer", "add_bos_token": False}}, {}, 2),
        ({"tokenizer_config.json": {"tokenizer_class": "Qwen2Tokenizer"}}, {}, 2),
        ({"tokenizer_config.json": {"add_bos_token": True}}, {}, 1),
        ({}, {}, 2),
        ({}, {"eos_token_id": [2, 1]}, 2),
    ],
)
def test_the_beginning_where_no_post_processor_says(files: dict[str, Any], config: dict[str, Any], expected: int, tmp_path: Path) -> None:
    settings = transformers.LlamaConfig(vocab_size=600, hidden_size=16, num_hidden_layers=1, num_attention_heads=1, intermediate_size=16)
    transformers.LlamaForCausalLM(settings).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer_json("llama2") | {"post_processor": None}))
    for name, values in files.items():
        (tmp_path / name).write_text(json.dumps(values))
    given = json.loads((tmp_path / "config.json").read_text()) | {"bos_token_id": 1, "eos_token_id": 2} | config
    (tmp_path / "config.json").write_text(json.dumps(given))
    found = read_folder(tmp_path).tokenizer
    assert found is not None
    assert found.bos == expected
    assert found.eos == 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c["normalizer"]["normalizers"].append({"type": "NFKC"}), "normalizes text .NFKC"),
        (lambda c: c["normalizer"]["normalizers"].clear(), "does not write spaces"),
        (lambda c: c["model"]["vocab"].pop("<0x0A>"), "no token for the byte 10"),
        (lambda c: c.update(pre_tokenizer={"type": "Whitespace"}), "cuts text"),
        (lambda c: c["model"]["vocab"].update({"far": 1 << 30}), "vocabulary of"),
        (lambda c: c["post_processor"]["special_tokens"]["<s>"].update(ids=[300]), "no special token"),
    ],
)
def test_what_changes_text_is_named(change: Any, words: str, folder: Path, tmp_path: Path) -> None:
    if folder.name != "llama2":
        pytest.skip("one kind is enough")
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    content = tokenizer_json("llama2")
    change(content)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(AndromedaError, match=rf"{words}.*--no-tokenizer"):
        read_folder(tmp_path)
