"""Tokenizers compared: equal operations, equal bytes, exact round trips, a resume that repeats nothing."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest

from andromeda.bench.tokenizer_comparison import speeds, steps_for
from andromeda.config.data import BuildConfig
from andromeda.config.load import load
from andromeda.data.tokenizer import Tokenizer, train_tokenizer
from tests.command import call

TINY = [
    "model.hidden_size=16",
    "model.num_layers=1",
    "model.attention.num_heads=1",
    "model.attention.head_dim=16",
    "model.max_seq_len=32",
    "train.compile=off",
]
SET = [word for change in [*TINY, "train.device=cpu", "train.batch_size=2", "train.compile=off"] for word in ("--set", change)]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eighty documents of made-up words."""
    folder, draw = tmp_path_factory.mktemp("texts"), random.Random(0)
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(2, 7))) for _ in range(300)]
    for i in range(80):
        (folder / f"{i}.txt").write_text(" ".join(draw.choices(words, k=120)) + "\n")
    return folder


def test_the_comparison_and_its_resume(texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        str(texts),
        "--out",
        str(tmp_path / "out"),
        "--kinds",
        "bpe,unigram,bytes",
        "--vocab-sizes",
        "320,400",
        "--flops",
        "3e7",
        *SET,
        "--json",
    ]
    assert call("tokenizers", "compare", *arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["tokenizers"]) == ["bpe-320", "bpe-400", "unigram-320", "unigram-400", "bytes"]
    held_out = {(tmp_path / "out" / name / "corpus" / "val.txt").read_bytes() for name in found["tokenizers"]}
    assert len(held_out) == 1
    (text,) = held_out
    for name, one in found["tokenizers"].items():
        tokenizer = Tokenizer.load(tmp_path / "out" / name / "corpus")
        # Documents are encoded one by one; at their borders a tokenizer of the whole text could join, so a bound.
        whole = len(tokenizer.encode(text.decode()))
        assert one["bytes_per_token"] == pytest.approx(len(text) / whole, rel=0.01)
        assert one["tokens_per_word"] == pytest.approx(whole / len(text.split()), rel=0.01)
        assert one["lossless"]
        step = one["flops"] / one["steps"]
        assert abs(one["flops"] - 3e7) <= max(step / 2, step - 3e7)
        assert 0 < one["bits_per_byte"] < 10
    assert found["tokenizers"]["bytes"]["bytes_per_token"] == 1.0
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.safetensors")}
    assert call("tokenizers", "compare", *arguments) == 0
    assert json.loads(capsys.readouterr().out) == found
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.safetensors")} == before


def test_equal_operations_count_the_head() -> None:
    """A model whose head is its only matmul: tokens x width x vocabulary x 2, three times."""
    small, large = (load("nano", ["model.num_layers=1", f"model.vocab_size={v}", "train.batch_size=1"]) for v in (512, 65536))
    ratio = steps_for(small, 1e15) / steps_for(large, 1e15)
    assert 1 < ratio < 65536 / 512
    head = 6 * small.model.hidden_size * (65536 - 512) * 512
    one, other = (1e15 / steps_for(c, 1e15) for c in (small, large))
    assert other - one == pytest.approx(head, rel=1e-3)


def test_a_tokenizer_that_changes_text_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = train_tokenizer([], BuildConfig(tokenizer="bytes"))
    assert speeds(tokenizer, b"text")["lossless"]
    monkeypatch.setattr(tokenizer, "decode", lambda ids: Tokenizer.decode(tokenizer, ids).replace("t", "d"))
    figures = speeds(tokenizer, b"text")
    assert not figures["lossless"]
    assert math.isfinite(figures["encode_mb_per_second"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kinds", "bpee"], "did you mean bpe?"),
        (["--kinds", ","], "Name at least one kind"),
        (["--vocab-sizes", "1k"], "no whole numbers"),
        (["--vocab-sizes", "100"], "no room for merges beyond the 256 bytes"),
        (["--flops", "-1"], "is not a number of FLOPs"),
        (["--flops", "nan"], "is not a number of FLOPs"),
        (["--validation-fraction", "2"], "validation_fraction must be below 0.5"),
        (["--preset", "nanno"], "There is no preset and no file 'nanno'"),
        (["--set", "model.widht=3"], "did you mean"),
        (["--set", "train.steps=3"], "is set by the comparison"),
    ],
)
def test_a_mistake_is_one_sentence(
    arguments: list[str], message: str, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("tokenizers", "compare", str(texts), "--out", str(tmp_path / "out"), *arguments) == 2
    said = capsys.readouterr().err.strip()
    assert message in said
    assert "\n" not in said
    assert not (tmp_path / "out").exists()


def test_another_comparison_in_the_folder_is_refused(texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tokenizers.json").write_text('{"plan": {}, "tokenizers": {}}')
    assert call("tokenizers", "compare", str(texts), "--out", str(tmp_path), "--vocab-sizes", "320") == 2
    assert "another comparison" in capsys.readouterr().err
