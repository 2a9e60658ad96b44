"""`andromeda report`: every section for every run, whatever is missing or broken, and a page that needs nothing else."""

from __future__ import annotations

import html
import json
import math
import re
import shutil
import zlib
from pathlib import Path

import pytest

from andromeda import demo as demo
from andromeda.config.data import BuildConfig
from andromeda.config.load import from_values
from andromeda.data.build import build
from andromeda.evaluate.loaded_model import load_model
from andromeda.evaluate.result import EvalResult
from andromeda.report import build_report, write_report
from andromeda.report.run_data import read_run
from andromeda.train.metrics import read_metrics
from andromeda.train.trainer import train
from andromeda.utils.errors import AndromedaError
from tests.command import call
from tests.html_pages import browse, parse

SECTIONS = ["curves", "probes", "evaluation", "position", "retrieval", "samples", "size", "manifest", "card"]
EVIL = "</script><script>window.ran = 1</script><img src=x onerror='window.ran=2'>&\"'\x1b[2J\ud800"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few steps with probes and health."""
    place = tmp_path_factory.mktemp("report")
    texts = place / "texts"
    texts.mkdir()
    for i in range(40):
        (texts / f"{i}.txt").write_text(f"the {i}th text of a small corpus, not like the {i + 1}th\n" * 6)
    build([str(texts)], place / "corpus", BuildConfig(tokenizer="bytes", validation_fraction=0.2))
    config = from_values(
        {
            "name": "small <b>run</b>",
            "model": {
                "vocab_size": 257,
                "max_seq_len": 384,
                "hidden_size": 16,
                "num_layers": 2,
                "attention": {"num_heads": 2, "num_kv_heads": 1, "head_dim": 8},
                "rotary": {"kind": "rope"},
            },
            "data": {"corpus": str(place / "corpus")},
            "train": {
                "steps": 6,
                "seq_len": 128,
                "batch_size": 2,
                "device": "cpu",
                "precision": "fp32",
                "compile": "off",
                "eval_every": 2,
                "eval_tokens": 256,
                "log": {"every": 1, "diagnostics_every": 2},
                "probes": {"every": 2, "samples": 4, "tasks": ["recall", "induction"]},
            },
        }
    )
    train(config, place / "run")
    return place / "run"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def fill(run: Path) -> None:
    """A result of every kind, in the contract's shape, and samples."""
    shapes: dict[str, dict] = {
        "bits": {"bits_per_byte": 1.25, "loss": 2.5, "tokens": 1000, "bytes": 2885},
        "position": {"edges": [1, 2, 4, 8], "nats": [5.0, 4.0, 3.5], "tokens": [10, 20, 40]},
        "context": {"context": [32, 64], "nats": [3.0, 2.5], "error": [0.1, 0.05], "tokens": 64},
        "retrieval": {
            "task": "needles",
            "lengths": [64, 128],
            "depths": [0.0, 0.5, 1.0],
            "accuracy": [[0.1, 0.2, 0.3], [0.4, 0.5, None]],
            "match": [[0.1, 0.2, 0.3], [0.4, 0.5, None]],
            "chance": 0.1,
            "samples": 8,
        },
        "reasoning": {"recall": {"in": 0.5, "out": 0.25, "chance": 0.125, "chance_out": 0.1}},
        "fewshot": {"accuracy": 0.5, "normalized": 0.25, "chance": 0.25, "questions": 100, "shots": 2},
        "gsm8k": {"exact_match": 0.01, "answered": 0.5, "questions": 100, "shots": 4},
        "harness": {"arc": {"acc": 0.3, "alias": EVIL[:20]}},
    }
    for kind, result in shapes.items():
        EvalResult(kind, kind, 6, "0" * 64, None, {}, result, command=f"andromeda eval run {kind}").save(run)
    lines = [{"prompt": EVIL[:-1], "text": EVIL[:-1], "temperature": 0.7}, {"prompt": [1, 2], "text": "plain"}]
    (run / "samples" / "mine.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\n{broken\n")
    (run / "samples" / "a.txt").write_bytes(b"bytes \xff\x00 that are no text <i>")


