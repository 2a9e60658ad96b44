"""The benchmarks' arithmetic, and that their sides are what they are said to be."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from andromeda.bench import competitors, convergence
from andromeda.bench import competitors as cpu
from andromeda.bench.competitors import BASELINE, COMPETITORS, CONTEXT, ROWS, VOCABULARY, Competitor, ComputeMode, build_competitor
from andromeda.bench.record import record, save
from andromeda.bench.timing import time_alternately
from andromeda.cli.main import app
from andromeda.config.data import BuildConfig
from andromeda.data.build import build
from tools import precision_plot

NOTHING = Competitor(lambda ids, targets, factor: torch.zeros(()), 10, 1e6)


def test_all_works_meet_every_round_in_alternating_order() -> None:
    seen: list[tuple[str, int]] = []
    seconds = time_alternately({name: lambda n, name=name: seen.append((name, n)) for name in "abc"}, warmup=1, rounds=3)
    assert seen == [*[(name, 0) for name in "abc"], *[(name, 1) for name in "cba"], *[(n, 2) for n in "abc"], *[(n, 3) for n in "cba"]]
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3, "c": 3}


def test_ratio_is_of_each_sides_best_median() -> None:
    eager, compiled = ComputeMode(), ComputeMode(compiled=True)
    seconds = {(BASELINE, eager): [2.0, 4.0, 9.0], (BASELINE, compiled): [5.0, 5.0, 5.0], ("ours", eager): [1.0, 100.0, 1.0]}
    found = cpu.summary(seconds, dict.fromkeys(seconds, NOTHING))["implementations"]
    assert found[BASELINE]["best"] == ROWS * CONTEXT / 4.0
    assert found[BASELINE]["ratio"] == 1.0
    assert found["ours"]["ratio"] == 4.0
    assert found["ours"]["gflops"] == ROWS * CONTEXT * 1e6 / 1e9


def test_sides_are_of_one_size_and_learn_the_same_task() -> None:
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    ids, targets = torch.randint(0, VOCABULARY, (2, ROWS, CONTEXT))
    built = {name: build_competitor(name, ComputeMode()) for name in COMPETITORS}
    for implementation in built.values():
        assert implementation.parameters == pytest.approx(built[BASELINE].parameters, rel=0.02)
        # Untrained, every side is near the loss of a uniform guess.
        assert float(implementation.step(ids, targets, 0.0)) == pytest.approx(math.log(VOCABULARY), rel=0.15)
        losses = [float(implementation.step(ids, torch.full_like(targets, 7), 10.0)) for _ in range(3)]
        assert losses[2] < 0.5 * losses[0]
    same = built["Andromeda, same matmuls"].flops_per_token
    assert same == pytest.approx(built[BASELINE].flops_per_token, rel=0.01)


def test_the_peers_operations_are_those_that_torch_counts() -> None:
    pytest.importorskip("transformers")
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    implementation, ids = build_competitor(BASELINE, ComputeMode()), torch.zeros(1, CONTEXT, dtype=torch.long)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        implementation.step(ids, ids, 0.0)
    full = implementation.flops_per_token + 6 * 6 * 4 * 64 * 2 * (CONTEXT - 1) / 2
    assert counter.get_total_flops() / CONTEXT == pytest.approx(full, rel=0.01)


def test_time_to_the_peers_loss() -> None:
    """Ten steps, a window of one: the peer ends at 1.0 after 10 s; the other is there at its fourth step of 2 s."""
    losses = {BASELINE: [10.0 - i for i in range(10)], "ours": [9.0, 5.0, 3.0, 0.5, *[0.4] * 6]}
    seconds = {BASELINE: [1.0] * 10, "ours": [2.0] * 10}
    found = convergence.compare(losses, seconds, dict.fromkeys(losses, NOTHING))
    assert found[BASELINE]["seconds_to_baseline_loss"] == found[BASELINE]["seconds"] == 10.0
    assert found["ours"]["seconds_to_baseline_loss"] == 8.0
    assert found["ours"]["final_loss"] == pytest.approx(0.4)


def test_running_mean_and_rate() -> None:
    assert convergence.running_mean([1.0, 3.0, 5.0], 2) == [math.inf, 2.0, 4.0]
    assert [convergence.lr_schedule(100)(step) for step in (0, 19, 20)] == [1 / 20, 1.0, 1.0]
    assert convergence.lr_schedule(100)(100) == pytest.approx(0.1)


def test_the_picture_of_two_precisions() -> None:
    """Means over steps that follow each other are those of a convolution."""
    losses = [3.0, 1.0, 4.0, 1.0, 5.0, 9.0]
    assert precision_plot.smoothed(losses, 4) == pytest.approx(np.convolve(losses, np.full(4, 0.25), "valid").tolist())
    competitors = {"bf16": {"losses": losses * 6}, "fp8": {"losses": [1.01 * loss for loss in losses * 6]}}
    assert precision_plot.plot({"implementations": competitors}).startswith(b"\x89PNG")


def test_a_result_says_where_it_comes_from(tmp_path: Path) -> None:
    save(tmp_path / "made" / "x.json", record("andromeda bench x", {"speed": 3}))
    kept = json.loads((tmp_path / "made" / "x.json").read_text())
    assert kept["command"] == "andromeda bench x"
    assert kept["versions"]["torch"] == torch.__version__
    assert kept["machine"]["threads"] == torch.get_num_threads()
    assert kept["speed"] == 3


def test_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With sides of two layers less and without the peer's library."""
    ours = "Andromeda, same matmuls"
    monkeypatch.setattr(cpu, "compute_modes", lambda: [ComputeMode()])
    for module in (cpu, convergence):
        monkeypatch.setattr(module, "COMPETITORS", {BASELINE: None, ours: None})
    monkeypatch.setattr(cpu, "build_competitor", lambda name, way: NOTHING)
    monkeypatch.setattr(convergence, "build_competitor", lambda name, way: NOTHING)
    result = CliRunner().invoke(app, ["bench", "cpu", "--rounds", "2", "--out", str(tmp_path / "cpu.json")])
    assert result.exit_code == 0, result.output
    assert "1024 x 1024" in result.stdout
    assert json.loads((tmp_path / "cpu.json").read_text())["implementations"][ours]["parameters"] == 10
    (tmp_path / "a.txt").write_text("the cat sat on the mat. " * 4000)
    build([str(tmp_path / "a.txt")], tmp_path / "corpus", BuildConfig(tokenizer="bytes", split_documents_at=4000, validation_fraction=0.1))
    result = CliRunner().invoke(app, ["bench", "convergence", str(tmp_path / "corpus"), "--steps", "3", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["implementations"][BASELINE]["final_loss"] == 0.0
    assert competitors.andromeda_config(True, ComputeMode()).model.value_embedding.kind == "layered"
