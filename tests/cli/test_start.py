"""`--help` and wrong calls are answered at once: no verb imports anything slow before the call and its configuration are checked."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.command import call

ROOT = Path(__file__).parents[2]
SLOW = {"torch", "numpy", "transformers", "tokenizers", "datasets", "tensorboard", "triton", "psutil", "safetensors", "scipy", "matplotlib"}
PROGRAM = """
import contextlib, io, json, sys
from andromeda.cli.main import main
found = []
for arguments in json.load(sys.stdin):
    sys.argv = ["andromeda", *arguments]
    out, err, code = io.StringIO(), io.StringIO(), None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as end:
            code = end.code
    found.append((code, out.getvalue(), err.getvalue(), sorted({name.partition(".")[0] for name in sys.modules})))
json.dump(found, sys.stdout)
"""

VERBS = [
    *([verb] for verb in ("ablate", "bench", "data", "demo", "doctor", "eval", "explain", "export", "extend", "generate")),
    *([verb] for verb in ("import", "plan", "report", "tokenizers", "train", "tune", "verify")),
    *(["data", verb] for verb in ("build", "compare", "show")),
    *(["bench", verb] for verb in ("attention", "convergence", "cpu", "decode", "embedding", "loss", "memory")),
    *(["bench", verb] for verb in ("precision", "prefill", "qk", "train")),
    ["tokenizers", "compare"],
    *(["tune", verb] for verb in ("inspect", "sft")),
]
WRONG = [
    (["train", "nano", "model.hiden_size=3"], "model.hidden_size"),
    (["train", "nano", "model.n_layer=3"], "model.num_layers"),
    (["train", "nano", "train.steps=many"], "train.steps"),
    (["train", "nano", "model.attention.num_kv_heads=3"], "model.attention.num_heads"),
    (["train", "nano"], "data.corpus"),
    (["train", "nanoo"], "nano"),
    (["train", "nano", "--steps", "100"], "train.steps=VALUE"),
    (["plan", "nano", "x=1"], "there is no key x"),
    (["plan", "nano", "--batch-size", "0"], "--batch-size"),
    (["demo", "x=1"], "there is no key x"),
    (["ablate", "nano", "x=1", "--vary", "train.optim.lr=0.1,0.2"], "there is no key x"),
    (["ablate", "nano", "--vary", "train.optim.lrr=0.1,0.2"], "train.optim.lr"),
    (["ablate", "nano"], "nothing to compare"),
    (["tokenizers", "compare", "python", "--set", "x=1"], "there is no key x"),
    (["data", "build", "x", "--out", "y", "--vocab-size", "0"], "vocab"),
    *((["bench", verb, "nano", "x=1"], "there is no key x") for verb in ("memory", "train", "prefill", "decode", "precision")),
    (["bench", "attention"], "--out"),
    (["bench", "prefill", "nano", "x=1", "--eight-bits"], "--fp8"),
    (["extend", "{run}", "x=1", "--to", "64"], "there is no key x"),
    (["extend", "{run}"], "--to"),
    *(([verb, "nowhere", *rest], "nowhere is not a run folder") for verb, rest in (("eval", []), ("report", []), ("verify", []))),
    *(([verb, "nowhere", *rest], "nowhere is not a run folder") for verb, rest in (("generate", ["a"]), ("explain", ["a"]))),
    (["export", "nowhere", "--to", "x"], "nowhere is not a run folder"),
    (["import", "nowhere", "--out", "x"], "nowhere is no folder"),
    (["tune", "inspect", "nowhere", "x.jsonl"], "nowhere is not a run folder"),
    (["tune", "sft", "nowhere", "--data", "x.jsonl"], "nowhere is not a run folder"),
    (["eval", "{run}", "--lengths", "many"], "--lengths"),
    (["explain", "{run}", "a", "--layers", "many"], "--layers"),
    (["verify", "{run}", "--files", "nowhere"], "--files"),
]


def answers(calls: list[list[str]]) -> list[tuple[int, str, str, list[str]]]:
    """Exit code, stdout, stderr and imported packages after each of several calls in one fresh process."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], input=json.dumps(calls), capture_output=True, text=True, check=True, cwd=ROOT)
    return [tuple(answer) for answer in json.loads(done.stdout)]


def test_every_verb_is_in_the_lists() -> None:
    from andromeda.cli.main import app

    def named(of: object, before: tuple[str, ...] = ()) -> set[tuple[str, ...]]:
        commands = {(*before, command.name or command.callback.__name__) for command in of.registered_commands}  # type: ignore[attr-defined]
        groups = of.registered_groups  # type: ignore[attr-defined]
        return commands.union(*({(*before, g.name)} | named(g.typer_instance, (*before, g.name)) for g in groups))

    assert named(app) == {tuple(verb) for verb in VERBS}
    assert {tuple(verb) for verb in VERBS if verb[0] != "bench"} - {("data",), ("tokenizers",), ("tune",), ("doctor",)} <= {
        tuple(words[: 2 if words[0] in ("data", "tokenizers", "tune") else 1]) for words, _ in WRONG
    } | {("data", "show"), ("data", "compare")}


def test_help_imports_nothing_slow() -> None:
    for verb, (code, out, _, modules) in zip(VERBS, answers([[*verb, "--help"] for verb in VERBS]), strict=True):
        assert code == 0, verb
        assert out.startswith(f"Usage: andromeda {' '.join(verb)} "), verb
        assert "typer" in modules
        assert not SLOW & set(modules), verb


def test_a_wrong_call_is_refused_before_anything_slow_is_imported(tmp_path: Path) -> None:
    from andromeda.config.load import dumps, load

    run = tmp_path / "run"
    run.mkdir()
    (run / "config.toml").write_text(dumps(load("nano")))
    calls = [[word.format(run=run) for word in words] for words, _ in WRONG]
    for words, (_, part), (code, _, err, modules) in zip(calls, WRONG, answers(calls), strict=True):
        assert code == 2, (words, err)
        assert err.startswith("andromeda: "), words
        assert err.count("\n") == 1, err
        assert part in err, (words, err)
        assert not SLOW & set(modules), (words, sorted(SLOW & set(modules)))


@pytest.mark.parametrize("arguments", [(), ("data",)])
def test_a_call_without_a_verb_gets_the_help(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert call(*arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"Usage: {' '.join(('andromeda', *arguments))} [OPTIONS] COMMAND")
    assert "see `" not in said.err
