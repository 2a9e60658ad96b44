"""`andromeda eval` and `andromeda verify` as a user meets them."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch

from andromeda import Andromeda
from andromeda.cli.main import main
from andromeda.evaluate.position import binned, loss_by_context, loss_by_position, spread
from andromeda.evaluate.result import KINDS, results
from andromeda.evaluate.run import EVALUATIONS
from andromeda.evaluate.subject import open_subject, sha256
from andromeda.evaluate.text import open_text

SHAPE = ["model.width=16", "model.depth=1", "model.context=256", "model.vocab_size=257", "train.steps=2", "train.batch=2"]
SHAPE += ["model.attention.heads=2", "model.attention.kv_heads=1", "model.attention.head_dim=8", "train.schedule.cooldown=1"]
SHAPE += [
    "train.schedule.warmup=0",
    "train.compile=off",
    "train.device=cpu",
    "train.precision=fp32",
    "train.eval_every=2",
    "data.document_mask=true",
]


def call(*arguments: object) -> int:
    before, sys.argv = sys.argv, ["andromeda", *map(str, arguments)]
    try:
        with pytest.raises(SystemExit) as end:
            main()
    finally:
        sys.argv = before
    return int(end.value.code or 0)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of bytes, a run of two steps, questions."""
    torch.set_num_threads(1)
    place = tmp_path_factory.mktemp("made")
    texts = place / "texts"
    texts.mkdir()
    for i in range(40):
        (texts / f"{i}.txt").write_text(f"the {i}th text of a small corpus, café\n" * 20)
    assert call("data", "build", texts, "--out", place / "corpus", "--tokenizer", "bytes", "--validation", "0.2", "--workers", "1") == 0
    assert call("train", "nano", *SHAPE, f"data.corpus={place / 'corpus'}", "--out", place / "run") == 0
    (place / "some.txt").write_text("Text of another kind, für sich.\n" * 40)
    choices = [{"question": f"{i}?", "choices": ["yes", "no", "perhaps"], "answer": i % 3} for i in range(7)]
    (place / "choices.jsonl").write_text("".join(json.dumps(row) + "\n" for row in choices))
    solved = [{"question": f"{i} + 1?", "answer": f"#### {i + 1}"} for i in range(5)]
    (place / "solved.jsonl").write_text("".join(json.dumps(row) + "\n" for row in solved))
    return place


