"""Every kind of bad input, through the command line as a user types it: one sentence, exit code 2, no traceback, nothing lost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.command import call
from tests.corpora import TINY_RUN, tiny_run

RUN = [*TINY_RUN, "model.max_seq_len=32"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of bytes and a run of two steps, to be copied."""
    place = tmp_path_factory.mktemp("made")
    tiny_run(place, "the {i}th text of a small corpus\n" * 3, "model.max_seq_len=32")
    return place


@pytest.fixture
def place(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh copy to break, as the working folder."""
    shutil.copytree(made, tmp_path / "w")
    monkeypatch.chdir(tmp_path / "w")
    return tmp_path / "w"


def truncate(name: str, keep: int) -> Callable[[Path], None]:
    def act(place: Path) -> None:
        for path in sorted(place.glob(name)):
            path.write_bytes(path.read_bytes()[:keep])

    return act


def write(name: str, content: bytes) -> Callable[[Path], None]:
    def act(place: Path) -> None:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(content)

    return act


def remove(name: str) -> Callable[[Path], None]:
    def act(place: Path) -> None:
        for path in place.glob(name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return act


def log_is_a_folder(place: Path) -> None:
    """As a careless copy leaves it."""
    (place / "run/metrics.jsonl").unlink()
    (place / "run/metrics.jsonl").mkdir()


def nothing(place: Path) -> None:
    """The place as it is."""


ALLOW = "--allow-code"
TRAIN = ["train", "nano", *RUN, "data.corpus=corpus", "--out", "new"]
AGAIN = ["train", "nano", *RUN, "data.corpus=corpus", "--out", "run"]
GO_ON = [*AGAIN, "--resume", "train.log.every=1"]
BUILD = ["data", "build", "texts", "--out", "built", "--workers", "1"]
WRITE = ["generate", "run", "the", "--device", "cpu"]

# name, what is done to the folder, the command, a part of the sentence
CASES: list[tuple[str, Callable[[Path], None], list[str], str]] = [
    ("no such verb", nothing, ["trian"], "trian"),
    ("no such option", nothing, ["train", "--bogus"], "--bogus"),
    ("option without a value", nothing, ["train", "nano", "--out"], "--out"),
    # configuration
    ("unknown preset", nothing, ["train", "nanoo"], "nano"),
    ("missing file", nothing, ["train", "missing.toml"], "missing.toml"),
    ("binary junk as a file", write("junk.toml", b"\x00\xff\x00\x01"), ["train", "junk.toml"], "junk.toml"),
    ("broken TOML", write("broken.toml", b"[model\nwidth = 3"), ["train", "broken.toml"], "broken.toml"),
    ("number of five thousand digits", write("big.toml", b"seed = " + b"9" * 5000), ["train", "big.toml"], "big.toml"),
    ("tables in tables without end", write("deep.toml", b"name = " + b"[" * 5000), ["train", "deep.toml"], "deep.toml"),
    ("preset that is a list", write("list.toml", b"preset = [1]"), ["train", "list.toml"], "preset"),
    ("head beyond any model", nothing, [*TRAIN, "model.attention.head_dim=100000000"], "model.attention.head_dim"),
    ("seed beyond any number", nothing, [*TRAIN, "seed=100000000000000000000"], "seed"),
    ("model larger than the memory", nothing, [*TRAIN, "model.vocab_size=2000000000", "model.hidden_size=100000"], "GiB"),
    ("empty override", nothing, [*TRAIN, "model.hidden_size="], "model.hidden_size"),
    ("override that is no assignment", nothing, [*TRAIN, "model.hidden_size"], "model.hidden_size"),
    ("unknown key", nothing, [*TRAIN, "model.hiden_size=32"], "hidden_size"),
    ("unknown table", nothing, [*TRAIN, "modle.hidden_size=32"], "model"),
    ("key below a value", nothing, [*TRAIN, "model.hidden_size.x=3"], "model.hidden_size"),
    ("text for a number", nothing, [*TRAIN, "model.num_layers=four"], "model.num_layers"),
    ("fraction for a count", nothing, [*TRAIN, "model.num_layers=2.5"], "model.num_layers"),
    ("negative count", nothing, [*TRAIN, "model.num_layers=-1"], "model.num_layers"),
    ("zero heads", nothing, [*TRAIN, "model.attention.num_heads=0"], "model.attention.num_heads"),
    ("not a number", nothing, [*TRAIN, "train.optim.lr=nan"], "train.optim.lr"),
    ("negative rate", nothing, [*TRAIN, "train.optim.lr=-0.1"], "train.optim.lr"),
    ("unknown optimizer", nothing, [*TRAIN, "train.optim.kind=moun"], "muon"),
    ("unknown feed-forward", nothing, [*TRAIN, "model.feedforward.kind=swigl"], "swiglu"),
    ("unknown backend", nothing, [*TRAIN, "model.attention.backend=flsh"], "flash"),
    ("unknown mechanism", nothing, [*TRAIN, "model.attention.mixer=sofmax"], "softmax"),
    ("heads that do not divide", nothing, [*TRAIN, "model.attention.num_heads=3", "model.attention.num_kv_heads=2"], "kv_heads"),
    ("more ALiBi heads than heads", nothing, [*TRAIN, "model.alibi.num_heads=9"], "model.alibi.num_heads"),
    (
        "more experts active than there are",
        nothing,
        [*TRAIN, "model.feedforward.kind=moe", "model.experts.top_k=99"],
        "model.experts.top_k",
    ),
    ("xPos beyond its range", nothing, [*TRAIN, "model.rotary.kind=xpos", "model.max_seq_len=400000"], "scale_base"),
    ("scaling without rotation", nothing, [*TRAIN, "model.rotary.kind=none", "model.rotary.scaling.kind=yarn"], "scaling"),
    (
        "embedding that cannot be imported",
        nothing,
        [*TRAIN, "model.embedding.kind=custom", "model.embedding.provider=no:Such", ALLOW],
        "no",
    ),
    (
        "embedding that is no module",
        nothing,
        [*TRAIN, "model.embedding.kind=custom", "model.embedding.provider=json:JSONDecoder", ALLOW],
        "forward",
    ),
    ("mechanism that is no class", nothing, [*TRAIN, "model.attention.mixer=os:system", ALLOW], "forward"),
    ("mechanism without consent", nothing, [*TRAIN, "model.attention.mixer=os:system"], "'os:system'"),
    ("optimizer without consent", nothing, [*TRAIN, "train.optim.kind=os:system"], "--allow-code"),
    ("threads without end", nothing, [*TRAIN, "data.workers=100000"], "data.workers"),
    ("row longer than the context", nothing, [*TRAIN, "train.seq_len=64"], "train.seq_len"),
    ("batch that does not divide", nothing, [*TRAIN, "train.batch_size=3", "train.micro_batch_size=2"], "micro_batch"),
    ("cooldown longer than the run", nothing, [*TRAIN, "train.schedule.cooldown=50"], "cooldown"),
    ("fp8 on a CPU", nothing, [*TRAIN, "train.precision=fp8"], "fp8"),
    ("rows beyond any memory", nothing, [*TRAIN, "train.batch_size=1000000000"], "1,000,000,000 sequences"),
    ("name that leads elsewhere", nothing, ["train", "nano", *RUN, "data.corpus=corpus", "name=../../x"], "name="),
    ("no name", nothing, ["train", "nano", *RUN, "data.corpus=corpus", "name="], "name="),
    ("demo of nothing", nothing, ["demo", "foo", "--corpus", "corpus", "--out", "new"], "'foo'"),
    ("no such device", nothing, [*TRAIN, "train.device=tpu"], "tpu"),
    ("a GPU that is not there", nothing, [*TRAIN, "train.device=cuda:99"], "cuda"),
    ("vocabulary smaller than the corpus's", nothing, [*TRAIN, "model.vocab_size=100"], "vocab_size"),
    # plan
    ("plan of nothing", nothing, ["plan", "model.num_layers=3"], "model.num_layers=3"),
    ("plan for no such GPU", nothing, ["plan", "nano", "--gpu", "h900"], "h200"),
    ("plan for no tokens at all", nothing, ["plan", "nano", "--tokens", "nan"], "--tokens"),
    ("plan for endless tokens", nothing, ["plan", "nano", "--tokens", "inf"], "--tokens"),
    ("plan at a price below nothing", nothing, ["plan", "nano", "--price", "-1"], "--price"),
    ("plan of no rows", nothing, ["plan", "nano", "--batch-size", "0"], "--batch-size"),
    ("plan of rows without tokens", nothing, ["plan", "nano", "--seq-len", "0"], "--seq-len"),
    ("plan over heads that do not divide", nothing, ["plan", "nano", "--parallel", "tp=3"], "tp"),
    # data
    ("no corpus", nothing, ["train", "nano", *RUN, "--out", "new"], "data.corpus"),
    ("corpus that is not there", nothing, [*TRAIN, "data.corpus=nowhere"], "nowhere"),
    ("corpus and sources", nothing, [*TRAIN, 'data.sources=[{path="corpus"}]'], "data."),
    ("folder that is no corpus", nothing, [*TRAIN, "data.corpus=texts"], "texts"),
    ("truncated shard", truncate("corpus/train-*.bin", 1100), TRAIN, "truncated"),
    ("shard of another kind", write("corpus/train-00000.bin", b"PK\x03\x04" * 600), TRAIN, "train-00000.bin"),
    ("manifest that is no JSON", write("corpus/manifest.json", b"{"), TRAIN, "manifest"),
    ("missing shard", remove("corpus/train-*.bin"), TRAIN, "train"),
    ("document offsets that are empty", truncate("corpus/train-documents.npy", 0), TRAIN, "offsets"),
    ("missing source", nothing, ["data", "build", "nowhere", "--out", "built"], "nowhere"),
    ("empty folder", lambda place: (place / "void").mkdir(), ["data", "build", "void", "--out", "built"], "void"),
    ("only binary junk", write("junk/a.txt", b"\x00\xff" * 900), ["data", "build", "junk", "--out", "built", "--workers", "1"], "junk"),
    ("only empty files", write("empty/a.txt", b""), ["data", "build", "empty", "--out", "built", "--workers", "1"], "empty"),
    ("ending that is not known", write("x.exe", b"MZ text"), ["data", "build", "x.exe", "--out", "built"], "x.exe"),
    ("broken lines", write("b.jsonl", b"{\n{\n"), ["data", "build", "b.jsonl", "--out", "built", "--workers", "1"], "b.jsonl"),
    (
        "field that no row has",
        write("r.jsonl", b'{"body": "x"}\n'),
        ["data", "build", "r.jsonl", "--out", "built", "--workers", "1"],
        "text",
    ),
    ("parquet that is none", write("p.parquet", b"PAR0"), ["data", "build", "p.parquet", "--out", "built", "--workers", "1"], "p.parquet"),
    ("unknown tokenizer", nothing, [*BUILD, "--tokenizer", "wordpiece"], "tokenizer"),
    ("vocabulary too small", nothing, [*BUILD, "--vocab-size", "10"], "vocab"),
    ("vocabulary beyond any text", nothing, [*BUILD, "--vocab-size", "99999999999"], "vocab"),
    ("share that is none", nothing, [*BUILD, "--validation-fraction", "1.5"], "validation"),
    (
        "out folder of another build",
        nothing,
        ["data", "build", "texts", "--out", "corpus", "--vocab-size", "300", "--workers", "1"],
        "corpus",
    ),
    ("out that is a file", write("afile", b"x"), ["data", "build", "texts", "--out", "afile", "--workers", "1"], "afile"),
    ("show of nothing", nothing, ["data", "show", "nowhere"], "nowhere"),
    # runs and checkpoints
    ("run that exists", nothing, AGAIN, "--resume"),
    ("a corpus to train into", nothing, [*TRAIN, "--out", "corpus"], "corpus holds no run"),
    ("a corpus to extend into", nothing, ["extend", "run", "--to", "64", "--out", "corpus"], "corpus holds no run"),
    ("resume of nothing", nothing, [*TRAIN, "--resume"], "new"),
    ("resume with another model", nothing, [*AGAIN, "--resume", "model.hidden_size=32"], "model.hidden_size"),
    ("resume with another seed", nothing, [*AGAIN, "--resume", "seed=7"], "seed"),
    ("resume on other data", truncate("corpus/val-*.bin", 0), [*AGAIN, "--resume"], "val"),
    ("run folder without configuration", remove("run/config.toml"), WRITE, "run"),
    ("broken configuration of a run", write("run/config.toml", b"="), WRITE, "config.toml"),
    ("no checkpoint left", remove("run/checkpoints/*"), WRITE, "checkpoint"),
    ("truncated checkpoints", truncate("run/checkpoints/*/model.safetensors", 100), WRITE, "checkpoint"),
    (
        "checkpoints of junk",
        lambda place: [p.write_bytes(b"\x80junk") for p in place.glob("run/checkpoints/*/*")] and None,
        WRITE,
        "checkpoint",
    ),
    ("step that was not kept", nothing, [*WRITE, "--step", "77"], "77"),
    ("average that was not kept", nothing, [*WRITE, "--ema"], "ema"),
    ("page without a name", nothing, ["report", "run", "--out", ""], "--out"),
    ("files of a check that are not there", nothing, ["verify", "run", "--files", "nowhere"], "nowhere"),
    ("manifest of a run that is a list", write("run/manifest.json", b"[]"), [*AGAIN, "--resume"], "manifest.json"),
    ("manifest of a run without its starts", write("run/manifest.json", b"{}"), [*AGAIN, "--resume"], "manifest.json"),
    (
        "a corpus to extend into by several methods",
        nothing,
        ["extend", "run", "--to", "64", "--method", "yarn,pi", "--out", "corpus"],
        "corpus",
    ),
    ("check on no such device", nothing, ["verify", "run", "--device", "tpu"], "tpu"),
    ("log that is a folder", log_is_a_folder, GO_ON, "metrics.jsonl"),
    ("benchmark without its file", nothing, ["bench", "qk"], "--out"),
    ("benchmark of half a token", nothing, ["bench", "embedding", "--out", "x.json", "--tokens", "0.5"], "--tokens"),
    ("result that is a folder", nothing, ["bench", "cpu", "--out", "corpus"], "corpus"),
    ("result below a file", nothing, ["bench", "cpu", "--out", "run/config.toml/x.json"], "x.json"),
    ("questions in lists without end", write("q.jsonl", b"[" * 100000), ["eval", "run", "fewshot", "--questions", "q.jsonl"], "q.jsonl"),
    # generation
    ("no run", nothing, ["generate", "nowhere", "the"], "nowhere"),
    ("prompt too long", nothing, ["generate", "run", "x" * 100], "32"),
    ("too many tokens asked for", nothing, [*WRITE, "--max-new-tokens", "1000"], "32"),
    ("no tokens asked for", nothing, [*WRITE, "--max-new-tokens", "0"], "--max-new-tokens"),
    ("negative temperature", nothing, [*WRITE, "--temperature", "-1"], "--temperature"),
    ("temperature that is no number", nothing, [*WRITE, "--temperature", "nan"], "--temperature"),
    ("share above one", nothing, [*WRITE, "--top-p", "1.5"], "--top-p"),
    ("negative k", nothing, [*WRITE, "--top-k", "-3"], "--top-k"),
    ("share below zero", nothing, [*WRITE, "--min-p", "-0.1"], "--min-p"),
    ("penalty of zero", nothing, [*WRITE, "--repetition-penalty", "0"], "--repetition-penalty"),
    ("empty stop", nothing, [*WRITE, "--stop", ""], "stop"),
    ("prompt file that is not there", nothing, ["generate", "run", "--prompts", "nowhere.txt"], "nowhere.txt"),
    ("prompt file that is empty", write("none.txt", b""), ["generate", "run", "--prompts", "none.txt"], "none.txt"),
    ("prompt file of junk", write("junk.txt", b"\xff\xfe\x00"), ["generate", "run", "--prompts", "junk.txt"], "junk.txt"),
    ("broken prompt line", write("p.jsonl", b"{\n"), ["generate", "run", "--prompts", "p.jsonl"], "p.jsonl"),
    ("prompt in lists without end", write("p.jsonl", b"[" * 100000), ["generate", "run", "--prompts", "p.jsonl"], "p.jsonl"),
    ("ids outside the vocabulary", write("p.jsonl", b"[1, 99999]\n"), ["generate", "run", "--prompts", "p.jsonl"], "99999"),
    ("numbers that do not exist", nothing, [*WRITE, "--dtype", "fp7"], "fp7"),
]


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a run that a failed command must leave as they were (the lock is none of them)."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


@pytest.mark.parametrize(("damage", "command", "part"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_bad_input_ends_in_one_sentence(
    damage: Callable[[Path], None], command: list[str], part: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(place)
    before = contents(place)
    capsys.readouterr()
    code = call(*command)
    printed = capsys.readouterr()
    last = printed.err.strip().splitlines()[-1]
    assert code == 2, printed.err
    assert last.startswith("andromeda: ")
    assert last.endswith(".")
    assert part in last
    assert "Traceback" not in printed.err
    assert "pydantic" not in printed.err
    after = contents(place)
    assert all(after.get(name) == content for name, content in before.items())


def test_there_are_enough_cases() -> None:
    assert len(CASES) >= 60
    assert len({case[0] for case in CASES}) == len(CASES)


def test_what_works_still_works_after_all_that(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(*WRITE, "--max-new-tokens", "5", "--json") == 0
    assert json.loads(capsys.readouterr().out)["text"] is not None