def test_all_sections_of_a_full_run(run: Path) -> None:
    fill(run)
    text = build_report(run)
    assert [i for i in parse(text).ids if i in SECTIONS] == SECTIONS
    for shown in (
        "1.250",
        "needles",
        "2,885",
        "it needs 1.250 bits for a byte",
        "One fact, and the whole text is other facts.",
        "50 %",
        "12 %",
        "andromeda eval run gsm8k",
        "temperature 0.7",
        "no text &lt;i&gt;",
        "small &lt;b&gt;run",
    ):
        assert shown in text
    assert 'class="empty"' not in text


def test_all_sections_of_an_empty_run(run: Path) -> None:
    """Nothing but the configuration: each section says which command fills it."""
    for path in run.iterdir():
        if path.name != "config.toml":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    text = build_report(run)
    assert [i for i in parse(text).ids if i in SECTIONS] == SECTIONS
    for command in ("andromeda train --out", "train.probes.every", "eval", "position", "retrieval", "andromeda generate"):
        assert command in text
    assert text.count('class="empty"') >= 6


def chart_of(text: str, title: str) -> dict:
    """What the first drawing of a figure tells the script: its scales, and its points."""
    figure = text.split(f"<b>{title}</b>", 1)[1].split("</figure>", 1)[0]
    return json.loads(html.unescape(re.findall(r'data-chart="([^"]*)"', figure)[0]))


def context_result(run: Path, **result: object) -> str:
    values = {"context": [32, 64], "nats": [3.0, 2.9], "error": [0.5, 0.5], "tokens": 64, **result}
    EvalResult("context", "context", 6, "0" * 64, None, {}, values).save(run)
    return build_report(run)


def test_the_gain_from_context_is_that_of_the_same_targets(run: Path) -> None:
    """Losses of 3.0 and 2.9, each known to 0.5, differ by 0.1 for sure where all targets gain nearly alike."""
    text = context_result(run, gain=[0.0, 0.1], gain_error=[0.0, 0.025])
    assert "it is 0.100 nats lower, 4.0 standard errors" in text
    assert chart_of(text, "Gain from context")["series"][0]["points"] == [[32, 0], [64, 0.1]]


def test_a_gain_is_computed_from_the_windows_where_they_are_kept(run: Path) -> None:
    """As `andromeda extend` keeps them: differences 0.2, 0.1, 0.0 have the mean 0.1 and the standard error 0.1 / sqrt(3)."""
    text = context_result(run, windows=[[5.0, 3.0, 1.0], [4.8, 2.9, 1.0]])
    assert "it is 0.100 nats lower, 1.7 standard errors" in text
    assert chart_of(context_result(run), "Loss by the context given")["series"][0]["points"] == [[32, 3], [64, 2.9]]


def test_a_retrieval_is_shaded_from_guessing(run: Path) -> None:
    """Of 0.1 by guessing, 0.1 has no color and 0.55 half of it."""
    grid = {"task": "needles", "lengths": [64, 128], "depths": [0.5], "accuracy": [[0.1], [0.55]], "chance": 0.1, "samples": 8}
    EvalResult("retrieval", "retrieval", 6, "0" * 64, None, {}, grid).save(run)
    cells = re.findall(r'--s:([0-9.]+)" data-tip="50 %, (64|128)', build_report(run))
    assert cells == [("0.000", "64"), ("0.500", "128")]


