"""What loading settles: the corpus's vocabulary where only a preset gives one, and a schedule given in fractions of the run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from andromeda.config.load import dumps, from_values, load
from andromeda.config.rules import resolve
from andromeda.config.run import RunConfig
from andromeda.config.train import ScheduleConfig
from andromeda.config.vocabulary import padded


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    return manifest(tmp_path / "corpus", 4096)


def manifest(folder: Path, entries: object) -> str:
    """A corpus folder, as far as loading reads it."""
    folder.mkdir()
    (folder / "manifest.json").write_text(json.dumps({"tokenizer": {"vocab_size": entries}}))
    return str(folder)


def test_a_preset_takes_the_vocabulary_of_its_corpus(corpus: str) -> None:
    assert load("nano").model.vocab_size == 2048
    config = load("nano", [f"data.corpus={corpus}"])
    assert config.model.vocab_size == 4096
    assert load("nano", [f"data.sources=[{{path={corpus!r}}}]"]).model.vocab_size == 4096
    assert from_values({"preset": "nano", "data": {"corpus": corpus}}).model.vocab_size == 4096


@pytest.mark.parametrize(("entries", "preset", "expected"), [(257, 2048, 384), (50257, 50432, 50304), (300, 48, 304), (4096, 2048, 4096)])
def test_it_is_padded_as_the_preset_is(entries: int, preset: int, expected: int) -> None:
    assert padded(entries, preset) == expected


def test_a_vocabulary_that_the_user_sets_stays(corpus: str, tmp_path: Path) -> None:
    assert load("nano", [f"data.corpus={corpus}", "model.vocab_size=5000"]).model.vocab_size == 5000
    assert load("nano", [f"data.corpus={corpus}", "model.num_tokens=5000"]).model.vocab_size == 5000
    mine = tmp_path / "mine.toml"
    mine.write_text(f'preset = "nano"\n[model]\nvocab_size = 6000\n[data]\ncorpus = "{corpus}"\n')
    assert load(mine).model.vocab_size == 6000


def test_a_run_folder_holds_the_number_and_keeps_it(corpus: str, tmp_path: Path) -> None:
    config = load("nano", [f"data.corpus={corpus}"])
    (tmp_path / "config.toml").write_text(dumps(resolve(config)))
    other = manifest(tmp_path / "other", 8192)
    assert load(tmp_path) == resolve(config)
    assert load(tmp_path, [f"data.corpus={other}"]).model.vocab_size == 4096


@pytest.mark.parametrize("entries", [None, "many", -5, True, 1.5, {}])
def test_a_damaged_manifest_is_left_to_those_who_open_the_corpus(entries: object, tmp_path: Path) -> None:
    assert load("nano", [f"data.corpus={manifest(tmp_path / 'corpus', entries)}"]).model.vocab_size == 2048
    assert load("nano", ["data.corpus=nowhere"]).model.vocab_size == 2048


def test_fractions_become_steps() -> None:
    schedule = load("nano").train.schedule
    assert (schedule.warmup, schedule.cooldown) == (10, 360)
    short = load("nano", ["train.steps=300"]).train.schedule
    assert (short.warmup, short.cooldown) == (3, 120)
    assert load("nano", ["train.schedule.cooldown=50"]).train.schedule.cooldown == 50
    built = RunConfig().train.model_copy(update={"steps": 200, "schedule": ScheduleConfig(kind="wsd", warmup=0.1, cooldown=0.5)})
    resolved = resolve(RunConfig(train=built)).train.schedule
    assert (resolved.warmup, resolved.cooldown) == (20, 100)
    assert type(resolved.warmup) is type(resolved.cooldown) is int


@pytest.mark.parametrize(
    ("preset", "warmup", "cooldown"),
    [
        ("andromeda", 2000, 0),
        ("andromeda-65b", 2000, 0),
        ("andromeda-125m", 200, 1600),
        ("andromeda-tuned", 200, 1600),
        ("andromeda-360m", 200, 4600),
        ("andromeda-360m-long", 200, 4600),
        ("andromeda-1b", 200, 6400),
        ("andromeda-7b", 200, 11000),
        ("speedrun", 0, 600),
    ],
)
def test_presets_mean_whole_numbers_of_steps(preset: str, warmup: int, cooldown: int) -> None:
    schedule = load(preset).train.schedule
    assert (schedule.warmup, schedule.cooldown) == (warmup, cooldown)


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 16, 100, 300])
def test_a_preset_can_be_trained_for_any_number_of_steps(steps: int) -> None:
    resolve(load("nano", [f"train.steps={steps}"]))
