"""The whole command on a tiny run: the old run stays, an interruption changes nothing, mistakes are one sentence."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy import stats

from andromeda.config.load import dumps, load
from andromeda.extend.extension import extend
from andromeda.extend.results import ExtensionResults, difference, table, verdicts
from andromeda.extend.training_config import ExtendRequest, tail_length
from andromeda.train.progress import NullReporter
from tests.command import call
from tools.evidence_page import extension_section

from .conftest import Make

QUICK = {"steps": 6, "samples": 3, "tail": 16}
CHANGES = ("train.log.every=1", "train.checkpoints.keep=9")


class Stop(NullReporter):
    """A kill in the middle of training."""

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        raise KeyboardInterrupt


def silent(steps: int) -> NullReporter:
    return NullReporter()


def quiet(text: str) -> None:
    """No remarks."""


def files(folder: Path) -> dict[str, str]:
    """Hash of every file."""
    found = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def weights(run: Path, step: int, part: str = "model") -> dict[str, torch.Tensor]:
    """Of a checkpoint."""
    return load_file(run / "checkpoints" / f"step-{step:08}" / f"{part}.safetensors")


@pytest.fixture(scope="module")
def extended(old: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], dict[str, str]]:
    """An extension by two methods, what it measured, and the old run's files before it."""
    before = files(old)
    out = tmp_path_factory.mktemp("extended") / "out"
    values = extend(ExtendRequest(str(old), 96, overrides=CHANGES, **QUICK), "pi,none", out, silent, quiet).values
    return out, values, before


def test_the_old_run_stays_as_it_was(extended: Any, old: Path) -> None:
    assert files(old) == extended[2]


def test_the_new_run_begins_with_the_old_average_and_keeps_one_of_its_own(extended: Any, old: Path) -> None:
    average = weights(old, 6, "average")
    assert any(not torch.equal(average[name], tensor) for name, tensor in weights(old, 6).items())
    first = weights(extended[0] / "pi", 0)
    assert all(torch.equal(first[name], tensor) for name, tensor in average.items())
    kept = weights(extended[0] / "pi", 0, "average")
    assert all(torch.equal(kept[name], tensor) for name, tensor in average.items())


def test_without_scaling_and_training_nothing_has_changed(extended: Any) -> None:
    _, values, _ = extended
    assert values["methods"]["none"]["untrained"]["context"] == values["before"]["context"]
    assert values["methods"]["pi"]["untrained"]["context"] != values["before"]["context"]
    assert values["before"]["context"]["context"] == [16, 32, 64, 96]


def test_the_table_has_a_row_for_every_stage(extended: Any) -> None:
    columns, rows = table(extended[1])
    assert columns == ["method", "16", "32", "64", "96"]
    assert [row[0] for row in rows] == ["original", "pi, untrained", "pi, trained", "none, untrained", "none, trained"]
    assert float(rows[0][2]) == pytest.approx(extended[1]["before"]["context"]["nats"][1], abs=1e-4)


def test_a_second_call_does_nothing_again(extended: Any, old: Path) -> None:
    out, values, _ = extended
    before = files(out)
    again = extend(ExtendRequest(str(old), 96, overrides=CHANGES, **QUICK), "pi,none", out, silent, quiet)
    assert again.values == values
    assert files(out) == before


def test_a_kill_while_training_changes_nothing(extended: Any, old: Path, tmp_path: Path) -> None:
    request = ExtendRequest(str(old), 96, overrides=CHANGES, **QUICK)
    with pytest.raises(KeyboardInterrupt):
        extend(request, "pi,none", tmp_path / "out", lambda steps: Stop(), quiet)
    values = extend(request, "pi,none", tmp_path / "out", silent, quiet).values
    assert values == extended[1]
    for name, tensor in weights(extended[0] / "pi", 6).items():
        assert torch.equal(weights(tmp_path / "out" / "pi", 6)[name], tensor)


