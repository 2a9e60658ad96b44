"""Options of the last version are refused with their new name, options that are keys with the key."""

from __future__ import annotations

import pytest

from andromeda.cli.renamed_options import RENAMED_OPTIONS
from tests.command import call

CASES = [(verb, old, new) for verb, names in RENAMED_OPTIONS.items() for old, new in names.items()]


@pytest.mark.parametrize(("verb", "old", "new"), CASES, ids=[f"{verb} {old}" for verb, old, _ in CASES])
def test_an_old_option_is_refused_with_its_new_name(verb: str, old: str, new: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(*verb.split(), f"{old}=1") == 2
    assert capsys.readouterr().err == f"andromeda: {old} is now called {new}: see `andromeda {verb} --help`.\n"
    assert call(*verb.split(), "--help") == 0
    options = capsys.readouterr().out.replace(",", " ").replace("/", " ").split()
    assert new in options
    assert old not in options


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        (("train", "nano", "--steps", "100"), "train.steps"),
        (("train", "nano", "--learning-rate=3e-4"), "train.optim.lr"),
        (("train", "nano", "--learning_rate=3e-4"), "train.optim.lr"),
        (("train", "nano", "--max-steps", "5"), "train.steps"),
        (("train", "nano", "--batch-size", "5"), "train.batch_size"),
        (("train", "nano", "--n_layer=5"), "model.num_layers"),
        (("demo", "--steps", "100"), "train.steps"),
        (("plan", "nano", "--hidden-size", "64"), "model.hidden_size"),
        (("ablate", "nano", "--lr", "0.1"), "train.optim.lr"),
        (("bench", "memory", "nano", "--seq-len", "64"), "train.seq_len"),
    ],
)
def test_an_option_that_is_a_key(arguments: tuple[str, ...], key: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(*arguments) == 2
    assert f", but a key: write {key}=VALUE" in capsys.readouterr().err


def test_a_verb_without_keys_names_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("report", "run", "--steps", "3") == 2
    assert "No such option: --steps" in capsys.readouterr().err


def test_an_old_command_is_refused_with_its_new_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("bench", "learn", "corpus") == 2
    assert "bench learn is now called andromeda bench convergence" in capsys.readouterr().err
