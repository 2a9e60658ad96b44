"""Grids, equal budgets, and a tiny ablation from end to end: killed, resumed, refused."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from andromeda.ablate.ablation import _kept_costs
from andromeda.ablate.ablation_tables import draw, evenness
from andromeda.ablate.grid import AblationGrid, Variant, grid_from_values, split, variants_of
from andromeda.ablate.jobs import amount_of, flops_per_token, jobs_of, plan_variants, steps_for, tokens_per_step, with_budget, with_steps
from andromeda.ablate.worker import RunResult, load_result
from andromeda.ablate.worker_pool import environments
from andromeda.config.data import BuildConfig
from andromeda.config.load import load
from andromeda.data.build import build
from andromeda.utils.errors import CheckpointError, ConfigError
from tests.command import call
from tests.corpora import short_documents
from tools import clipping_table
from tools.evidence_page import met_at, page

CONFIG = """
name = "tiny"
[model]
vocab_size = 257
max_seq_len = 32
hidden_size = 16
num_layers = 2
attention = {num_heads = 2, num_kv_heads = 1, head_dim = 8}
rotary = {kind = "rope"}
[train]
steps = 20
batch_size = 2
eval_every = 10
eval_tokens = 256
compile = "off"
device = "cpu"
[train.schedule]
kind = "wsd"
warmup = 2
cooldown = 8
"""
OUTPUTS = ("results.json", "table.md", "plot.png", "plot.svg")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty short documents in bytes."""
    return short_documents(tmp_path_factory.mktemp("corpus"), 40, validation=0.2)


@pytest.fixture
def tiny(tmp_path: Path, corpus: Path) -> str:
    """A configuration of a model of a few thousand weights."""
    (tmp_path / "tiny.toml").write_text(CONFIG + f'[data]\ncorpus = "{corpus}"\n')
    return str(tmp_path / "tiny.toml")


def variants(*changes: str) -> tuple[Variant, ...]:
    return tuple(Variant(name=change, changes=(change,)) for change in changes)


def test_equal_flops_are_equal_by_the_product_of_their_parts(tiny: str) -> None:
    grid = AblationGrid(budget="flops", variant=variants("model.feedforward.mlp_ratio=8.0", "train.batch_size=4", "model.num_layers=4"))
    planned = with_budget(plan_variants(tiny, ["train.steps=2000"], grid), grid, {})
    spent = [p.config.train.steps * p.config.train.batch_size * 32 * p.flops for p in planned]
    assert spent == pytest.approx([spent[0]] * 4, rel=2e-3)
    wide, base = planned[1], planned[0]
    # 16 wide, 2 layers, 64 more inner units: two matmuls, two operations a term, three passes
    assert wide.flops - base.flops == 3 * 2 * (2 * 2 * 16 * 64)
    assert wide.config.train.steps < base.config.train.steps
    assert planned[2].config.train.steps == 1000


def test_equal_tokens_and_seconds_are_counted_in_steps(tiny: str) -> None:
    config = load(tiny, ["train.batch_size=3"])
    assert tokens_per_step(config) == 96
    assert steps_for("tokens", 9600, config) == 100
    assert steps_for("seconds", 12.0, config, 0.05) == 240
    assert amount_of("flops", config) == 20 * 96 * flops_per_token(config)
    with pytest.raises(ConfigError, match="less than one step"):
        steps_for("tokens", 10, config)
    with pytest.raises(ConfigError, match="--timing-steps"):
        steps_for("seconds", 10, config)


def test_a_growing_window_counts_as_it_grows(tiny: str) -> None:
    flat = flops_per_token(load(tiny, ["model.attention.sliding_window=16"]))
    grows = load(tiny, ["model.attention.sliding_window=16", "train.window.start=1", "train.window.end=16", "train.window.step=1"])
    narrow = flops_per_token(load(tiny, ["model.attention.sliding_window=1"]))
    assert narrow < flops_per_token(grows) < flat