def test_curves_over_steps_tokens_and_time(run: Path) -> None:
    """Two sequences of 128 tokens a step; a step without a line is between its neighbors."""
    lines = [{"step": s, "loss": 5.0 - s, "tokens": 256 * s, "seconds": 7.0 * s} for s in (1, 2, 4)] + [{"step": 3, "validation/loss": 1.5}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = build_report(run)
    assert [value for tag, value in parse(text).tags if tag == "input" and value["name"] == "over"]
    for axis, places in (("step", [1, 2, 4]), ("tokens", [256, 512, 1024]), ("time", [7, 14, 28])):
        chart = chart_of(text.split(f'class="over over-{axis}"', 1)[1], "Loss")
        assert [[x, y] for x, y in chart["series"][0]["points"]] == [[x, y] for x, y in zip(places, (4, 3, 1), strict=True)]
        assert chart["series"][1]["points"] == [[(places[1] + places[2]) / 2, 1.5]]


@pytest.mark.parametrize("steps", [6, 600])
def test_only_a_run_that_goes_on_is_told_to_resume(run: Path, steps: int) -> None:
    """Resuming a finished run would do nothing."""
    config = run / "config.toml"
    config.write_text(re.sub(r"(?m)^steps = 6$", f"steps = {steps}", config.read_text()))
    for name in ("metrics.jsonl", "samples/mine.jsonl"):
        (run / name).unlink(missing_ok=True)
    text = build_report(run)
    assert ("--resume" in text.split('<section id="probes">')[0]) == (steps == 600)
    (run / "metrics.jsonl").write_text('{"step": 6, "loss": 1.0}\n')
    probes = build_report(run).split('<section id="probes">')[1].split("</section>")[0]
    assert ("--resume train.probes.every" in probes) == (steps == 600)
    assert ("andromeda eval" in probes) == (steps == 6)


def test_samples_of_training_are_grouped_by_step(run: Path) -> None:
    lines = [{"step": step, "prompt": f"p{k}", "text": f"written at {step}"} for step in range(10, 1010, 10) for k in range(2)]
    (run / "samples" / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = read_run(run).samples
    assert [s.step for s in found[:2]] == [1000, 1000]
    assert len(found) <= 24
    assert found[-1].step == 10
    section = build_report(run).split('<section id="samples">')[1].split("</section>")[0]
    assert section.index("written at 1000") < section.index("<details><summary>Step ") < section.index("written at 10<")


def test_what_a_run_says_is_never_markup(run: Path) -> None:
    fill(run)
    text = build_report(run)
    assert "<script>window.ran" not in text
    assert "<img" not in text
    assert "\x1b" not in text
    assert "<b>run</b>" not in text


def test_a_broken_result_takes_no_other_with_it(run: Path) -> None:
    fill(run)
    (run / "evaluations" / "gsm8k.json").write_text("{")
    text = build_report(run)
    assert "gsm8k.json is no result of an evaluation" in text
    assert "it needs 1.250 bits for a byte" in text


def test_a_task_that_is_everywhere_has_no_depth(run: Path) -> None:
    shape = {"task": "common", "lengths": [64], "depths": [0.5], "everywhere": True, "accuracy": [[0.5]], "chance": 0.35, "samples": 8}
    EvalResult("retrieval", "retrieval-common", 6, "0" * 64, None, {}, shape, command="x").save(run)
    text = build_report(run)
    assert ">anywhere</th>" in text
    assert "The five words that come most often. Shaded from guessing: 35\u00a0%; 8 problems per cell." in text


def test_a_run_that_is_going_on(run: Path) -> None:
    """A line that is being written, and one of junk, are left out and told."""
    path = run / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[: len(lines) // 2]) + b"\xff\x00junk\n" + lines[-1][:15])
    metrics = read_metrics(path)
    assert metrics.num_unreadable == 2
    assert len(metrics.records) == len(lines) // 2
    text = build_report(run)
    parse(text)
    assert "2 lines of metrics.jsonl cannot be read" in text
    assert f"at step {metrics.step} of 6" in text


@pytest.mark.parametrize("cut", range(0, 400, 23))
def test_metrics_cut_anywhere(run: Path, cut: int) -> None:
    path = run / "metrics.jsonl"
    whole = path.read_bytes()[:cut]
    path.write_bytes(whole)
    metrics = read_metrics(path)
    assert len(metrics.records) in (whole.count(b"\n"), whole.count(b"\n") + 1)
    parse(build_report(run))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("manifest.json", b"{"),
        ("manifest.json", b"{}"),
        ("manifest.json", b'{"starts": [3]}'),
        ("evaluations/bits.json", b"junk"),
        ("demo.json", b"[]"),
        ("metrics.jsonl", b'{"step": 1, "loss": null}\n{"step": 2, "loss": 1e999}\n[1]\n"x"\n{"step": "two"}\n'),
        ("metrics.jsonl", b'{"step": 1, "loss": 2.0}\n'),
    ],
)
def test_broken_files_leave_the_page_whole(run: Path, name: str, content: bytes) -> None:
    (run / name).parent.mkdir(exist_ok=True)
    (run / name).write_bytes(content)
    assert [i for i in parse(build_report(run)).ids if i in SECTIONS] == SECTIONS


def test_results_of_another_shape_are_told(run: Path) -> None:
    for kind in ("bits", "position", "context", "retrieval", "reasoning", "fewshot", "gsm8k", "harness", "heads"):
        EvalResult(kind, kind, 6, "0" * 64, None, {}, {"nothing": 3}, command="x").save(run)
    text = build_report(run)
    parse(text)
    assert text.count("is not of the shape that its kind has") >= 6


def test_figures_are_those_of_the_file(run: Path) -> None:
    """The chart's own data against metrics.jsonl."""
    record = read_run(run)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    charts = [json.loads(a["data-chart"] or "") for tag, a in parse(build_report(run)).tags if tag == "svg"]
    drawn = charts[0]["series"][0]
    assert drawn["name"] == "training"
    losses = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    assert len(drawn["points"]) == len(losses)
    for (step, value), (x, y) in zip(losses, drawn["points"], strict=True):
        assert x == step
        assert math.isclose(y, value, rel_tol=1e-5)
    assert record.finished


def test_a_finished_training_leaves_its_report(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(run / "checkpoints")
    (run / "config.toml").rename(run.parent / "again.toml")
    out = run.parent / "again"
    assert call("train", str(run.parent / "again.toml"), "--out", str(out)) == 0
    assert "report: " in capsys.readouterr().out
    assert [i for i in parse((out / "report.html").read_text()).ids if i in SECTIONS] == SECTIONS


@pytest.mark.parametrize(
    ("arguments", "part"),
    [(["nowhere"], "nowhere"), ([], "RUN"), (["{run}", "--out", "{run}/config.toml/x"], "--out"), (["{run}", "--bogus"], "--bogus")],
)
def test_wrong_calls(run: Path, arguments: list[str], part: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = (run / "config.toml").read_bytes()
    assert call("report", *(word.replace("{run}", str(run)) for word in arguments)) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("andromeda: ")
    assert said.endswith(".")
    assert part in said
    assert (run / "config.toml").read_bytes() == before


def test_a_broken_configuration_is_one_sentence(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "config.toml").write_text("=")
    assert call("report", str(run)) == 2
    assert "config.toml" in capsys.readouterr().err


def test_no_run_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(AndromedaError, match="not a run folder"):
        write_report(tmp_path)


def test_a_place_that_cannot_be_written_is_one_sentence(run: Path) -> None:
    with pytest.raises(AndromedaError, match="--out"):
        write_report(run, run / "config.toml" / "report.html")


def test_the_demo_fills_the_page(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples, evaluations and compressors of the demo, on a small run: written whole, found by the report."""
    monkeypatch.setattr(demo, "EVALUATIONS", {"bits": {}, "position": {"samples": 2}, "no such task": {}})
    subject, skipped, shown = load_model(run, device="cpu"), [], []
    demo.write_samples(subject.model, run, shown.append, new_tokens=8)
    found = demo.evaluate(subject, lambda *_: None, skipped.append)
    corpus = Path(subject.config.data.corpus)
    measured = demo.measure(subject, corpus, found)
    assert [result.kind for result in found] == ["bits", "position"]
    assert skipped == []
    assert measured.held_out == pytest.approx(found[0].result["bits_per_byte"])
    text = (corpus / "val.txt").read_bytes()
    assert measured.held_out_bytes == len(text)
    assert measured.zlib == pytest.approx(8 * len(zlib.compress(text, 9)) / len(text))
    record = read_run(run)
    assert [sample.prompt for sample in record.samples] == list(demo.PROMPTS)
    assert set(record.compressors) == {"xz", "zlib"}
    assert all(prompt == prompt.rstrip() for prompt in demo.PROMPTS)
    page = build_report(run)
    assert "Compared with compressors" in page
    assert "xz -9" in page


@pytest.mark.parametrize("width", [1280, 390])
def test_in_a_browser(run: Path, tmp_path: Path, width: int) -> None:
    """No error, no request, all sections, nothing wider than the page, figures under the pointer, no script of the run's."""
    fill(run)
    said = browse(write_report(run), width, tmp_path)
    assert said["errors"] == []
    assert said["console"] == []
    assert said["sections"] == SECTIONS
    assert said["loaded"] == []
    assert said["overflow"] <= 0
    assert said["width"] == width
    assert said["told"].startswith("step ")
    assert "training" in said["told"]
    assert said["ran"] is None
