"""New runs from the weights of another one, and resumed runs that become longer."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from andromeda.config.data import BuildConfig
from andromeda.config.run import RunConfig
from andromeda.data.tokenizer import train_tokenizer
from andromeda.evaluate.comparison import DataLocations
from andromeda.evaluate.reproduce import retrain_and_compare
from andromeda.report.build_report import build_report
from andromeda.report.hub_card import hub_card
from andromeda.report.run_data import read_run
from andromeda.train import trainer
from andromeda.train.progress import NullReporter
from andromeda.train.trainer import train
from andromeda.utils.errors import AndromedaError
from tests.command import call

Tiny = Callable[..., RunConfig]
Same = Callable[[Path, Path], None]


class Told(NullReporter):
    """Keeps the messages."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def message(self, text: str) -> None:
        self.messages.append(text)

    @property
    def length(self) -> str:
        """What was told of another length."""
        return next(text for text in self.messages if text.startswith("train.steps"))


def tensors(run: Path, step: int, part: str = "model") -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"step-{step:08}" / f"{part}.safetensors")


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def manifest(run: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((run / "manifest.json").read_text())
    return found


KEEP_ALL = {"every": 4, "keep": 99}


@pytest.fixture
def parent(tiny: Tiny, tmp_path: Path) -> Path:
    """Twelve steps, all checkpoints kept."""
    train(tiny(train__checkpoints=KEEP_ALL), tmp_path / "parent")
    return tmp_path / "parent"


@pytest.mark.parametrize(("source", "step"), [("", 12), ("@4", 4)])
def test_weights_are_those_of_the_checkpoint(tiny: Tiny, parent: Path, tmp_path: Path, source: str, step: int) -> None:
    """Bit for bit before the first step, with an empty optimizer and step count; the manifest, report and card name the run."""
    out, told = tmp_path / "new", Told()
    train(tiny(seed=1, train__checkpoints=KEEP_ALL), out, init_from=f"{parent}{source}", reporter=told)
    assert told.messages[:1] == [f"starting from the weights of {parent} at step {step}"]
    assert equal(tensors(out, 0), tensors(parent, step))
    assert not equal(tensors(out, 12), tensors(parent, 12))
    assert not (out / "checkpoints" / "step-00000000" / "optimizer.safetensors").exists(), "nothing to keep before the first step"
    weights = parent / "checkpoints" / f"step-{step:08}" / "model.safetensors"
    sha256 = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert manifest(out)["parent"] == {"run": str(parent), "step": step, "weights_sha256": sha256, "keep_optimizer": False}
    assert f"step {step}" in build_report(out)
    assert sha256 in build_report(out)
    assert sha256 in hub_card(read_run(out), None, "")
    with pytest.raises(AndromedaError, match="began with the weights of another run"):
        list(retrain_and_compare(out, tmp_path / "again", DataLocations(), lambda *_: None))


def test_keeping_the_optimizer_continues_a_constant_schedule(tiny: Tiny, parent: Path, tmp_path: Path) -> None:
    """Its moments are loaded bit for bit, and the first update differs from that of a fresh optimizer."""
    for name, keep in (("kept", True), ("fresh", False)):
        train(tiny(train__steps=1, train__checkpoints=KEEP_ALL), tmp_path / name, init_from=parent, keep_optimizer=keep)
    assert equal(tensors(tmp_path / "kept", 0, "optimizer"), tensors(parent, 12, "optimizer"))
    assert not equal(tensors(tmp_path / "kept", 1), tensors(tmp_path / "fresh", 1))
    assert manifest(tmp_path / "kept")["parent"]["keep_optimizer"] is True  # type: ignore[index]


def test_average_begins_with_the_weights(tiny: Tiny, parent: Path, tmp_path: Path) -> None:
    train(tiny(train__ema=0.9, train__checkpoints=KEEP_ALL), tmp_path / "new", init_from=parent)
    average, weights = tensors(tmp_path / "new", 0, "average"), tensors(parent, 12)
    assert average
    assert all(torch.equal(average[name], weights[name]) for name in average)


def test_killed_before_the_run_began(tiny: Tiny, parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A start that dies after any of its writes leaves no run, or one that resumes from the parent's weights."""
    real, out = trainer._record_start, tmp_path / "new"

    def die(*args: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "_record_start", die)
    with pytest.raises(KeyboardInterrupt):
        train(tiny(), out, init_from=f"{parent}@4")
    assert not (out / "config.toml").exists()
    monkeypatch.setattr(trainer, "_record_start", real)
    train(tiny(train__checkpoints=KEEP_ALL), out, init_from=parent)
    assert equal(tensors(out, 0), tensors(parent, 12))
    assert len(manifest(out)["starts"]) == 1  # type: ignore[arg-type]


def test_interrupted_run_ends_like_an_uninterrupted_one(
    tiny: Tiny, parent: Path, tmp_path: Path, assert_same_run: Same, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tiny(), tmp_path / "whole", init_from=parent)
    real = trainer.Trainer._train_step

    def killed(self: trainer.Trainer) -> None:
        if self._state.progress.step == 2:
            raise KeyboardInterrupt
        real(self)

    monkeypatch.setattr(trainer.Trainer, "_train_step", killed)
    with pytest.raises(KeyboardInterrupt):
        train(tiny(), tmp_path / "halves", init_from=parent)
    monkeypatch.setattr(trainer.Trainer, "_train_step", real)
    train(tiny(), tmp_path / "halves", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "halves")


def test_what_does_not_fit_is_one_sentence(tiny: Tiny, parent: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def sentence(*arguments: object) -> str:
        assert call("train", *map(str, arguments)) == 2
        err = capsys.readouterr().err
        assert err.startswith("andromeda: ")
        assert err.count("\n") == 1
        return err

    new = tmp_path / "new"
    wide = sentence(parent, "model.feedforward.mlp_ratio=4", "--init-from", parent, "--out", new)
    assert "decoder.blocks.0.feedforward.inner.weight is 64x32 there and 128x32 here" in wide
    assert "is only in the new model" in sentence(parent, "model.num_layers=3", "--init-from", parent, "--out", new)
    assert "there are steps 12, 8, 4" in sentence("--init-from", f"{parent}@5", "--out", new)
    assert "is not a run folder" in sentence("--init-from", tmp_path / "nothing", "--out", new)
    assert "never modified" in sentence("--init-from", parent, "--out", parent)
    assert "leave out --init-from" in sentence("--resume", "--init-from", parent, "--out", parent)
    assert "--init-from names" in sentence(parent / "config.toml", "--keep-optimizer", "--out", new)
    alone = sentence(parent, "--out", new)
    assert f"andromeda train --out {parent} --resume" in alone
    assert f"andromeda train {parent} --init-from {parent}" in alone
    shutil.copytree(parent, tmp_path / "foreign")
    shutil.rmtree(tmp_path / "foreign" / "tokenizer")
    train_tokenizer(["the cat sat"], BuildConfig(vocab_size=258)).save(tmp_path / "foreign" / "tokenizer")
    assert "has another tokenizer than the corpus" in sentence("--init-from", tmp_path / "foreign", "--out", new)
    (parent / "checkpoints" / "step-00000012" / "optimizer.safetensors").write_bytes(b"")
    assert "leave out --keep-optimizer" in sentence("--init-from", parent, "--keep-optimizer", "--out", new)
    assert not new.exists()


def test_a_runs_own_configuration_from_the_command_line(parent: Path, tmp_path: Path) -> None:
    """`train --init-from RUN` and `train RUN --init-from RUN` mean the same."""
    for name, config in (("a", []), ("b", [str(parent)])):
        assert call("train", *config, "train.steps=2", "--init-from", str(parent), "--out", str(tmp_path / name)) == 0
    assert equal(tensors(tmp_path / "a", 2), tensors(tmp_path / "b", 2))
    assert call("train", str(tmp_path / "a"), "--resume") == 0


STABLE = {"train__steps": 12, "train__checkpoints": KEEP_ALL, "train__eval_every": 0, "train__log": {"every": 1}}


@pytest.mark.parametrize("kind", ["constant", "wsd"])
def test_longer_from_the_stable_part_is_the_longer_run(
    tiny: Tiny, tmp_path: Path, assert_same_run: Same, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Interrupted before its cooldown and resumed with more steps, a run is bit-equal to one that always had them."""
    schedule = {"kind": kind, "warmup": 2} | ({"cooldown": 4} if kind == "wsd" else {})
    short, long = (tiny(**STABLE | {"train__steps": steps, "train__schedule": schedule}) for steps in (12, 20))
    train(long, tmp_path / "long")
    real, told = trainer.Trainer._train_step, Told()

    def killed(self: trainer.Trainer) -> None:
        if self._state.progress.step == 8:
            raise KeyboardInterrupt
        real(self)

    monkeypatch.setattr(trainer.Trainer, "_train_step", killed)
    with pytest.raises(KeyboardInterrupt):
        train(short, tmp_path / "grown")
    monkeypatch.setattr(trainer.Trainer, "_train_step", real)
    train(long, tmp_path / "grown", resume=True, reporter=told)
    assert_same_run(tmp_path / "grown", tmp_path / "long")
    rest = "stays constant" if kind == "constant" else "stays at its full value until step 16 and falls from there to step 20"
    assert rest in told.length
    assert told.length.startswith("train.steps is now 20 (was 12): ")
    with pytest.raises(AndromedaError, match="given another length"):
        list(retrain_and_compare(tmp_path / "grown", tmp_path / "again", DataLocations(), lambda *_: None))


def test_longer_after_the_cooldown_says_so(tiny: Tiny, tmp_path: Path) -> None:
    schedule, told = {"kind": "wsd", "cooldown": 4, "min_lr_ratio": 0.0}, Told()
    train(tiny(**STABLE, train__schedule=schedule), tmp_path / "run")
    train(tiny(**STABLE | {"train__steps": 20}, train__schedule=schedule), tmp_path / "run", resume=True, reporter=told)
    assert "it had fallen to 0%, since the cooldown began at step 8" in told.length
    assert "--init-from RUN@STEP --keep-optimizer" in told.length
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    rates = {line["step"]: line["lr/matrix"] / 3e-3 for line in lines if "lr/matrix" in line}
    assert [round(rates[step], 6) for step in (8, 12, 13, 16, 17, 18, 20)] == [1.0, 0.25, 1.0, 1.0, 1.0, 0.75, 0.25]
    with pytest.raises(AndromedaError, match="is at step 20 already, beyond train"):
        train(tiny(**STABLE | {"train__steps": 10}, train__schedule=schedule), tmp_path / "run", resume=True)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"train__schedule": {"kind": "cosine"}}, "schedule 'cosine' depend on it from the first step on"),
        ({"train__schedule": {"kind": "linear"}}, "schedule 'linear' depend on it"),
        (
            {
                "train__schedule": {"kind": "constant"},
                "train__window": {"start": 8, "end": 16, "step": 8},
                "model__attention__sliding_window": 16,
            },
            "window of train.window grows over all steps",
        ),
    ],
)
def test_length_that_the_steps_done_depend_on(tiny: Tiny, tmp_path: Path, changes: dict[str, object], why: str) -> None:
    train(tiny(**STABLE | {"train__steps": 3}, **changes), tmp_path / "run")
    with pytest.raises(AndromedaError, match=why) as error:
        train(tiny(**STABLE | {"train__steps": 4}, **changes), tmp_path / "run", resume=True)
    assert f"andromeda train {tmp_path / 'run'} --init-from {tmp_path / 'run'} train.steps=4 --out NEW" in str(error.value)
