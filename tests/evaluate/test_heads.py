"""Figures of heads against scikit-learn and SciPy, and `andromeda eval RUN heads` against an independent reading of the corpus."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from andromeda.config.load import from_values
from andromeda.data.loader import open_stream
from andromeda.evaluate import head_metrics
from andromeda.evaluate.evaluator import run_evaluations
from andromeda.evaluate.loaded_model import load_model
from andromeda.evaluate.request import EvalOptions
from andromeda.evaluate.result import load_result
from andromeda.evaluate.result_tables import table
from andromeda.hub.export_folder import export_run
from andromeda.report.build_report import build_report
from andromeda.train.trainer import train
from andromeda.utils.errors import RequestError
from tests.labeled_corpora import labeled_corpus, labeled_rows

DRAW = np.random.default_rng(0)


def test_classification_is_scikit_learns() -> None:
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
    logits = DRAW.normal(size=(200, 4))
    p, truth = np.exp(logits) / np.exp(logits).sum(1, keepdims=True), DRAW.integers(0, 3, 200)
    found = head_metrics.classification(p, truth)
    assert found["accuracy"] == pytest.approx(metrics.accuracy_score(truth, p.argmax(1)), abs=1e-12)
    assert found["f1"] == pytest.approx(metrics.f1_score(truth, p.argmax(1), average="macro", zero_division=0), abs=1e-12)


def test_labels_are_scikit_learns_where_they_are_known() -> None:
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
    p, truth = DRAW.random((100, 3)), DRAW.integers(0, 2, (100, 3)).astype(np.uint8)
    found = head_metrics.multi_label(p, truth)
    assert found["f1"] == pytest.approx(metrics.f1_score(truth, p > 0.5, average="macro"), abs=1e-12)
    hidden = np.where(DRAW.random((100, 3)) < 0.3, 255, truth).astype(np.uint8)
    known = hidden != 255
    assert head_metrics.multi_label(p, hidden)["accuracy"] == pytest.approx(((p > 0.5) == truth)[known].mean(), abs=1e-12)


def test_correlations_are_scipys_with_ties() -> None:
    stats = pytest.importorskip("scipy.stats", reason="scipy comes with scikit-learn")
    one, other = DRAW.integers(0, 6, 80).astype(float), DRAW.normal(size=80)
    found = head_metrics.regression(one, other + one)
    assert found["pearson"] == pytest.approx(stats.pearsonr(one, other + one)[0], abs=1e-12)
    assert found["spearman"] == pytest.approx(stats.spearmanr(one, other + one)[0], abs=1e-12)
    assert head_metrics.regression(np.ones(5), np.arange(5.0))["pearson"] == 0.0


def test_calibration_error_is_its_definition() -> None:
    """Sum over 15 bins of their share times |accuracy - mean confidence|; zero where confidence is accuracy."""
    confidence, right = DRAW.random(500), DRAW.random(500) < 0.5
    expected = 0.0
    for i in range(15):
        inside = (confidence > i / 15) & (confidence <= (i + 1) / 15)
        if inside.any():
            expected += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert head_metrics.calibration_error(confidence, right) == pytest.approx(expected, abs=1e-12)
    assert head_metrics.calibration_error(np.full(4, 0.75), np.array([1, 1, 1, 0], dtype=bool)) == pytest.approx(0.0, abs=1e-12)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a head of every kind, trained for a few steps."""
    folder = tmp_path_factory.mktemp("heads")
    corpus = labeled_corpus(folder, labeled_rows(120, pairs=20))
    kinds = {"score": {"kind": "regression", "learn_scale": True}, "ahead": {"kind": "multi_token"}}
    heads: dict[str, dict[str, Any]] = {name: {} for name in ("topic", "tags", "moods", "better")} | kinds
    model = {"num_layers": 1, "hidden_size": 32, "max_seq_len": 64, "vocab_size": 257, "task_heads": heads}
    model |= {"attention": {"num_heads": 2, "num_kv_heads": 2, "head_dim": 16}, "rotary": {"kind": "rope"}}
    optim = {"kind": "adamw", "lr": 1e-2}
    settings = {"steps": 40, "batch_size": 4, "precision": "fp32", "compile": "off", "device": "cpu", "eval_every": 40, "optim": optim}
    config = from_values({"model": model, "data": {"corpus": str(corpus), "packing": "documents"}, "train": settings})
    torch.set_num_threads(1)
    train(config, folder / "run")
    return folder / "run"


