"""`andromeda eval` and `andromeda verify` as a user meets them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from andromeda import Andromeda
from andromeda.evaluate.context_loss import bin_by_position, evenly_spaced, loss_by_context, loss_by_position
from andromeda.evaluate.evaluator import EVALUATIONS
from andromeda.evaluate.held_out_text import open_text
from andromeda.evaluate.loaded_model import file_sha256, load_model
from andromeda.evaluate.result import KINDS, load_results
from andromeda.evaluate.token_loss import continuation_likelihoods
from tests.command import call


def test_the_first_result_of_each_kind_has_the_hashes_of_weights_and_data(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tasks = ["bits", "position", "context", "single", "reasoning", "fewshot"]
    options = ["--samples", "2", "--lengths", "240", "--questions", "choices.jsonl", "--depths", "2", "--style", "code", "--device", "cpu"]
    capsys.readouterr()
    assert call("eval", "run", *tasks, *options, "--json") == 0
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    stored = load_results("run")
    assert [line["kind"] for line in printed] == ["bits", "position", "context", "retrieval", "reasoning", "fewshot"]
    assert {line["name"] for line in printed} == stored.keys()
    weights = place / "run/checkpoints/step-00000002/model.safetensors"
    corpus = json.loads((place / "corpus/manifest.json").read_text())["fingerprint"]
    for one in stored.values():
        assert (one.weights, one.step) == (file_sha256(weights), 2)
        assert one.machine["precision"] == "fp32"
    assert stored["bits"].data == corpus
    assert stored["fewshot-choices-0"].data == file_sha256(place / "choices.jsonl")
    grid = stored["retrieval-single-code"].result
    assert [len(row) for row in grid["accuracy"]] == [len(grid["depths"])] * len(grid["lengths"])
    assert stored["bits"].result["bytes"] == len((place / "corpus/val.txt").read_bytes())


def test_bits_of_any_file_are_those_of_its_bytes(place: Path) -> None:
    """A model whose head is zero gives every token the same probability."""
    loaded = load_model(Path("run"), device="cpu")
    torch.nn.init.zeros_(loaded.model.head.weight)
    text = open_text(loaded, "some.txt")
    evaluation = EVALUATIONS["bits"]
    settings = evaluation.read({"text": "some.txt", "context": 256, "stride": 100})
    found = evaluation.measure(loaded, settings, lambda *_: None)
    size = len((place / "some.txt").read_bytes())
    assert found.result["bytes"] == found.result["tokens"] == size == len(text.ids) - 1
    assert found.result["bits_per_byte"] == pytest.approx(math.log2(257), rel=1e-6)
    assert found.data == file_sha256(Path("some.txt"))


@torch.no_grad()
def test_losses_by_position_and_by_context_are_those_of_single_windows(place: Path) -> None:
    loaded = load_model(Path("run"), device="cpu", dtype="fp64")
    text, model = open_text(loaded, "some.txt"), loaded.model

    def nats(ids: torch.Tensor) -> torch.Tensor:
        return -model(ids[None, :-1])[0].log_softmax(-1).gather(1, ids[1:, None])[:, 0]

    curve = loss_by_position(model, text, length=30, windows=5)
    begins = evenly_spaced(list(range(0, len(text.ids) - 30, 30)), 5)
    expected = torch.stack([nats(text.ids[begin : begin + 31]) for begin in begins]).mean(0)
    torch.testing.assert_close(curve.nats, expected, rtol=1e-9, atol=1e-9)
    edges, means, counts = bin_by_position(curve)
    assert edges == [1, 2, 4, 8, 16, 31]
    assert counts == [5 * n for n in (1, 2, 4, 8, 15)]
    assert means[-1] == pytest.approx(expected[15:].mean().item(), rel=1e-9)
    found = loss_by_context(model, text, contexts=(3, 20, 64), targets=4, places=6)
    begins = evenly_spaced(list(range(64, len(text.ids) - 3, 4)), 6)
    for row, count in enumerate((3, 20, 64)):
        for column, at in enumerate(begins):
            single = nats(text.ids[at - count : at + 4])[-4:].mean()
            assert found[row, column].item() == pytest.approx(single.item(), rel=1e-9)


def test_held_out_documents_are_not_crossed(place: Path) -> None:
    """Where training had a document mask: equal to each document by itself."""
    loaded = load_model(Path("run"), device="cpu", dtype="fp64")
    evaluation, text = EVALUATIONS["bits"], open_text(loaded)
    short = [(b, e) for b, e in zip(text.starts, text.starts[1:], strict=False)][:1]
    assert text.numbers() is not None
    assert len(set(text.numbers().tolist())) == len(text.starts) - 1
    begin, end = short[0]
    ids = text.ids[begin : end + 1]
    with torch.no_grad():
        alone = -loaded.model(ids[None, :-1])[0].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        numbers = text.numbers()
        both = loaded.model(text.ids[None, : end + 50], documents=numbers[None, : end + 50])[0].log_softmax(-1)
    torch.testing.assert_close(-both[begin:end].gather(1, ids[1:, None])[:, 0], alone, rtol=1e-9, atol=1e-9)
    assert evaluation.kind == "bits"


def test_a_model_without_a_corpus_is_measured_on_a_file(place: Path) -> None:
    model = Andromeda.from_run("run", device="cpu")
    model.save("bare")
    assert call("eval", "bare", "bits", "--text", "some.txt", "--device", "cpu") == 0
    assert call("eval", "bare", "bits", "--device", "cpu") == 2


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nowhere"], "nowhere is not a run folder"),
        (["run", "bitz"], "There is no evaluation 'bitz' (did you mean bits?)"),
        (["run", "bits", "--lengths", "1k"], "--lengths must be whole numbers"),
        (["run", "bits", "--lengths", "0"], "--lengths must be whole numbers of at least 1"),
        (["run", "bits", "--lengths", "999"], "more than this model's context of 256"),
        (["run", "bits", "--stride", "300"], "--stride 300"),
        (["run", "bits", "--text", "none.txt"], "none.txt cannot be read"),
        (["run", "bits", "--text", "run"], "run is not a regular file"),
        (["run", "bits", "--text", "run/checkpoints/step-00000002/model.safetensors"], "is not text in UTF-8"),
        (["run", "bits", "--corpus", "none"], "none"),
        (["run", "position", "--text", "short.txt"], "too few for windows of 256"),
        (["run", "context", "--text", "short.txt"], "No document has"),
        (["run", "multikey", "--lengths", "64"], "too short for multikey"),
        (["run", "common", "--device", "cpu"], "256 tokens is too short for common"),
        (["run", "single", "--depths", "0"], "--depths must be a number of depths from 1"),
        (["run", "single", "--depths", "0,1.5"], "--depths must be at most 1, not 1.5"),
        (["run", "single", "--depths", "-1"], "--depths must be at least 0"),
        (["run", "single", "--depths", "0,x"], "--depths must be a number of depths, or depths from 0 to 1"),
        (["run", "single", "--lengths", "-5"], "--lengths must be whole numbers of at least 1 with commas between them, not '-5'"),
        (["run", "bits", "--out", "choices.jsonl"], "choices.jsonl/evaluations cannot be written"),
        (["run", "single", "--style", "verse"], "--style must be one of prose, code"),
        (["run", "single", "--samples", "0"], "--samples must be above 0"),
        (["run", "fewshot"], "give it with --questions"),
        (["run", "fewshot", "--questions", "none.jsonl"], "There is no file none.jsonl"),
        (["run", "fewshot", "--questions", "solved.jsonl"], "Question 1 of solved.jsonl"),
        (["run", "fewshot", "--questions", "choices.jsonl", "--num-fewshot", "7"], "leave none"),
        (["run", "gsm8k", "--questions", "choices.jsonl"], "Question 1 of choices.jsonl"),
        (["run", "harness"], "--harness-task"),
        (["run", "harness", "--harness-task", "x", "--include-path", "none"], "There is no folder none"),
        (["run", "--step", "9"], "The checkpoint of step 9"),
        (["run", "--ema"], "keeps no moving average"),
        (["run", "--dtype", "fp7"], "fp7"),
    ],
)
def test_wrong_input_is_one_sentence(place: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str) -> None:
    Path("short.txt").write_text("too short")
    capsys.readouterr()
    assert call("eval", *arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.strip().splitlines()[-1].startswith("andromeda: ")
    assert sentence in err
    assert "Traceback" not in err
    assert not (place / "run/evaluations").exists()


@pytest.mark.parametrize(
    ("given", "depths"), [("3", [0.0, 0.5, 1.0]), ("1", [0.5]), ("0.25", [0.25]), ("1,0,0.1,1", [0.0, 0.1, 1.0]), ("", 5)]
)
def test_depths_are_a_number_of_places_or_places(place: Path, given: str, depths: object) -> None:
    assert call("eval", "run", "single", "--samples", "1", "--device", "cpu", *(["--depths", given] if given else [])) == 0
    found = load_results("run")["retrieval-single"].result
    assert found["depths"] == depths or len(found["depths"]) == depths
    assert len(found["accuracy"][0]) == len(found["depths"])


def test_what_is_asked_for_twice_is_done_once_and_what_does_not_fit_is_told(
    place: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    capsys.readouterr()
    assert call("eval", "run", "retrieval", "single", "single", "--samples", "1", "--device", "cpu", "--json") == 0
    assert [json.loads(line)["name"] for line in capsys.readouterr().out.splitlines()] == ["retrieval-single"]
    (message,) = caplog.messages
    assert "256 tokens is too short for needles, multikey" in message
    assert "single" not in message


def test_what_was_measured_before_an_interruption_stays(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each result is a whole file as soon as it is known."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(EVALUATIONS["position"], "measure", interrupted)
    assert call("eval", "run", "bits", "position", "reasoning", "--samples", "1", "--device", "cpu") == 130
    assert capsys.readouterr().err.endswith("andromeda: interrupted.\n")
    assert list(load_results("run")) == ["bits"]
    assert [path.name for path in (place / "run/evaluations").iterdir()] == ["bits.json"]


@pytest.mark.parametrize(
    ("shots", "said"), [("1", ("A question with its examples has", "give a lower --num-fewshot")), ("0", ("A question has", "leave out"))]
)
def test_a_question_that_does_not_fit_names_the_fix(
    place: Path, capsys: pytest.CaptureFixture[str], shots: str, said: tuple[str, str]
) -> None:
    Path("long.jsonl").write_text("".join(json.dumps({"question": "x" * n, "answer": "#### 1"}) + "\n" for n in (100, 250)))
    assert call("eval", "run", "gsm8k", "--questions", "long.jsonl", "--num-fewshot", shots, "--device", "cpu") == 2
    message = capsys.readouterr().err
    assert all(part in message for part in said)
    assert "more than this model's context of 256" in message


def test_a_local_task_of_the_harness_runs_offline_and_is_verified(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    rows = [{"q": f"the cat {i}", "c": ["sat on", "came to", "and then"], "a": i % 3} for i in range(6)]
    (place / "tasks").mkdir()
    (place / "tasks/rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for task, file in (("animals", "rows.jsonl"), ("lost", "none.jsonl")):
        (place / f"tasks/{task}.yaml").write_text(
            f"""task: {task}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {place / "tasks" / file}}}, cache_dir: {place / "cache"}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{q}}}}"
