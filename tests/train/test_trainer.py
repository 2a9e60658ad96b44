"""Whole runs: what they learn, bad batches, going back, signals."""

from __future__ import annotations

import json
import math
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from andromeda.config.data import BuildConfig
from andromeda.config.run import RunConfig
from andromeda.data.build import build
from andromeda.data.loader import TokenStream
from andromeda.train import checkpoint, trainer
from andromeda.train.objective import MicroBatch, NextTokenObjective, ObjectiveSums
from andromeda.train.trainer import TrainingFailed, train

Tiny = Callable[..., RunConfig]
Same = Callable[[Path, Path], None]
Metrics = Callable[[Path], list[dict[str, Any]]]


def corpus_of(texts: list[str], folder: Path) -> str:
    (folder / "text").mkdir()
    for number, text in enumerate(texts):
        (folder / "text" / f"{number:03}.txt").write_text(text)
    build([str(folder / "text")], folder / "corpus", BuildConfig(tokenizer="bytes", validation_fraction=0.2))
    return str(folder / "corpus")


def learned(config: RunConfig, out: Path, metrics: Metrics) -> float:
    train(config, out)
    return next(line["validation/loss"] for line in reversed(metrics(out)) if "validation/loss" in line)


LEARNING = {"train__batch_size": 16, "train__eval_tokens": 4096, "train__optim": {"lr": 1e-2}, "train__log": {"every": 50}}


def test_learns_a_cycle(tiny: Tiny, tmp_path: Path, metrics: Metrics) -> None:
    """Text that repeats eight letters can be predicted exactly but for where it ends."""
    corpus = corpus_of(["abcdefgh" * (100 + n) for n in range(20)], tmp_path)
    config = tiny(train__steps=60, train__eval_every=60, data__corpus=corpus, **LEARNING)
    assert learned(config, tmp_path / "run", metrics) < 0.05


def test_learns_a_markov_source_to_its_entropy(tiny: Tiny, tmp_path: Path, metrics: Metrics) -> None:
    """No model can be better than the entropy rate of the source, -sum_i pi_i sum_j P_ij ln P_ij; a good one comes near."""
    transition = np.array([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8], [0.3, 0.6, 0.1]])
    draw = random.Random(0)

    def text(length: int = 1500) -> str:
        state, letters = 0, []
        for _ in range(length):
            state = draw.choices(range(3), transition[state])[0]
            letters.append("xyz"[state])
        return "".join(letters)

    stationary = np.linalg.matrix_power(transition, 100)[0]
    entropy = float(-(stationary[:, None] * transition * np.log(transition)).sum())
    corpus = corpus_of([text() for _ in range(40)], tmp_path)
    loss = learned(tiny(train__steps=80, train__eval_every=80, data__corpus=corpus, **LEARNING), tmp_path / "run", metrics)
    # 4,096 targets of about one nat each: the mean strays by about 0.01.
    assert entropy - 0.03 < loss < entropy + 0.05


def test_micro_batches_see_the_same_order_and_loss(tiny: Tiny, tmp_path: Path, metrics: Metrics) -> None:
    """Same rows, same losses to rounding, whatever the split and the number of loader threads."""
    runs = {}
    for micro, workers in ((4, 0), (1, 0), (2, 3)):
        out = tmp_path / f"{micro}-{workers}"
        train(tiny(train__micro_batch_size=micro, data__workers=workers, train__log={"every": 1}), out)
        runs[micro] = [line for line in metrics(out) if "loss" in line]
    for other in (1, 2):
        assert [line["rows"] for line in runs[other]] == [line["rows"] for line in runs[4]]
        assert [line["tokens"] for line in runs[other]] == [line["tokens"] for line in runs[4]]
        assert [line["loss"] for line in runs[other]] == pytest.approx([line["loss"] for line in runs[4]], rel=1e-4)


def test_figures_are_what_they_say(tiny: Tiny, tmp_path: Path, corpus: Path, metrics: Metrics) -> None:
    """Loss of the first step by hand; bits per byte of a byte tokenizer is the loss over ln 2, separators aside."""
    config = tiny(train__log={"every": 1}, train__steps=2)
    train(config, tmp_path / "run")
    first = metrics(tmp_path / "run")[0]
    from andromeda.data.loader import open_stream
    from andromeda.model.transformer import Transformer

    batch = open_stream(config.data, 32, config.seed).batch(0, 4)
    logits = Transformer(config.model, seed=config.seed)(batch.ids, documents=batch.documents)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten()).item()
    assert first["loss"] == pytest.approx(loss, rel=1e-5)
    text = int((batch.targets < 256).sum()) if batch.bytes != batch.tokens else batch.tokens
    assert batch.bytes == text
    assert first["bits_per_byte"] == pytest.approx(loss / math.log(2) * batch.tokens / text, rel=1e-5)
    assert (first["rows"], first["tokens"]) == (4, 128)


