"""`andromeda generate` as a user meets it: what it prints where, and one sentence for every wrong input."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path

import pytest

from andromeda import Andromeda
from andromeda.cli import main as cli
from andromeda.config.data import BuildConfig
from andromeda.data.tokenizer import train_tokenizer

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "small"
    tokenizer = train_tokenizer([], BuildConfig(tokenizer="bytes"))
    Andromeda(num_tokens=257, max_seq_len=64, dim=32, depth=2, heads=4, dim_head=16, tokenizer=tokenizer).save(folder)
    return folder


@pytest.fixture(autouse=True)
def _in_a_folder_of_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("first\n\nsecond one\n", "utf-8")
    Path("prompts.jsonl").write_text('"first"\n{"prompt": "second\\u2028one"}\n{"prompt": [256, 65]}\n', "utf-8")
    Path("empty.txt").write_text("\n \n", "utf-8")
    Path("latin.txt").write_bytes("grün".encode("latin-1"))
    Path("broken.jsonl").write_text('"fine"\n{"prompt"\n', "utf-8")
    Path("other.jsonl").write_text('{"text": "x"}\n', "utf-8")
    Path("long.txt").write_text("short\n" + "x" * 80 + "\n", "utf-8")


def call(*arguments: str | Path) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["andromeda", "generate", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
    return int(ended.value.code or 0)


def test_text_goes_to_stdout_and_figures_to_stderr(run: Path, capsys: Capture) -> None:
    assert call(run, "ab", "--max-new-tokens", "9", "--seed", "1", "--dtype", "fp32") == 0
    out, err = capsys.readouterr()
    assert out == Andromeda.from_run(run, dtype="fp32").generate("ab", max_new_tokens=9, seed=1) + "\n"
    assert "prompt of 3" in err
    assert "seed 1" in err
    assert "\x1b" not in out + err


def test_a_prompt_may_come_from_standard_input(run: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"ab")))
    assert call(run, "-", "--max-new-tokens", "9", "--seed", "1") == 0
    piped = capsys.readouterr().out
    assert call(run, "ab", "--max-new-tokens", "9", "--seed", "1") == 0
    assert capsys.readouterr().out == piped


@pytest.mark.parametrize("file", ["prompts.txt", "prompts.jsonl"])
def test_json_is_one_object_a_prompt_in_their_order(run: Path, capsys: Capture, file: str) -> None:
    assert call(run, "--prompts", file, "--json", "--max-new-tokens", "5", "--seed", "2", "--batch-size", "2", "--dtype", "fp32") == 0
    out, err = capsys.readouterr()
    answers = [json.loads(line) for line in out.rstrip("\n").split("\n")]
    prompts = ["first", "second one"] if file.endswith("txt") else ["first", "second\u2028one", [256, 65]]
    assert [answer["prompt"] for answer in answers] == prompts
    assert err == ""
    model = Andromeda.from_run(run, dtype="fp32")
    for index, (answer, prompt) in enumerate(zip(answers, prompts, strict=True)):
        ids = model.generate(prompt if isinstance(prompt, list) else [256, *prompt.encode()], max_new_tokens=5, seed=2)
        assert answer["ids"] == ids
        assert answer["text"] == bytes(i for i in ids if i < 256).decode("utf-8", "replace")
        assert answer["index"] == index
        assert answer["prompt_tokens"] == (2 if isinstance(prompt, list) else 1 + len(prompt.encode()))
        assert answer["finish"] in ("length", "eos")
        assert answer["cache_bytes"] > 0


def test_a_file_without_json_is_headed_answers(run: Path, capsys: Capture) -> None:
    assert call(run, "--prompts", "prompts.txt", "--max-new-tokens", "5") == 0
    out = capsys.readouterr().out
    assert '1. "first"\n' in out
    assert '2. "second one"\n' in out


def test_an_answer_ends_at_a_stop_text(run: Path, capsys: Capture) -> None:
    settings = ("ab", "--max-new-tokens", "30", "--seed", "4", "--temperature", "3", "--json")
    assert call(run, *settings) == 0
    whole = json.loads(capsys.readouterr().out)["text"]
    assert call(run, *settings, "--stop", "never written", "--stop", whole[4:7]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["text"], answer["finish"]) == (whole[: whole.index(whole[4:7])], "stop")


def test_a_terminal_gets_no_control_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    from andromeda.cli.generate import _printable

    text = "a\x1b[31mb\r\n\tc\x9b 👩‍🚀é\x7f"
    assert _printable(text) == text
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert _printable(text) == "a\u241b[31mb\u240d\n\tc\ufffd 👩‍🚀é\ufffd"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["/nowhere", "x"], "/nowhere is not a run folder"),
        (["RUN", "x", "--temperature", "-1"], "--temperature must be at least 0, not -1.0."),
        (["RUN", "x", "--temperature", "nan"], "--temperature must be a finite number"),
        (["RUN", "x", "--temperature", "inf"], "--temperature must be a finite number"),
        (["RUN", "x", "--top-p", "0"], "--top-p must be above 0"),
        (["RUN", "x", "--top-p", "1.01"], "--top-p must be at most 1"),
        (["RUN", "x", "--top-k", "-3"], "--top-k must be at least 0"),
        (["RUN", "x", "--min-p", "-0.1"], "--min-p must be at least 0"),
        (["RUN", "x", "--repetition-penalty", "0"], "--repetition-penalty must be above 0"),
        (["RUN", "x", "--seed", "-1"], "--seed must be at least 0"),
        (["RUN", "x", "--max-new-tokens", "0"], "--max-new-tokens must be above 0"),
        (["RUN", "x", "--max-new-tokens", "63"], "A prompt of 2 tokens and 63 new ones are more than this model's context of 64"),
        (["RUN", "x" * 64], "The prompt has 65 tokens"),
        (["RUN", "x", "--stop", ""], "--stop must not be empty text"),
        (["RUN", "x", "--prompts", "prompts.txt"], "Give a prompt or --prompts, not both."),
        (["RUN", "--prompts", "absent.txt"], "The prompts in absent.txt cannot be read"),
        (["RUN", "--prompts", "."], "The prompts in . cannot be read"),
        (["RUN", "--prompts", "empty.txt"], "empty.txt holds no prompts"),
        (["RUN", "--prompts", "latin.txt"], "latin.txt is not text in UTF-8 (byte 2)"),
        (["RUN", "--prompts", "broken.jsonl"], "Line 2 of broken.jsonl is not JSON"),
        (["RUN", "--prompts", "other.jsonl"], "Line 1 of other.jsonl holds no prompt"),
        (["RUN", "--prompts", "long.txt"], "Prompt 2 of 2: The prompt has 81 tokens"),
        (["RUN", "x", "--device", "cuda:77"], "device = 'cuda:77'"),
        (["RUN", "x", "--dtype", "int8"], "There is no dtype 'int8'"),
        (["RUN", "x", "--ema"], "keeps no moving average"),
        (["RUN", "x", "--step", "9"], "The checkpoint of step 9"),
    ],
)
def test_wrong_input_is_one_sentence_and_exit_code_2(run: Path, capsys: Capture, arguments: list[str], sentence: str) -> None:
    assert call(*[run if argument == "RUN" else argument for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert sentence in err
    assert err.startswith("andromeda: ")
    assert err.count("\n") == 1


def test_a_run_without_an_intact_checkpoint_is_named(run: Path, capsys: Capture) -> None:
    damaged = shutil.copytree(run, "damaged")
    weights = Path(damaged) / "checkpoints/step-00000000/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert call(damaged, "x") == 2
    assert "Every checkpoint in damaged/checkpoints is damaged" in capsys.readouterr().err
    shutil.rmtree(Path(damaged) / "checkpoints/step-00000000")
    assert call(damaged, "x") == 2
    assert "holds no checkpoint yet" in capsys.readouterr().err


def test_a_model_without_a_tokenizer_takes_ids_only(run: Path, capsys: Capture) -> None:
    bare = shutil.copytree(run, "bare")
    shutil.rmtree(Path(bare) / "tokenizer")
    assert call(bare, "x") == 2
    assert "no tokenizer" in capsys.readouterr().err
    Path("ids.jsonl").write_text("[1, 2]\n")
    assert call(bare, "--prompts", "ids.jsonl", "--json", "--max-new-tokens", "3") == 0
    assert len(json.loads(capsys.readouterr().out)["ids"]) == 3