doc_to_choice: "{{{{c}}}}"
doc_to_target: a
metric_list: [{{metric: acc}}]
"""
        )
    options = ["--include-path", "tasks", "--device", "cpu"]
    assert call("eval", "run", "harness", "--harness-task", "animals", *options) == 0
    one = load_results("run")["harness-animals"]
    # The same choices by our own likelihoods.
    loaded = load_model(Path("run"), device="cpu")
    words, right = loaded.tokenizer("the test"), 0
    for row in rows:
        pairs = [([words.eos, *words.encode(row["q"])], words.encode(f" {choice}")) for choice in row["c"]]
        logs = [found.log for found in continuation_likelihoods(loaded.model, pairs)]
        right += logs.index(max(logs)) == row["a"]
    assert one.result == {"animals": {"acc": right / len(rows)}}
    assert call("verify", "run", "--device", "cpu", "--allow-code") == 0
    capsys.readouterr()
    assert call("eval", "run", "harness", "--harness-task", "lost", *options) == 2
    assert "lost cannot be run" in capsys.readouterr().err.splitlines()[-1]


def test_every_kind_has_its_evaluation_and_its_table() -> None:
    from andromeda.evaluate.result_tables import LAYOUTS

    assert set(KINDS) == EVALUATIONS.keys() == LAYOUTS.keys()


def test_a_byte_order_mark_belongs_to_no_text_and_no_question(place: Path) -> None:
    from andromeda.evaluate.questions import read_choices

    loaded = load_model(Path("run"), device="cpu")
    for name in ("some.txt", "choices.jsonl"):
        Path(f"marked-{name}").write_bytes(b"\xef\xbb\xbf" + Path(name).read_bytes())
    assert open_text(loaded, "marked-some.txt").ids.tolist() == open_text(loaded, "some.txt").ids.tolist()
    assert read_choices(Path("marked-choices.jsonl")) == read_choices(Path("choices.jsonl"))