class Poison:
    """An objective that is not a number on rows that begin with certain ids."""

    def __init__(self, rows: Tensor) -> None:
        self._rows = {tuple(row.tolist()) for row in rows}

    def objective(self, model: Any, *parts: Any) -> NextTokenObjective:
        bad_rows = self._rows

        class Poisoned(NextTokenObjective):
            def __call__(self, batch: MicroBatch, window: int = 0) -> ObjectiveSums:
                sums = super().__call__(batch, window)
                bad = any(tuple(row.tolist()) in bad_rows for row in batch.ids)
                return ObjectiveSums(sums.total * math.nan, sums.nll * math.nan) if bad else sums

        return Poisoned(model)


@pytest.fixture
def poison(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Make the rows [first, end) of the stream bad."""
    from andromeda.data.loader import open_stream

    def make(first: int, end: int) -> None:
        config = tiny()
        rows = open_stream(config.data, 32, config.seed).batch(first, end - first).ids
        monkeypatch.setattr(trainer, "build_objective", Poison(rows).objective)

    return make


def without(monkeypatch: pytest.MonkeyPatch, first: int, end: int) -> None:
    """A stream in which the rows [first, end) never were, numbered as if they had been."""
    real = TokenStream.batch

    def shorter(self: TokenStream, start: int, count: int) -> Any:
        return real(self, start + (end - first) if self.num_sequences is None and start >= first else start, count)

    monkeypatch.setattr(TokenStream, "batch", shorter)


def test_one_bad_batch_is_left_out(tiny: Tiny, tmp_path: Path, metrics: Metrics, poison: Callable[[int, int], None]) -> None:
    poison(20, 24)
    train(tiny(train__eval_every=0), tmp_path / "run")
    events = [line for line in metrics(tmp_path / "run") if "event" in line]
    assert events == [{"step": 6, "event": "step skipped: the loss is not finite", "rows": [20, 24]}]
    last = metrics(tmp_path / "run")[-1]
    assert (last["step"], last["rows"], last["tokens"]) == (12, 48, 11 * 128)
    assert math.isfinite(last["loss"])


def test_rollback_ends_as_if_the_rows_had_never_been(
    tiny: Tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    metrics: Metrics,
    final_tensors: Callable[[Path], dict[str, Tensor]],
    poison: Callable[[int, int], None],
) -> None:
    """Three bad batches in a row (steps 6 to 8): back to step 4, on with step 5, and past the bad rows."""
    config = tiny(train__steps=14, train__spike_guard={"patience": 3}, train__ema=0.9, train__optim={"kind": "muon", "lr": 0.01})
    with monkeypatch.context() as patch:
        without(patch, 20, 32)
        train(config, tmp_path / "never")
    poison(20, 32)
    train(config, tmp_path / "rolled")
    a, b = final_tensors(tmp_path / "never"), final_tensors(tmp_path / "rolled")
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
    lines = metrics(tmp_path / "rolled")
    events = [line for line in lines if "event" in line]
    assert [event["event"] for event in events] == ["rolled back from step 8"]
    assert events[0]["rows_skipped"] == [[20, 24], [24, 28], [28, 32]]
    kept = [line | {"rows": line["rows"] - 12 * (line["step"] > 5)} if "rows" in line else line for line in lines if "event" not in line]
    assert kept == metrics(tmp_path / "never")


@pytest.mark.parametrize("stop_at", [6, 7, 9, 12])
def test_rollback_after_an_interruption(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, assert_same_run: Same, poison: Callable[[int, int], None], stop_at: int
) -> None:
    """Stopped in the middle of bad steps or after going back, and resumed: the same run."""
    config = tiny(train__steps=14, train__spike_guard={"patience": 3}, train__checkpoints={"every": 4, "keep": 1})
    poison(20, 32)
    train(config, tmp_path / "whole")
    real = trainer.Trainer._after_step
    taken = 0

    def observe(self: trainer.Trainer) -> None:
        nonlocal taken
        real(self)
        taken += 1
        if taken == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "_after_step", observe)
        result = train(config, tmp_path / "stopped")
    assert result.signal == signal.SIGTERM
    assert result.step < 14
    train(config, tmp_path / "stopped", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


def test_a_run_does_not_resume_from_what_a_rollback_left_behind(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, assert_same_run: Same, poison: Callable[[int, int], None]
) -> None:
    """Stopped among bad steps, which saves step 7, and again at step 5 after going back: the newer checkpoint is of no use any more."""
    config = tiny(train__steps=14, train__spike_guard={"patience": 3}, train__checkpoints={"every": 4, "keep": 2})
    poison(20, 32)
    train(config, tmp_path / "whole")
    real = trainer.Trainer._after_step

    def stop_after(count: int) -> None:
        left = iter(range(count - 1, -1, -1))

        def observe(self: trainer.Trainer) -> None:
            real(self)
            if next(left) == 0:
                os.kill(os.getpid(), signal.SIGTERM)

        with monkeypatch.context() as patch:
            patch.setattr(trainer.Trainer, "_after_step", observe)
            train(config, tmp_path / "stopped", resume=(tmp_path / "stopped").exists())

    stop_after(7)
    assert checkpoint.list_all(tmp_path / "stopped/checkpoints")[0].name == "step-00000007"
    stop_after(2)
    assert checkpoint.list_all(tmp_path / "stopped/checkpoints")[0].name == "step-00000005"
    train(config, tmp_path / "stopped", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


def test_gives_up_with_a_sentence(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, poison: Callable[[int, int], None]) -> None:
    """Everything from row 20 on is bad: two rollbacks, then an error; the healthy checkpoint is still there and whole."""
    poison(20, 200)
    config = tiny(train__steps=40, train__spike_guard={"patience": 2, "rollbacks": 2}, train__checkpoints={"every": 4})
    with pytest.raises(TrainingFailed, match=r"2 steps in a row up to step 7 were skipped, after 2 rollbacks: lower .*optim\.lr"):
        train(config, tmp_path / "run")
    newest = checkpoint.latest(tmp_path / "run" / "checkpoints", pytest.fail)
    assert newest is not None
    assert newest.name == "step-00000004"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_and_the_run_goes_on_as_if_nothing_had_been(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, assert_same_run: Same, number: signal.Signals
) -> None:
    config = tiny(train__checkpoints={"every": 0})
    train(config, tmp_path / "whole")
    real = trainer.Trainer._train_step
    steps: list[int] = []

    def advance(self: trainer.Trainer) -> None:
        if len(steps) == 5:
            os.kill(os.getpid(), number)  # in the middle of the sixth step, which is finished
        steps.append(1)
        real(self)

    monkeypatch.setattr(trainer.Trainer, "_train_step", advance)
    result = train(config, tmp_path / "stopped")
    assert (result.step, result.signal) == (6, number)
    assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)
    train(config, tmp_path / "stopped", resume=True)
    assert len(steps) == 12
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


def test_damaged_newest_checkpoint(tiny: Tiny, tmp_path: Path, assert_same_run: Same) -> None:
    """The run resumes from the one before it, says so, and keeps the damaged one aside."""
    config = tiny()
    train(config, tmp_path / "whole")
    train(config, tmp_path / "hurt")
    os.truncate(tmp_path / "hurt" / "checkpoints" / "step-00000012" / "optimizer.safetensors", 1000)
    notes: list[str] = []

    class RecordingReporter:
        def log(self, step: int, metrics: dict[str, Any]) -> None: ...
        def step_done(self, step: int) -> None: ...
        def close(self) -> None: ...
        def message(self, text: str) -> None:
            notes.append(text)

    train(config, tmp_path / "hurt", resume=True, reporter=RecordingReporter())
    assert notes[:2] == [
        "checkpoint step-00000012 is damaged (optimizer.safetensors has 1000 bytes instead of "
        f"{(tmp_path / 'whole/checkpoints/step-00000012/optimizer.safetensors').stat().st_size}); trying the one before it.",
        "resuming from step 8",
    ]
    assert_same_run(tmp_path / "whole", tmp_path / "hurt")
    assert (tmp_path / "hurt" / "checkpoints" / "damaged-step-00000012").is_dir()


def test_manifest_is_enough_for_a_stranger(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny(train__steps=4)
    train(config, tmp_path / "run")
    train(config, tmp_path / "run", resume=True)
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["seed"] == config.seed
    assert len(manifest["data"]) == 64
    assert [start["step"] for start in manifest["starts"]] == [0, 4]
    start = manifest["starts"][0]
    assert start["versions"]["torch"] == torch.__version__.partition("+")[0] or start["versions"]["torch"] == torch.__version__
    assert {"command", "machine", "device", "code", "time"} <= start.keys()