@pytest.fixture
def place(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(made / "run", tmp_path / "run")
    for name in ("corpus", "some.txt", "choices.jsonl", "solved.jsonl"):
        (tmp_path / name).symlink_to(made / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_first_result_of_each_kind_has_the_hashes_of_weights_and_data(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tasks = ["bits", "position", "context", "single", "reasoning", "fewshot"]
    wishes = ["--samples", "2", "--lengths", "240", "--file", "choices.jsonl", "--depths", "2", "--style", "code", "--device", "cpu"]
    capsys.readouterr()
    assert call("eval", "run", *tasks, *wishes, "--json") == 0
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    stored = results("run")
    assert [line["kind"] for line in printed] == ["bits", "position", "context", "retrieval", "reasoning", "fewshot"]
    assert {line["name"] for line in printed} == stored.keys()
    weights = place / "run/checkpoints/step-00000002/model.safetensors"
    corpus = json.loads((place / "corpus/manifest.json").read_text())["fingerprint"]
    for one in stored.values():
        assert (one.weights, one.step) == (sha256(weights), 2)
        assert one.machine["precision"] == "fp32"
    assert stored["bits"].data == corpus
    assert stored["fewshot-choices-0"].data == sha256(place / "choices.jsonl")
    grid = stored["retrieval-single-code"].result
    assert [len(row) for row in grid["accuracy"]] == [len(grid["depths"])] * len(grid["lengths"])
    assert stored["bits"].result["bytes"] == len((place / "corpus/val.txt").read_bytes())


def test_bits_of_any_file_are_those_of_its_bytes(place: Path) -> None:
    """A model whose head is zero gives every token the same probability."""
    subject = open_subject(Path("run"), device="cpu")
    torch.nn.init.zeros_(subject.model.head.weight)
    text = open_text(subject, "some.txt")
    evaluation = EVALUATIONS["bits"]
    settings = evaluation.read({"text": "some.txt", "context": 256, "stride": 100})
    found = evaluation.measure(subject, settings, lambda *_: None)
    size = len((place / "some.txt").read_bytes())
    assert found.result["bytes"] == found.result["tokens"] == size == len(text.ids) - 1
    assert found.result["bits_per_byte"] == pytest.approx(math.log2(257), rel=1e-6)
    assert found.data == sha256(Path("some.txt"))


@torch.no_grad()
def test_losses_by_position_and_by_context_are_those_of_single_windows(place: Path) -> None:
    subject = open_subject(Path("run"), device="cpu", dtype="fp64")
    text, model = open_text(subject, "some.txt"), subject.model

    def nats(ids: torch.Tensor) -> torch.Tensor:
        return -model(ids[None, :-1])[0].log_softmax(-1).gather(1, ids[1:, None])[:, 0]

    curve = loss_by_position(model, text, length=30, windows=5)
    begins = spread(list(range(0, len(text.ids) - 30, 30)), 5)
    expected = torch.stack([nats(text.ids[begin : begin + 31]) for begin in begins]).mean(0)
    torch.testing.assert_close(curve.nats, expected, rtol=1e-9, atol=1e-9)
    edges, means, counts = binned(curve)
    assert edges == [1, 2, 4, 8, 16, 31]
    assert counts == [5 * n for n in (1, 2, 4, 8, 15)]
    assert means[-1] == pytest.approx(expected[15:].mean().item(), rel=1e-9)
    found = loss_by_context(model, text, contexts=(3, 20, 64), targets=4, places=6)
    begins = spread(list(range(64, len(text.ids) - 3, 4)), 6)
    for row, count in enumerate((3, 20, 64)):
        for column, at in enumerate(begins):
            single = nats(text.ids[at - count : at + 4])[-4:].mean()
            assert found[row, column].item() == pytest.approx(single.item(), rel=1e-9)


def test_held_out_documents_are_not_crossed(place: Path) -> None:
    """Where training had a document mask: equal to each document by itself."""
    subject = open_subject(Path("run"), device="cpu", dtype="fp64")
    evaluation, text = EVALUATIONS["bits"], open_text(subject)
    short = [(b, e) for b, e in zip(text.starts, text.starts[1:], strict=False)][:1]
    assert text.numbers() is not None
    assert len(set(text.numbers().tolist())) == len(text.starts) - 1
    begin, end = short[0]
    ids = text.ids[begin : end + 1]
    with torch.no_grad():
        alone = -subject.model(ids[None, :-1])[0].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        numbers = text.numbers()
        both = subject.model(text.ids[None, : end + 50], documents=numbers[None, : end + 50])[0].log_softmax(-1)
    torch.testing.assert_close(-both[begin:end].gather(1, ids[1:, None])[:, 0], alone, rtol=1e-9, atol=1e-9)
    assert evaluation.kind == "bits"


def test_verify_agrees_and_then_finds_what_was_changed(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wishes = ["--samples", "2", "--lengths", "200", "--depths", "2", "--style", "code", "--device", "cpu"]
    assert call("eval", "run", "bits", "single", *wishes) == 0
    capsys.readouterr()
    assert call("verify", "run", "--device", "cpu", "--json") == 0
    checks = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [check["what"] for check in checks[:2]] == ["training data", "held-out loss of step 2"]
    assert checks[1]["difference"] == 0.0
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
    capsys.readouterr()
    assert call("verify", "run", "--repeat", "--json") == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["note"] == "equal to the last bit"
    with open("run/config.toml", "a+") as file:
        file.seek(0)
        changed = file.read().replace("seed = 0", "seed = 1", 1)
    Path("run/config.toml").write_text(changed)
    assert call("verify", "run", "--repeat") == 1


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
        (["run", "bits", "--lengths", "0"], "must be above 0"),
        (["run", "bits", "--lengths", "999"], "more than this model's context of 256"),
        (["run", "bits", "--stride", "300"], "--stride 300"),
        (["run", "bits", "--text", "none.txt"], "none.txt cannot be read"),
        (["run", "bits", "--text", "run"], "run cannot be read"),
        (["run", "bits", "--text", "run/checkpoints/step-00000002/model.safetensors"], "is not text in UTF-8"),
        (["run", "bits", "--corpus", "none"], "none"),
        (["run", "position", "--text", "short.txt"], "too few for windows of 256"),
        (["run", "context", "--text", "short.txt"], "No document has"),
        (["run", "multikey", "--lengths", "64"], "too short for multikey"),
        (["run", "single", "--style", "verse"], "--style must be one of prose, code"),
        (["run", "single", "--samples", "0"], "--samples must be above 0"),
        (["run", "fewshot"], "give it with --file"),
        (["run", "fewshot", "--file", "none.jsonl"], "There is no file none.jsonl"),
        (["run", "fewshot", "--file", "solved.jsonl"], "Question 1 of solved.jsonl"),
        (["run", "fewshot", "--file", "choices.jsonl", "--shots", "7"], "leave none"),
        (["run", "gsm8k", "--file", "choices.jsonl"], "Question 1 of choices.jsonl"),
        (["run", "harness"], "--task"),
        (["run", "harness", "--task", "x", "--include", "none"], "There is no folder none"),
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


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"kind": "bits"}'])
def test_a_damaged_result_is_named(place: Path, capsys: pytest.CaptureFixture[str], content: str) -> None:
    (place / "run/evaluations").mkdir()
    (place / "run/evaluations/bits.json").write_text(content)
    assert call("verify", "run", "--device", "cpu") == 2
    assert "bits.json" in capsys.readouterr().err


def test_verify_wants_a_run(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("verify", "nowhere") == 2
    assert "nowhere is not a run folder" in capsys.readouterr().err


def test_every_kind_has_its_evaluation_and_its_table() -> None:
    from andromeda.evaluate.sheet import LAYOUTS

    assert set(KINDS) == EVALUATIONS.keys() == LAYOUTS.keys()
