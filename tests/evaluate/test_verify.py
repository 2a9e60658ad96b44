"""`andromeda verify`: what is true agrees to the last bit, and whatever is changed in a run folder is found."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from andromeda.config.data import BuildConfig
from andromeda.data.encoders import raw
from andromeda.data.loader import open_stream
from andromeda.data.tokenizer import Tokenizer
from andromeda.train.run_dir import RunDir
from andromeda.train.trainer import resolve_seq_len
from tests.command import call

HELD_OUT = "held-out loss of step 2"


def test_verify_agrees_and_then_finds_what_was_changed(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--samples", "2", "--lengths", "200", "--depths", "2", "--style", "code", "--device", "cpu"]
    assert call("eval", "run", "bits", "single", *options) == 0
    capsys.readouterr()
    assert call("verify", "run", "--device", "cpu", "--json") == 0
    checks = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    expected = ["training data", "tokenizer", "shards", "checkpoints", "config.toml", "metrics.jsonl", "held-out loss of step 2"]
    assert [check["what"] for check in checks[: len(expected)]] == expected
    assert checks[6]["difference"] == 0.0
    assert all(check["agrees"] and check["difference"] in (None, 0.0) for check in checks)
    path = place / "run/evaluations/bits.json"
    stored = json.loads(path.read_text())
    stored["result"]["loss"] = math.nextafter(stored["result"]["loss"], 0)
    path.write_text(json.dumps(stored))
    assert call("verify", "run", "--device", "cpu") == 1
    out = capsys.readouterr().out
    assert "DIFFERS" in out
    stored["machine"]["processor"] = "another"
    path.write_text(json.dumps(stored))
    assert call("verify", "run", "--device", "cpu") == 0
    stored["result"]["loss"] *= 1.001
    path.write_text(json.dumps(stored))
    assert call("verify", "run", "--device", "cpu") == 1


def test_verify_finds_other_weights_and_other_data(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("eval", "run", "bits", "--text", "some.txt", "--device", "cpu") == 0
    Path("some.txt").unlink()
    capsys.readouterr()
    assert call("verify", "run", "--device", "cpu") == 1
    assert "some.txt cannot be read" in capsys.readouterr().out
    Path("kept").mkdir()
    Path("kept/some.txt").write_text("Text of another kind, für sich.\n" * 40)
    assert call("verify", "run", "--device", "cpu", "--files", "kept") == 0
    Path("kept/some.txt").write_text("Text of another kind, für mich.\n" * 40)
    assert call("verify", "run", "--device", "cpu", "--files", "kept") == 1


def test_a_training_repeated_on_a_cpu_is_equal_to_the_last_bit(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever threads are set now: those of the run are used."""
    torch.set_num_threads(2)
    assert said(capsys, "--retrain")[1]["weights of a repeated training"]["note"] == "equal to the last bit"
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    path = place / "run/config.toml"
    path.write_text(path.read_text().replace("seed = 0", "seed = 1", 1))
    code, checks = said(capsys, "--retrain")
    assert code == 1
    assert not checks["weights of a repeated training"]["agrees"]