def test_a_schedule_keeps_its_shape_at_any_length(tiny: str) -> None:
    longer = with_steps(load(tiny, ["train.optim.momentum_warmup=10"]), 50).train
    assert (longer.steps, longer.schedule.warmup, longer.schedule.cooldown, longer.optim.momentum_warmup) == (50, 5, 20, 25)
    assert with_steps(load(tiny), 1).train.schedule.cooldown <= 1


def test_variants_start_from_variants_and_budget_shares_shorten_runs(tiny: str, tmp_path: Path) -> None:
    grid = AblationGrid(
        variant=(
            Variant(name="adam", changes=("train.optim.kind=adamw", "train.optim.lr=0.01")),
            Variant(name="clipped", changes=("train.clip.limit=0.5",), compared_with="adam"),
            Variant(name="half", changes=("model.block.kind=parallel",), budget_share=0.5),
            Variant(name="cost alone", changes=("model.attention.backend=eager",), train=False),
        ),
        seeds=(3, 5),
    )
    planned = with_budget(plan_variants(tiny, [], grid), grid, {})
    by_name = {plan.variant.name: plan.config for plan in planned}
    assert (by_name["clipped"].train.optim.lr, by_name["clipped"].train.clip.limit) == (0.01, 0.5)
    assert by_name["half"].train.steps == 10
    jobs = jobs_of(planned, grid.seeds, tmp_path)
    assert [(job.variant, job.seed) for job in jobs] == [
        (variant, seed) for variant in ("baseline", "adam", "clipped", "half") for seed in (3, 5)
    ]
    assert {job.config.seed for job in jobs} == {3, 5}
    assert len({job.folder for job in jobs}) == len(jobs)


def test_the_plot_names_what_a_variant_is_compared_with(tmp_path: Path) -> None:
    rows = [row("baseline", [3.0, 3.0], **NO_EFFECT), row("lerp", [2.5, 2.5]), row("folded", [2.4, 2.4], compared_with="lerp")]
    draw({"variants": rows, "metric": "loss", "budget": "tokens", "seeds": [0, 1]}, tmp_path)
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", (tmp_path / "plot.svg").read_text())
    assert [text for text in texts if "lerp" in text] == ["lerp", "folded (compared with lerp)"]
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_values_are_divided_at_commas_outside_brackets() -> None:
    assert split("1,2.5, x") == ["1", "2.5", "x"]
    assert split("[0.8, 0.9],[0.9,0.95]") == ["[0.8, 0.9]", "[0.9,0.95]"]
    assert [variant.changes for variant in variants_of(["model.num_layers=1,2"])] == [("model.num_layers=1",), ("model.num_layers=2",)]


def test_slots_are_one_for_the_cpu_unless_more_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert len(environments("cpu", 1)) == 1
    assert [slot["OMP_NUM_THREADS"] for slot in environments("cpu", 2)] == ["3", "3"]


def table(out: Path) -> list[Any]:
    """What must not depend on how often an ablation was interrupted."""
    rows = json.loads((out / "results.json").read_text())["variants"]
    runs = [{seed: (run["loss"], run["steps"], run["tokens"], run["curve"]) for seed, run in row["runs"].items()} for row in rows]
    return [[row["name"], row["mean"], row["effect"], row["corrected_p"], row["verdict"]] for row in rows] + runs


