"""`andromeda data` as a user meets it: output, exit codes, one sentence for each mistake."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import tokenizers

from andromeda.cli.main import main
from andromeda.data.corpus import CorpusManifest
from tests.data.conftest import texts, write_files


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["andromeda", "data", *map(str, arguments)])
    monkeypatch.setenv("COLUMNS", "200")
    code = 0
    try:
        main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


def test_build_and_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    raw, out = write_files(tmp_path / "raw", texts(60)), tmp_path / "out"
    options = ["--tokenizer", "unigram", "--vocab-size", "300", "--special-token", "<|a|>", "--special-token", "<|b|>", "--workers", "1"]
    code, text, err = run(monkeypatch, capsys, "build", raw, "--out", out, *options)
    assert (code, err) == (0, "")
    manifest = CorpusManifest.load(out)
    assert manifest.fingerprint in text
    assert f"{manifest.splits['train'].tokens:,}" in text
    code, shown, _ = run(monkeypatch, capsys, "show", out)
    assert (code, shown) == (0, text)
    code, shown, _ = run(monkeypatch, capsys, "show", out, "--json")
    assert CorpusManifest.model_validate_json(shown) == manifest
    code, again, _ = run(monkeypatch, capsys, "build", raw, "--out", out, *options, "--json")
    assert json.loads(again) == json.loads(shown)
    code, shown, _ = run(monkeypatch, capsys, "show", out, "--verify")
    assert "verified" in shown


def test_compare_counts_on_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    raw = write_files(tmp_path / "raw", texts(60))
    for kind, vocab in (("bytes", "257"), ("bpe", "300")):
        run(monkeypatch, capsys, "build", raw, "--out", tmp_path / kind, "--tokenizer", kind, "--vocab-size", vocab, "--workers", "1")
    code, out, _ = run(monkeypatch, capsys, "compare", tmp_path / "bytes", tmp_path / "bpe", "--json")
    raw_bytes, pairs = json.loads(out)
    held_out = (tmp_path / "bytes" / "val.txt").read_bytes()
    assert code == 0
    assert raw_bytes["bytes_per_token"] == 1.0
    assert raw_bytes["tokens_per_word"] == len(held_out) / len(held_out.split())
    assert raw_bytes["used"] == (len(set(held_out)) + 1) / 257
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "bpe" / "tokenizer" / "tokenizer.json"))
    documents = [t for t in texts(60) if t.encode() in held_out]
    assert pairs["bytes_per_token"] == len(held_out) / sum(len(library.encode(t).ids) for t in documents)
    assert "100.0%" not in run(monkeypatch, capsys, "compare", tmp_path / "bytes")[1]


def test_an_interruption_says_that_work_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raw, out = write_files(tmp_path / "raw", texts(60)), tmp_path / "out"

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    arguments = ["build", raw, "--out", out, "--tokenizer", "bytes", "--workers", "1"]
    with monkeypatch.context() as patch:
        patch.setattr("andromeda.data.build.write_text", stop)
        code, _, err = run(monkeypatch, capsys, *arguments)
    assert (code, err) == (130, "andromeda: interrupted; the same command resumes here.\n")
    assert run(monkeypatch, capsys, *arguments)[0] == 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["build", "{raw}/missing.txt", "--out", "{out}"], "There is no file or folder"),
        (["build", "{raw}", "--out", "{out}", "--tokenizer", "bpee"], "tokenizer = 'bpee' is no kind of tokenizer (did you mean bpe?)"),
        (["build", "{raw}", "--out", "{out}", "--cut", "50"], "--cut is now called --split-documents-at"),
        (["build", "{raw}", "--out", "{out}", "--vocab=50"], "--vocab is now called --vocab-size"),
        (["build", "{raw}", "--out", "{out}", "--validation-fraction", "0.9"], "validation_fraction = 0.9"),
        (["build", "{raw}", "--out", "{out}", "--vocab-size", "0"], "vocab_size = 0"),
        (["build", "{raw}", "--out", "{out}", "--vocab-size", "50"], "too small"),
        (["build", "{raw}", "--out", "{out}", "--vocab-size", "999999"], "allows a bpe vocabulary of only"),
        (["build", "{raw}", "--out", "{raw}"], "not empty"),
        (["build", "{raw}", "--out", "{raw}/00000.txt"], "is a file"),
        (["build", "{raw}", "--out", "/proc/nothing"], "/proc/nothing"),
        (["show", "{raw}"], "no finished corpus"),
        (["show", "{raw}/missing"], "no finished corpus"),
        (["compare", "{raw}"], "no held-out text"),
    ],
)
def test_mistakes_end_with_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    raw = write_files(tmp_path / "raw", texts(20))
    code, out, err = run(monkeypatch, capsys, *(a.format(raw=raw, out=tmp_path / "out") for a in arguments))
    assert (code, out) == (2, "")
    assert err.startswith("andromeda: ")
    assert err.count("\n") == 1
    assert sentence in err
    assert len(list(raw.iterdir())) == 20


def test_what_is_not_read_and_little_held_out_text_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raw, out = write_files(tmp_path / "raw", [str(i) * 60 for i in range(4000)]), tmp_path / "out"
    (raw / "a.rst").write_text("other")
    code, text, _ = run(monkeypatch, capsys, "build", raw, "--out", out, "--tokenizer", "bytes", "--workers", "1")
    val = CorpusManifest.load(out).splits["val"]
    assert code == 0
    assert "not read    1 .rst in" in text
    assert f"note        only {val.tokens:,} tokens in {val.documents:,} documents are held out" in text
    assert val.tokens < 50_000
    code, text, _ = run(
        monkeypatch, capsys, "build", raw, "--out", out, "--tokenizer", "bytes", "--validation-fraction", "0.3", "--force", "--workers", "1"
    )
    assert code == 0
    assert CorpusManifest.load(out).splits["val"].tokens >= 50_000
    assert "note " not in text


def test_documents_are_appended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    raw, out = write_files(tmp_path / "raw", texts(60)), tmp_path / "out"
    more = write_files(tmp_path / "more", texts(20, seed=5))
    assert run(monkeypatch, capsys, "build", raw, "--out", out, "--tokenizer", "bytes", "--workers", "1")[0] == 0
    code, text, _ = run(monkeypatch, capsys, "build", more, "--out", out, "--append", "--workers", "1")
    assert code == 0
    assert str(more) in text
    assert sum(split.documents for split in CorpusManifest.load(out).splits.values()) == 80
    code, _, err = run(monkeypatch, capsys, "build", more, "--out", out, "--append", "--force")
    assert (code, err.count("\n")) == (2, 1)