def test_a_repeated_training_finds_a_changed_loss(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The log's figures of speed differ from call to call, the others by no bit."""
    path = place / "run/metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    row = next(line for line in lines if "loss" in line)
    row["tokens_per_second"] *= 2
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert said(capsys, "--retrain")[1]["metrics of a repeated training"]["agrees"]
    row["loss"] = math.nextafter(row["loss"], 0)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, checks = said(capsys, "--retrain")
    assert code == 1
    assert checks["weights of a repeated training"]["agrees"]
    assert checks["metrics of a repeated training"]["note"].startswith(f"loss of step {row['step']} was ")


def test_elsewhere_only_the_last_losses_of_two_trainings_are_compared(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another processor rounds otherwise; that is no lie, but another loss is."""
    change(place / "run/manifest.json", lambda told: told["starts"][-1]["machine"].update(processor="another"))
    code, checks = said(capsys, "--retrain")
    assert code == 0
    assert checks["validation/loss of a repeated training"]["difference"] < 1e-4
    path = place / "run/metrics.jsonl"
    path.write_text(path.read_text().replace('"validation/loss": ', '"validation/loss": 1'))
    assert not said(capsys, "--retrain")[1]["validation/loss of a repeated training"]["agrees"]


def test_what_cannot_be_repeated_is_one_sentence(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = place / "run/metrics.jsonl"
    whole = path.read_text()
    path.write_text(whole.splitlines()[0].replace('"step": 2', '"step": 1') + "\n")
    assert call("verify", "run", "--retrain") == 2
    assert "run stands at step 1 of 2: finish it" in capsys.readouterr().err
    path.write_text(whole)
    (place / "run/extension.json").write_text("{}")
    assert call("verify", "run", "--retrain") == 2
    assert "began with the weights of another run" in capsys.readouterr().err


def said(capsys: pytest.CaptureFixture[str], *options: str, run: str = "run") -> tuple[int, dict[str, Any]]:
    """Exit code and checks by what they check."""
    capsys.readouterr()
    code = call("verify", run, "--device", "cpu", "--json", *options)
    return code, {check["what"]: check for check in map(json.loads, capsys.readouterr().out.splitlines())}


def change(path: Path, how: Callable[[Any], object]) -> None:
    """Change a file of JSON."""
    told = json.loads(path.read_text())
    how(told)
    path.write_text(json.dumps(told))


def nudge(place: Path) -> Path:
    """Change one weight of the newest checkpoint by a little."""
    file = place / "run/checkpoints/step-00000002/model.safetensors"
    weights = load_file(file)
    weights["head.weight"][0, 0] += 1e-2
    save_file(weights, file)
    return file


def test_changed_weights_are_found_by_their_hash_and_by_what_they_compute(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("eval", "run", "bits", "--device", "cpu") == 0
    assert said(capsys)[0] == 0
    file = nudge(place)
    code, checks = said(capsys)
    assert code == 1
    assert "step 2: model.safetensors was changed" in checks["checkpoints"]["note"]
    # Whoever changes the hash as well is found by every figure.
    fingerprint = {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    change(file.with_name("index.json"), lambda index: index.update({file.name: fingerprint}))
    code, checks = said(capsys)
    assert code == 1
    assert checks["checkpoints"]["agrees"]
    wrong = {"held-out loss of step 2", "bits: weights", "bits: bits_per_byte"}
    assert {what for what, check in checks.items() if not check["agrees"]} == wrong


@pytest.mark.parametrize(
    ("break_it", "wrong"),
    [
        (lambda p: change(p / "run/manifest.json", lambda told: told.update(data="0" * 64)), ["training data"]),
        (lambda p: (p / "run/manifest.json").unlink(), ["manifest.json"]),
        (lambda p: shutil.rmtree(p / "run/checkpoints"), ["checkpoints", "metrics.jsonl"]),
        (lambda p: _append(p / "run/metrics.jsonl", b"junk\n"), ["metrics.jsonl"]),
        (lambda p: (p / "run/metrics.jsonl").unlink(), ["metrics.jsonl"]),
        (lambda p: _replace(p / "run/metrics.jsonl", b'"gradient_norm": ', b'"gradient_norm": 1'), ["metrics.jsonl"]),
        (lambda p: _replace(p / "run/metrics.jsonl", b'"validation/loss": ', b'"validation/loss": 1'), ["metrics.jsonl", HELD_OUT]),
        (
            lambda p: _replace(p / "run/metrics.jsonl", b'"validation/bits_per_byte": ', b'"validation/better": '),
            ["metrics.jsonl", HELD_OUT],
        ),
        (lambda p: _replace(p / "run/config.toml", b"seed = 0", b"seed = 7"), ["training data", "config.toml"]),
        (lambda p: _replace(p / "run/config.toml", b"weight_decay = 0.0", b"weight_decay = 0.5"), ["config.toml"]),
        (lambda p: _other_tokenizer(p / "run/tokenizer"), ["tokenizer"]),
        (lambda p: shutil.rmtree(p / "run/tokenizer"), ["tokenizer"]),
    ],
)
def test_whatever_is_changed_is_found(
    place: Path, capsys: pytest.CaptureFixture[str], break_it: Callable[[Path], object], wrong: list[str]
) -> None:
    assert said(capsys)[0] == 0
    break_it(place)
    code, checks = said(capsys)
    assert code == 1
    assert [what for what, check in checks.items() if not check["agrees"]] == wrong


def test_a_manifest_of_other_data_is_found_by_what_the_checkpoint_remembers(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = RunDir(place / "run").config()
    other = open_stream(config.data, resolve_seq_len(config), 7).fingerprint
    _replace(place / "run/config.toml", b"seed = 0", b"seed = 7")
    change(place / "run/manifest.json", lambda told: told.update(data=other))
    found = said(capsys)[1]["training data"]
    assert (found["stored"], found["new"], found["agrees"]) == (other[:12], other[:12], False)
    assert "the newest checkpoint was trained on" in found["note"]


def test_a_figure_changed_with_its_hash_is_found_by_what_the_weights_compute(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever also rewrites the memory in the checkpoint is found for what the weights give: each held-out figure by itself."""
    path, folder = place / "run/metrics.jsonl", place / "run/checkpoints/step-00000002"
    _replace(path, b'"validation/bits_per_byte": ', b'"validation/bits_per_byte": 1')
    written = path.read_bytes()
    told = {"metrics_bytes": len(written), "metrics_sha256": hashlib.sha256(written).hexdigest()}
    _remember(folder, lambda state: state.update(told))
    code, checks = said(capsys)
    assert code == 1
    assert [what for what, check in checks.items() if not check["agrees"]] == [HELD_OUT]
    assert checks[HELD_OUT]["note"] == "largest difference at validation/bits_per_byte"


def _remember(folder: Path, how: Callable[[Any], object]) -> None:
    """Change what a checkpoint keeps beside tensors, and its hash."""
    change(folder / "state.json", how)
    state = (folder / "state.json").read_bytes()
    change(folder / "index.json", lambda index: index.update({"state.json": _fingerprint(state)}))


def test_a_later_start_may_measure_otherwise(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What was measured before is compared as it was measured."""
    assert call("train", "run", "--out", "run", "--resume", "train.eval_tokens=300", "train.micro_batch_size=1") == 0
    code, checks = said(capsys)
    assert code == 0
    assert checks[HELD_OUT]["difference"] == 0.0


def test_a_checkpoint_that_does_not_say_what_was_measured_is_not_believed(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever rehashes a checkpoint could claim that an older version had measured other sequences."""
    _remember(place / "run/checkpoints/step-00000002", lambda state: state.pop("validation"))
    code, checks = said(capsys)
    assert code == 1
    assert not checks[HELD_OUT]["checked"]


def test_a_training_without_named_data_is_not_believed(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _remember(place / "run/checkpoints/step-00000002", lambda state: state.pop("data"))
    change(place / "run/manifest.json", lambda told: told.pop("data"))
    code, checks = said(capsys)
    assert code == 1
    assert "neither manifest nor checkpoint names its data" in checks["training data"]["note"]


@pytest.mark.parametrize("forgotten", ["metrics_bytes", "metrics_sha256"])
def test_metrics_that_the_checkpoint_does_not_remember_are_not_believed(
    place: Path, capsys: pytest.CaptureFixture[str], forgotten: str
) -> None:
    _remember(place / "run/checkpoints/step-00000002", lambda state: state.pop(forgotten))
    code, checks = said(capsys)
    assert code == 1
    assert not checks["metrics.jsonl"]["checked"]


def test_lines_after_the_newest_checkpoint_are_not_believed(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _append(place / "run/metrics.jsonl", b'{"step": 3, "loss": 0.5}\n')
    code, checks = said(capsys)
    assert code == 1
    assert checks["metrics.jsonl"]["agrees"]
    assert not checks["metrics.jsonl, later lines"]["checked"]


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("reasoning", {"samples": 10**9, "seed": 0}),
        ("retrieval", {"task": "single", "style": "prose", "lengths": [2**40], "depths": [0.5], "samples": 1, "seed": 0}),
        ("retrieval", {"task": "single", "style": "prose", "lengths": [32], "depths": [0.5] * 10**5, "samples": 1, "seed": 0}),
        ("retrieval", {"task": "single", "style": "prose", "lengths": [512] * 300, "depths": [0.5], "samples": 10_000, "seed": 0}),
        ("bits", {"text": "", "corpus": "", "context": 2**11, "stride": 1}),
        ("context", {"text": "", "corpus": "", "contexts": [8], "targets": 10**9, "places": 1}),
    ],
)
def test_settings_that_would_take_forever_are_not_repeated(
    place: Path, capsys: pytest.CaptureFixture[str], kind: str, settings: dict[str, Any]
) -> None:
    assert call("eval", "run", "bits", "--device", "cpu") == 0
    said(capsys)
    stored = json.loads((place / "run/evaluations/bits.json").read_text())
    (place / "run/evaluations/bits.json").write_text(json.dumps({**stored, "kind": kind, "settings": settings}))
    code, checks = said(capsys)
    assert code == 1
    assert not checks["bits"]["checked"]
    assert any(words in checks["bits"]["note"] for words in ("are repeated", "too much to repeat"))


@pytest.mark.parametrize("content", ["[]", "{}", '{"format": 1, "step": 2, "config": 3, "metrics_bytes": "x"}'])
def test_a_state_of_another_kind_is_a_damaged_checkpoint(place: Path, capsys: pytest.CaptureFixture[str], content: str) -> None:
    (place / "run/checkpoints/step-00000002/state.json").write_text(content)
    code, checks = said(capsys)
    assert code == 1
    assert "step 2: state.json has" in checks["checkpoints"]["note"]


def test_several_sources_are_found_where_they_lie_now(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(place / "corpus", place / "here/one")
    shutil.copytree(place / "corpus", place / "there/two")
    sources = 'data.sources=[{path="here/one"}, {path="there/two", weight=2}]'
    assert call("train", "run/config.toml", "data.corpus=", sources, "--out", "mixed") == 0
    assert said(capsys, run="mixed")[0] == 0
    shutil.move(place / "here", place / "now")
    shutil.move(place / "there/two", place / "now/two")
    assert said(capsys, run="mixed")[0] == 1
    assert said(capsys, "--corpus", "now", run="mixed")[0] == 0


def _fingerprint(content: bytes) -> dict[str, Any]:
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _other_tokenizer(folder: Path) -> None:
    """Another one of as many entries."""
    shutil.rmtree(folder)
    Tokenizer(raw.create(BuildConfig()), eos=255).save(folder)


def _append(path: Path, more: bytes) -> None:
    path.write_bytes(path.read_bytes() + more)


def _replace(path: Path, old: bytes, new: bytes) -> None:
    text = path.read_bytes()
    assert old in text
    path.write_bytes(text.replace(old, new))


def test_a_line_that_a_kill_cut_off_is_no_lie(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _append(place / "run/metrics.jsonl", b'{"step": 3, "lo')
    code, checks = said(capsys)
    assert code == 0
    assert checks["metrics.jsonl"]["agrees"]


def test_another_corpus_is_found_and_a_moved_one_is_taken(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("eval", "run", "bits", "--device", "cpu") == 0
    shutil.copytree(place / "corpus", place / "moved")
    shutil.copytree(place / "run", place / "copy" / "run")
    assert said(capsys, "--corpus", "moved", run="copy/run")[0] == 0
    _replace(place / "moved/manifest.json", b'"fingerprint": "', b'"fingerprint": "0')
    assert said(capsys, "--corpus", "moved", run="copy/run")[0] == 1
    code, checks = said(capsys, "--corpus", "nowhere", run="copy/run")
    assert code == 1
    assert checks["checkpoints"]["agrees"]
    assert {what for what, check in checks.items() if not check["agrees"]} == {"training data", "held-out loss of step 2", "bits"}


@pytest.mark.parametrize("wrong", [{"machine": "x"}, {"versions": None}, {"step": "2"}, {"kind": "bitz"}, {"more": 1}])
def test_a_result_of_another_shape_is_one_sentence(place: Path, capsys: pytest.CaptureFixture[str], wrong: dict[str, Any]) -> None:
    assert call("eval", "run", "bits", "--device", "cpu") == 0
    change(place / "run/evaluations/bits.json", lambda told: told.update(wrong))
    assert call("verify", "run", "--device", "cpu") == 2
    assert "bits.json is no result of an evaluation" in capsys.readouterr().err


def test_settings_that_make_no_sense_differ(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--samples", "1", "--lengths", "200", "--depths", "0.5", "--style", "code", "--device", "cpu"]
    assert call("eval", "run", "single", *options) == 0
    change(place / "run/evaluations/retrieval-single-code.json", lambda told: told["settings"].update(task="sngle"))
    code, checks = said(capsys)
    assert code == 1
    assert "did you mean single?" in checks["retrieval-single-code"]["note"]


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"kind": "bits"}'])
def test_a_damaged_result_is_named(place: Path, capsys: pytest.CaptureFixture[str], content: str) -> None:
    (place / "run/evaluations").mkdir()
    (place / "run/evaluations/bits.json").write_text(content)
    assert call("verify", "run", "--device", "cpu") == 2
    assert "bits.json" in capsys.readouterr().err


def test_verify_wants_a_run(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("verify", "nowhere") == 2
    assert "nowhere is not a run folder" in capsys.readouterr().err