STUDY = ["--vary", "model.block.kind=parallel", "--seeds", "2", "--timing-steps", "0"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """An ablation that was not interrupted."""
    place = tmp_path_factory.mktemp("whole")
    (place / "tiny.toml").write_text(CONFIG + f'[data]\ncorpus = "{corpus}"\n')
    assert call("ablate", str(place / "tiny.toml"), *STUDY, "--out", str(place / "out")) == 0
    return place / "out"


@pytest.mark.parametrize(
    ("number", "code"),
    [pytest.param(signal.SIGTERM, 128 + signal.SIGTERM, marks=pytest.mark.slow), (signal.SIGKILL, -signal.SIGKILL)],
)
def test_a_killed_and_resumed_ablation_gives_the_same_table(number: int, code: int, whole: Path, tiny: str, tmp_path: Path) -> None:
    asked, out = [tiny, *STUDY], tmp_path / "cut"
    process = subprocess.Popen(
        [sys.executable, "-m", "andromeda.cli.main", "ablate", *asked, "--out", str(out)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    until = time.monotonic() + 120
    while not list(out.glob("*/result.json")) and time.monotonic() < until:
        time.sleep(0.02)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    assert process.wait(120) == code
    assert psutil.wait_procs(workers, 60)[1] == []
    first = {path: path.stat().st_mtime_ns for path in out.glob("*/result.json")}
    assert 0 < len(first) < 4
    assert call("ablate", *asked, "--out", str(out)) == 0
    assert all(path.stat().st_mtime_ns == made for path, made in first.items())
    assert table(out) == table(whole)
    for name in OUTPUTS:
        assert (out / name).stat().st_size > 0
    assert load(str(out / "baseline-s1")).seed == 1


def test_costs_and_json(tiny: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    assert (
        call(
            "ablate",
            tiny,
            "--vary",
            "model.num_layers=4",
            "--seeds",
            "1",
            "--timing-steps",
            "2",
            "--out",
            out,
            "--drop-checkpoints",
            "--json",
        )
        == 0
    )
    results = json.loads(capfd.readouterr().out)
    base, deep = results["variants"]
    assert deep["verdict"] == "one seed: no verdict"
    assert deep["time_ratio"] == pytest.approx(deep["cost"]["step_seconds"] / base["cost"]["step_seconds"])  # batches are equal
    assert deep["memory_ratio"] == pytest.approx(deep["cost"]["peak_bytes"] / base["cost"]["peak_bytes"])
    assert (base["time_ratio"], base["cost"]["tokens"]) == (None, 64)
    assert deep["size_ratio"] == deep["parameters"] / base["parameters"] > 1
    assert deep["parameters"] > base["parameters"]
    assert not (tmp_path / "out" / "baseline-s0" / "checkpoints").exists()
    assert page([results], "").count("| num_layers=4 | baseline |") == 1


def test_a_run_that_diverges_is_no_matter_of_means(tiny: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    wild = ["--vary", "train.optim.lr=1e18", "train.spike_guard.enabled=false", "train.clip.kind=none"]
    assert call("ablate", tiny, *wild, "--seeds", "2", "--timing-steps", "0", "--out", str(out)) == 0
    variant = json.loads((out / "results.json").read_text())["variants"][1]
    assert (variant["verdict"], variant["effect"], variant["mean"]) == ("diverges: 2 of 2 runs", None, None)


REFUSED = [
    ([], "nothing to compare"),
    (["--vary", "model.block.kind"], "write key.path=value,value"),
    (["--vary", "model.block.kind=sideways"], "Variant 'block.kind=sideways' is refused: model.block.kind must be one of"),
    (["--vary", "model.attention.num_kv_heads=3"], "is not a multiple"),
    (["--vary", "train.batch_size=2"], "is the same run as 'baseline'"),
    (["--vary", "model.num_layers=1,1"], "Two variants"),
    (["--vary", "model.num_layers=1", "--budget", "money"], "budget must be one of tokens, flops, seconds"),
    (["--vary", "model.num_layers=1", "--budget", "seconds"], "--budget-amount"),
    (["--vary", "model.num_layers=1", "--grid", "missing.toml"], "cannot be read"),
    (["--vary", "model.num_layers=1", "data.corpus="], "data.corpus is empty"),
    (["--vary", "model.num_layers=1", "data.corpus=nowhere"], "There is no corpus at nowhere"),
    (["--vary", "model.vocab_size=100"], "Variant 'vocab_size=100' is refused: The corpus has 257 tokens"),
    (["--vary", "train.steps=10"], "sets train.steps, which is decided by the budget"),
    (["--vary", "seed=5"], "sets seed, which is decided by the grid's seeds"),
    (["--vary", "model.num_layers=1", "--seeds", "0"], "--seeds"),
]


@pytest.mark.parametrize(("arguments", "said"), REFUSED, ids=[said for _, said in REFUSED])
def test_wrong_inputs_are_one_sentence_and_nothing_runs(
    arguments: list[str], said: str, tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("ablate", tiny, *arguments, "--out", str(tmp_path / "out")) == 2
    printed = capsys.readouterr()
    assert said in printed.err
    assert printed.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"variants": []}, "there is no key variants"),
        ({"arm": [{"name": "x"}]}, "arm is now called variant"),
        ({"variant": [{"name": "x", "on": "baseline"}]}, "on is now called compared_with"),
        ({"variant": [{"name": "x", "share": 2.0}]}, "share is now called budget_share"),
        ({"spread": "own"}, "spread is now called variance"),
        ({"variant": [{"nam": "x"}]}, "nam"),
        ({"variant": [{"name": "x", "compared_with": "y"}]}, "no variant above it"),
        ({"variant": [{"name": "baseline"}]}, "Two variants"),
        ({"variant": [{"name": "x"}], "seeds": [1, 1]}, "different whole numbers"),
        ({"variant": [{"name": "x"}], "seeds": []}, "one at least"),
        ({"variant": [{"name": " "}]}, "needs a name"),
        ({"variant": [{"name": "x"}], "budget": "seconds", "amount": 9, "cost": ["train.batch_size=64"]}, "leave cost out"),
    ],
)
def test_wrong_grids_are_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        grid_from_values(values)


def test_another_ablation_in_the_same_folder_is_refused(tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out" / "baseline-s0").mkdir(parents=True)
    (tmp_path / "out" / "baseline-s0" / "config.toml").write_text(Path(tiny).read_text())
    assert call("ablate", tiny, "model.hidden_size=32", "--vary", "model.num_layers=1", "--out", str(tmp_path / "out")) == 2
    assert "holds another run" in capsys.readouterr().err


def test_runs_of_other_data_are_not_mixed(tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["ablate", tiny, "train.steps=2", "train.schedule.cooldown=0", "train.schedule.warmup=0", "--vary", "model.num_layers=1"]
    asked += ["--seeds", "1", "--timing-steps", "0", "--drop-checkpoints", "--out", str(tmp_path / "out")]
    assert call(*asked) == 0
    other = BuildConfig(tokenizer="bytes", include=(".py",), max_bytes=20_000, validation_fraction=0.2)
    build([str(Path(__file__).parents[1] / "optim")], tmp_path / "other", other)
    assert call(*asked, f"data.corpus={tmp_path / 'other'}") == 2
    assert "was trained on other data" in capsys.readouterr().err
    # The same corpus elsewhere is the same ablation.
    shutil.copytree(load(tiny).data.corpus, tmp_path / "moved")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*/result.json")}
    assert call(*asked, f"data.corpus={tmp_path / 'moved'}") == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*/result.json")} == before


def row(name: str, losses: list[float | None], **others: Any) -> dict[str, Any]:
    """A variant of results.json whose runs fall on straight lines from 5.0 at step 0 to `losses` at step 10."""
    runs = {}
    for seed, loss in enumerate(losses):
        curve = [[step, None if loss is None else 5 + (loss - 5) * step / 10] for step in (0, 5, 10)]
        runs[str(seed)] = {"loss": loss, "curve": curve, "tokens": 1000}
    finite = [loss for loss in losses if loss is not None]
    return {
        **{
            "name": name,
            "compared_with": "baseline",
            "label": "A6",
            "budget_share": 1.0,
            "train": True,
            "steps": 10,
            "parameters": 1_500_000,
        },
        **{"mean": sum(finite) / len(finite) if finite else None, "deviation": 0.1, "spent": 100.0, "runs": runs},
        **{"effect": {"mean": -0.5, "low": -0.6, "high": -0.4, "spread": 0.1, "p": 0.01}, "corrected_p": 0.02, "verdict": "better"},
        **{"cost": None, "time_ratio": None, "memory_ratio": None, "size_ratio": 1.0},
        **others,
    }


NO_EFFECT = {"effect": None, "corrected_p": None, "verdict": ""}
RATES = [("1e-3", [3.0, 3.0], [3.0, 3.0]), ("1e-2", [2.0, 4.0], [1.0, 2.0]), ("1e-1", [2.0, None], [2.5, 2.5])]


def test_clipping_is_judged_at_each_sides_own_best_rate() -> None:
    pairs = [(row(f"AdamW {rate}", plain), row(f"AdamW {rate}, clipped", clipped)) for rate, plain, clipped in RATES]
    # Clipped, 1e-2 falls from 5 to 1.5 in ten steps, which passes 3.0 at 4/7 of them.
    assert clipping_table.reached(pairs[1][1], 3.0) == pytest.approx(40 / 7)
    assert clipping_table.reached(pairs[1][1], 1.4) is None
    said = clipping_table.best(pairs)
    assert said.startswith(
        "Without clipping, the best learning rate is 1e-3 (the lowest tried) with 3.0000 (2), and all runs stay finite up to 1e-2"
    )
    assert "clipped, the best learning rate is 1e-2 with 1.5000 (2), and all runs stay finite up to 1e-1 (the highest tried)" in said
    assert said.endswith("The best clipped runs reach the best loss without clipping after 6 of 10 steps.")
    base = row("baseline", [3.0, 3.0], label="", **NO_EFFECT)
    scrambled = [base, *(one for pair in (*pairs[1:], pairs[0]) for one in pair)]
    body = [line for line in clipping_table.section({"variants": scrambled}) if line.startswith("| 1e")]
    assert said in clipping_table.section({"variants": scrambled})
    assert [line.split(" | ")[-1] for line in body] == ["10 of 10 |", "6 of 10 |", "not reached |"]
    assert "1 diverged" in body[2]
    assert list(clipping_table.section({"variants": [base]})) == []


def test_a_page_tells_what_was_not_run() -> None:
    results = {
        "variants": [
            row("baseline", [3.0, 3.1], label="", **NO_EFFECT),
            row("SwiGLU", [2.5, 2.6], label="Llama-style model"),
            row("value embeddings", [], label="A16", **NO_EFFECT),
        ],
        **{"metric": "loss", "seeds": [0, 1], "budget": "tokens", "variance": "own", "command": "andromeda ablate", "date": "a day"},
        **{"machine": {"gpu": None, "cpu": "a CPU"}, "versions": {"torch": "2"}},
    }
    text = page([results], "What this is.")
    assert "| Llama-style model | measured |" in text
    assert "| Value embeddings | – |" in text  # noqa: RUF001
    assert "Variants of the grids without a run in these results: 1.5 M: value embeddings." in text
    assert "| value embeddings |" not in text
    assert '"better" and "worse" hold at 5 % for all 1 comparisons' in text


def test_budgets_that_whole_steps_cannot_make_equal_are_told() -> None:
    variants = [row("baseline", [3.0]), row("x", [3.0], spent=101.0), row("half", [3.0], spent=50.0, budget_share=0.5)]
    assert evenness({"variants": variants}) == " (to 1 %, because steps are whole)"
    assert evenness({"variants": variants[::2]}) == ""


def test_steps_to_equal_loss_lie_on_the_line_between_two_shares() -> None:
    rows = [{"budget_share": share, "mean": loss} for share, loss in ((0.5, 3.0), (1.0, 2.0))]
    assert met_at(rows, 2.5) == "71 % of them"  # the geometric middle of one half and one
    assert met_at(rows, 3.5) == "less than 50 % of them"
    assert met_at(rows, 1.0) == "none of these shares"


def test_an_outcome_without_a_figure_has_diverged() -> None:
    assert RunResult(None, None, 1, 1, 1.0, []).diverged
    assert not RunResult(2.0, None, 1, 1, 1.0, []).diverged


@pytest.mark.parametrize("content", ["{", "[]", '{"baseline": {}}', '{"baseline": {"of": "x", "step_seconds": 1}}', '{"baseline": 3}'])
def test_damaged_costs_are_one_sentence(tmp_path: Path, content: str) -> None:
    (tmp_path / "costs.json").write_text(content)
    with pytest.raises(ConfigError, match=r"costs\.json is damaged: remove it"):
        _kept_costs(tmp_path / "costs.json")
    assert _kept_costs(tmp_path / "none.json") == {}


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"curve": [1]}', '{"curve": []}'])
def test_a_damaged_outcome_is_one_sentence(tmp_path: Path, content: str) -> None:
    (tmp_path / "result.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"result\.json is damaged: remove it"):
        load_result(tmp_path)
