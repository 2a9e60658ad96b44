"""The command as a user meets it: what it prints, how it ends, and one sentence for whatever is wrong."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from andromeda.cli.main import main
from andromeda.config.load import dumps
from andromeda.config.run import RunConfig
from andromeda.train import trainer

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run `andromeda` with arguments: exit code, stdout, stderr. A traceback would be an exception here."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["andromeda", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def settings(tiny: Callable[..., RunConfig], tmp_path: Path) -> Path:
    """The tiny configuration as a file."""
    path = tmp_path / "tiny.toml"
    path.write_text(dumps(tiny(train__steps=6)))
    return path


def sentence(result: tuple[int, str, str]) -> str:
    """The one line that a refused command prints."""
    code, _, err = result
    assert code == 2, err
    assert err.startswith("andromeda: ")
    assert err.count("\n") == 1, err
    assert err.endswith(".\n")
    return err


def test_train_and_resume(command: Command, settings: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    code, out, _ = command("train", settings, "--out", run)
    assert code == 0
    *start, _, _, _, _, warning, report = out.splitlines()
    lines = out.splitlines()[len(start) : -2]
    assert [line.split()[0] for line in start] == ["model", "data", "run"]
    assert "parameters, fp32 on cpu, not compiled" in start[0]
    assert "epochs: 6 steps of 4 sequences of 32 tokens" in start[1]
    assert str(run) in start[2]
    assert "no better than that of knowing how often each token occurs" in warning, "after six steps"
    assert [line.split("  ")[0] for line in lines] == ["step 3/6", "step 5/6", "step 6/6", "step 6/6"]
    assert report == f"report: {run / 'report.html'}"
    assert "loss" in lines[0]
    assert "tokens/s" in lines[0]
    assert "validation loss" in lines[1]
    assert "\x1b" not in out, "no colors when piped"
    assert {"config.toml", "manifest.json", "metrics.jsonl", "checkpoints", "samples"} <= {path.name for path in run.iterdir()}
    code, out, _ = command("train", "--out", run, "--resume")
    assert (code, out.splitlines()) == (0, ["resuming from step 6", *start, report])


def test_json_lines_are_the_metrics(command: Command, settings: Path, tmp_path: Path) -> None:
    code, out, _ = command("train", settings, "--out", tmp_path / "run", "--json")
    assert code == 0
    assert [json.loads(line) for line in out.splitlines()] == [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_with_their_number(
    command: Command, settings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: int
) -> None:
    real = trainer.Trainer._train_step

    def advance(self: trainer.Trainer) -> None:
        os.kill(os.getpid(), number)
        real(self)

    monkeypatch.setattr(trainer.Trainer, "_train_step", advance)
    ended, out, _ = command("train", settings, "--out", tmp_path / "run")
    assert ended == code
    assert "step 1" in out.splitlines()[-1]
    assert "--resume" in out.splitlines()[-1]
    assert (tmp_path / "run" / "checkpoints" / "step-00000001").is_dir()


def test_nothing_named(command: Command) -> None:
    assert "Name a preset or a TOML file" in sentence(command("train"))


def test_folder_holds_a_run(command: Command, settings: Path, tmp_path: Path) -> None:
    command("train", settings, "--out", tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert "already holds a run: add --resume" in sentence(command("train", settings, "--out", tmp_path / "run"))
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


def test_nothing_to_resume(command: Command, settings: Path, tmp_path: Path) -> None:
    assert "no run folder" in sentence(command("train", settings, "--out", tmp_path / "none", "--resume"))
    (tmp_path / "empty").mkdir()
    assert "There is no run in" in sentence(command("train", settings, "--out", tmp_path / "empty", "--resume"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("seed=1", "seed was 0 and is now 1"),
        ("model.hidden_size=48", "model.hidden_size was 32 and is now 48"),
        ("train.optim.lr=0.1", "train.optim.lr was 0.003 and is now 0.1"),
        ("train.steps=7", "train.steps was 6 and is now 7"),
    ],
)
def test_resume_with_another_configuration(command: Command, settings: Path, tmp_path: Path, change: str, message: str) -> None:
    command("train", settings, "--out", tmp_path / "run")
    assert message in sentence(command("train", settings, change, "--out", tmp_path / "run", "--resume"))
    assert message in sentence(command("train", change, "--out", tmp_path / "run", "--resume"))


def test_resume_may_change_what_is_not_learned(command: Command, settings: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command("train", settings, "--out", run)
    code, _, err = command("train", "train.log.every=2", "train.micro_batch_size=2", "name=other", "--out", run, "--resume")
    assert (code, err) == (0, "")
    starts = json.loads((run / "manifest.json").read_text())["starts"]
    assert starts[-1]["changes"] == ["name", "train.log.every", "train.micro_batch_size"]


def test_all_checkpoints_truncated(command: Command, settings: Path, tmp_path: Path) -> None:
    command("train", settings, "--out", tmp_path / "run")
    for file in (tmp_path / "run" / "checkpoints").glob("*/model.safetensors"):
        os.truncate(file, 10)
    assert "Every checkpoint in" in sentence_after_notes(command("train", "--out", tmp_path / "run", "--resume"))


def sentence_after_notes(result: tuple[int, str, str]) -> str:
    code, out, err = result
    assert "is damaged" in out
    return sentence((code, "", err))


def test_other_data(command: Command, settings: Path, tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from andromeda.config.data import BuildConfig
    from andromeda.data.build import build

    command("train", settings, "--out", tmp_path / "run")
    moved = tmp_path / "moved"
    shutil.copytree(corpus, moved)
    assert command("train", f"data.corpus={moved}", "--out", tmp_path / "run", "--resume")[0] == 0
    (tmp_path / "text.txt").write_text("quite another text " * 200 + "\n" + "and more of it " * 200)
    (tmp_path / "more.txt").write_text("held out or not " * 300)
    build(
        [str(tmp_path / "text.txt"), str(tmp_path / "more.txt")],
        tmp_path / "other",
        BuildConfig(tokenizer="bytes", validation_fraction=0.4),
    )
    message = sentence(command("train", f"data.corpus={tmp_path / 'other'}", "--out", tmp_path / "run", "--resume"))
    assert "The data has changed since the checkpoint" in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("data.corpus=/nowhere", "There is no corpus at /nowhere"),
        ("model.vocab_size=100", "The corpus has 257 tokens and the model 100: set model.vocab_size=257"),
        ("train.device=cuda", "this machine shows 0 CUDA devices"),
        ("train.device=cpux", "train.device = 'cpux'"),
        ("train.precision=fp8", "train.precision = 'fp8' needs a GPU"),
        ("train.probes.every=2 train.probes.tasks=['arithmetik']", "did you mean arithmetic?"),
        ("train.probes.every=2 train.probes.tasks=['multihop']", "the model's context is 32: leave it out"),
        ("train.log.wandb=true", "pip install 'andromeda[wandb]'"),
        ("train.stepz=3", "train.stepz"),
    ],
)
def test_wrong_settings_leave_no_folder(
    command: Command, settings: Path, tmp_path: Path, change: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    run = tmp_path / "run"
    assert message in sentence(command("train", settings, *change.split(" "), "--out", run))
    assert not run.exists()


def test_folder_that_cannot_be_made(command: Command, settings: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot be made" in sentence(command("train", settings, "--out", tmp_path / "file" / "run"))


def test_a_shard_without_held_out_tokens(command: Command, settings: Path, tmp_path: Path) -> None:
    """A shard made elsewhere trains without validation; asked for validation, the sentence says what is missing."""
    import numpy as np

    from andromeda.data.shards import write_shard

    write_shard(tmp_path / "tokens.bin", np.tile(np.arange(200), 40).astype(np.uint16))
    shard = f"data.corpus={tmp_path / 'tokens.bin'}"
    assert "without a val split" in sentence(command("train", settings, shard, "--out", tmp_path / "run"))
    code, out, _ = command("train", settings, shard, "train.eval_every=0", "--out", tmp_path / "run")
    assert code == 0
    assert "bits/byte" not in out, "no tokenizer, no bytes"