def test_a_kill_before_the_run_is_a_run_begins_it_again(extended: Any, old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from andromeda.train.run_dir import RunDir

    def dead(self: RunDir, config: object) -> None:
        raise KeyboardInterrupt

    request = ExtendRequest(str(old), 96, overrides=CHANGES, **QUICK)
    with monkeypatch.context() as patch:
        patch.setattr(RunDir, "write_config", dead)
        with pytest.raises(KeyboardInterrupt):
            extend(request, "pi", tmp_path / "out", silent, quiet)
    values = extend(request, "pi", tmp_path / "out", silent, quiet).values
    assert values["methods"]["pi"] == extended[1]["methods"]["pi"]


def test_measuring_alone_writes_no_weights(old: Path, tmp_path: Path) -> None:
    values = extend(ExtendRequest(str(old), 64, **(QUICK | {"steps": 0})), "yarn", tmp_path / "out", silent, quiet).values
    assert list(values["methods"]["yarn"]) == ["untrained"]
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_xpos_that_cannot_read_on_is_measured_as_far_as_it_can(make: Make, tmp_path: Path) -> None:
    from andromeda.train.trainer import train

    train(make(rotary={"kind": "xpos", "scale_base": 1}), tmp_path / "old")
    request = ExtendRequest(str(tmp_path / "old"), 512, **(QUICK | {"steps": 0}))
    values = extend(request, "pi", tmp_path / "out", silent, quiet).values
    assert values["before"]["context"]["context"] == [16, 32]
    assert values["methods"]["pi"]["untrained"]["context"]["context"][-1] == 512


def test_the_command_prints_a_table_and_draws(old: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new"
    options = ["--to", "64", "--steps", "2", "--samples", "2", "--scored-tokens", "16", "--out", str(out)]
    assert call("extend", str(old), "train.log.every=2", *options) == 0
    printed = capsys.readouterr().out
    assert "yarn, trained" in printed
    assert (out / "extension.png").read_bytes().startswith(b"\x89PNG")
    assert "tokens of context" in (out / "extension.svg").read_text() or "<svg" in (out / "extension.svg").read_text()
    assert call("extend", str(old), "train.log.every=2", *options, "--json") == 0
    assert json.loads(capsys.readouterr().out)["methods"].keys() == {"yarn"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{old}"], "Give the new context length"),
        (["{tmp}/nothing", "--to", "64"], "is not a run folder"),
        (["{old}", "--to", "32"], "trained on 32 tokens already"),
        (["{old}", "--to", "64", "--method", "yarm"], "did you mean yarn?"),
        (["{old}", "--to", "64", "--method", ","], "Name a method"),
        (["{old}", "--to", "64", "--method", "alibi-scale"], "the model has none"),
        (["{old}", "--to", "64", "--out", "{old}"], "never modified"),
        (["{old}", "--to", "64", "--lr-scale", "0"], "is a factor on the old learning rates"),
        (["{old}", "--to", "100000"], "fewer than a context of 100,000"),
        (["{old}", "model.max_seq_len=128", "--to", "64"], "contradicts --to 64"),
        (["{old}", "train.sequense=64", "--to", "64"], "did you mean"),
        (["{old}", "--to", "64", "--eval-corpus", "{tmp}/none"], "There is no corpus"),
        (["{old}", "--to", "64", "--samples", "0"], "--samples"),
        (["{old}", "--to", "64", "--scored-tokens", "33"], "is more than the trained context of 32 tokens"),
        (["{old}", "--to", "0"], "--to"),
        (["{old}", "model.hidden_size=32", "--to", "64"], "of another model"),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_nothing(
    arguments: list[str], message: str, old: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [word.format(old=old, tmp=tmp_path) for word in arguments]
    out = [] if "--out" in given else ["--out", str(tmp_path / "out")]
    before = files(old)
    assert call("extend", *given, *out) == 2
    said = capsys.readouterr().err.strip()
    assert message in said
    assert "\n" not in said
    assert not (tmp_path / "out").exists()
    assert files(old) == before


def test_the_folder_of_another_run_stays_as_it_is(old: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(old, tmp_path / "other")
    before = files(tmp_path / "other")
    assert call("extend", str(old), "--to", "64", "--out", str(tmp_path / "other")) == 2
    assert "holds a run that is not an extension" in capsys.readouterr().err
    assert files(tmp_path / "other") == before


def test_the_change_from_the_trained_length_is_paired_by_windows(extended: Any) -> None:
    near, far = [2.0, 3.0, 5.0], [2.5, 3.1, 5.6]
    change, error = difference(near, far)
    assert (change, error) == pytest.approx((0.4, stats.sem([0.5, 0.1, 0.6])))
    assert difference([1.0], [3.0]) == (2.0, None)
    found = extended[1]["methods"]["pi"]["after"]["context"]
    assert np.mean(found["windows"], axis=1) == pytest.approx(found["nats"])
    message = verdicts(extended[1])
    assert message[0].startswith(f"pi, trained: {found['nats'][3] - found['nats'][1]:+.4f} ± ")
    assert message[0].endswith("nats/token from 32 to 96 tokens")


def test_a_page_has_the_tables_and_the_worst_depth(extended: Any) -> None:
    values = json.loads(json.dumps(extended[1]))
    values["methods"]["pi"]["after"]["retrieval"] = {"lengths": [32, 96], "accuracy": [[1.0, 0.5], [0.75, 1.0]]}
    training = {"parameters": 125e6, "tokens": 2e6, "model": {"max_seq_len": 32}}
    result = {"training": training, "extension": {"96": values}, "far": values, "machine": {"gpu": "H100", "cpu": ""}}
    lines = list(extension_section({**result, "date": "a day", "command": "python x.py"}))
    assert lines[0] == "## Extension of 125.0 M parameters"
    assert "### From 32 to 96 tokens" in lines
    assert "### The model with the longest context, at up to 96 tokens, without further training" in lines
    assert "Retrieval at the worst depth: pi, trained 50% at 32, 75% at 96." in lines
    (row,) = {line for line in lines if line.startswith("| pi, trained |")}
    assert float(row.split(" | ")[2]) == pytest.approx(values["methods"]["pi"]["after"]["context"]["nats"][1], abs=1e-4)
    assert row.endswith("| 88% |")


def test_by_default_the_scored_targets_fit_the_trained_context(old: Path) -> None:
    config = load(str(old))
    assert tail_length(config, ExtendRequest(str(old), 64)) == 16
    assert (
        tail_length(config.model_copy(update={"train": config.train.model_copy(update={"seq_len": 2048})}), ExtendRequest(str(old), 4096))
        == 256
    )


def test_another_extension_in_the_folder_is_refused(old: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ExtensionResults(tmp_path, {"request": {}, "trained": 32}).save()
    assert call("extend", str(old), "--to", "64", "--out", str(tmp_path)) == 2
    assert "holds another extension" in capsys.readouterr().err
    (tmp_path / "extension.json").write_text("{")
    assert call("extend", str(old), "--to", "64", "--out", str(tmp_path)) == 2
    assert "damaged" in capsys.readouterr().err


def test_a_run_without_a_checkpoint_is_refused(old: Path, tmp_path: Path, make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(old, tmp_path / "empty", ignore=shutil.ignore_patterns("checkpoints"))
    (tmp_path / "empty" / "config.toml").write_text(dumps(make()))
    assert call("extend", str(tmp_path / "empty"), "--to", "64") == 2
    assert "no checkpoint" in capsys.readouterr().err