def evaluate(run: Path, **options: Any) -> dict[str, dict[str, float]]:
    (result,) = run_evaluations(load_model(run, device="cpu"), ["heads"], EvalOptions(**options), lambda *_: None, print)
    result.save(run)
    return load_result(run / "evaluations" / "heads.json").result


def test_every_head_is_measured_on_the_held_out_documents(run: Path) -> None:
    """Accuracy of classes and correlation of numbers, read from the model and the records' own words."""
    found, loaded = evaluate(run), load_model(run, device="cpu")
    assert list(found) == ["topic", "tags", "moods", "better", "score", "ahead"]
    stream = open_stream(loaded.config.data, 64, 0, "val")
    assert stream.num_sequences is not None
    topic, score = [], []
    for i in range(stream.num_sequences):
        batch = stream.batch(i, 1)
        with torch.no_grad():
            hidden = loaded.model.hidden(batch.ids, documents=batch.documents)
            topics, scores = (loaded.model.task_heads[name](hidden)[0] for name in ("topic", "score"))
        for place in (batch.head_targets["topic"][0] != -100).nonzero()[:, 0].tolist():
            document = batch.documents[0] == batch.documents[0, place]
            text = bytes(batch.ids[0, document][1:].tolist()).decode()
            topic.append(int(topics[place].argmax()) == ("cat" in text))
        for place in (~batch.head_targets["score"][0].isnan()).nonzero()[:, 0].tolist():
            score.append((float(scores[place, 0]), float(batch.head_targets["score"][0, place])))
    assert found["topic"]["accuracy"] == pytest.approx(np.mean(topic), abs=1e-12)
    assert found["topic"]["targets"] == len(topic)
    assert found["score"]["pearson"] == pytest.approx(np.corrcoef(*zip(*score, strict=True))[0, 1], abs=1e-5)
    assert 0 < found["score"]["coverage_90"] <= 1
    assert found["tags"]["accuracy"] > 0.5


def test_heads_are_in_the_table_the_report_and_the_default_tasks(run: Path) -> None:
    evaluate(run)
    result = load_result(run / "evaluations" / "heads.json")
    columns, rows = table(result)[1:3]
    assert columns == ["head", "metric", "value"]
    assert ["topic", "accuracy", f"{result.result['topic']['accuracy']:.4f}"] in rows
    page = build_report(run)
    assert "Loss of score" in page
    assert "calibration error" in page


def test_an_export_is_the_language_model_and_its_heads_lie_beside_it(run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """By the formula that docs/heads.md gives, the file's weights are the head's outputs."""
    export_run(run, tmp_path / "exported")
    assert "of its heads topic, tags, moods, better, score, ahead" in caplog.text
    weights, model = load_file(tmp_path / "exported" / "task_heads.safetensors"), load_model(run, device="cpu").model
    assert not any("task_heads" in name for name in load_file(tmp_path / "exported" / "model.safetensors"))
    assert "task_heads" not in json.loads((tmp_path / "exported" / "config.json").read_text())
    x = torch.randn(3, 32)
    with torch.no_grad():
        torch.testing.assert_close(x @ weights["topic.weight"].T + weights["topic.bias"], model.task_heads["topic"](x))


def test_a_run_without_heads_says_so(run: Path) -> None:
    loaded = load_model(run, device="cpu")
    plain = loaded.config.model_copy(update={"model": loaded.config.model.model_copy(update={"task_heads": {}})})
    with pytest.raises(RequestError, match="has no heads besides the language model's"):
        list(run_evaluations(type(loaded)(**{**vars(loaded), "config": plain}), ["heads"], EvalOptions(), lambda *_: None, print))
