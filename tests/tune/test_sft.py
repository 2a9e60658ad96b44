"""Supervised fine-tuning: what is learned, packed examples against single ones, any split of a step, and a run that is killed."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from andromeda.config.run import RunConfig
from andromeda.data.corpus import open_corpus, verify_corpus
from andromeda.data.loader import open_stream
from andromeda.data.tokenizer import Tokenizer, template_sha256
from andromeda.evaluate.context_loss import held_out_tokens
from andromeda.model.transformer import Transformer
from andromeda.train.objective import MicroBatch, NextTokenObjective
from andromeda.train.progress import NullReporter
from andromeda.train.trainer import train
from andromeda.tune.sft import SftRequest, prepare_sft
from andromeda.tune.sft_config import TuneSchedule
from tests.command import call
from tests.tune.conftest import sum_record, write


def prepared(base: Path, data: Path, out: Path, *overrides: str, steps: int = 6) -> RunConfig:
    request = SftRequest(str(base), (data,), out, schedule=TuneSchedule(steps=steps, lr_scale=1.0), overrides=overrides)
    return prepare_sft(request, lambda text: None)


def tensors(run: Path, step: int) -> dict[str, Tensor]:
    return load_file(run / "checkpoints" / f"step-{step:08}" / "model.safetensors")


@pytest.fixture(scope="module")
def config(base: Path, sums: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Of a tuning whose corpus is written."""
    return prepared(base, sums, tmp_path_factory.mktemp("sft") / "out", "train.batch_size=8", "train.micro_batch_size=0")


def test_targets_are_the_answers(config: RunConfig) -> None:
    """Of every sequence, exactly the digits of the answers and the tokens that end them, whatever shares the sequence."""
    corpus = verify_corpus(Path(config.data.corpus))
    stream = open_stream(config.data, 64, 0)
    tokenizer = stream.tokenizer
    assert tokenizer is not None
    end, seen = tokenizer.special_tokens["<|im_end|>"], set()
    for row in range(14):
        batch = stream.batch(row, 1)
        for document in range(int(batch.documents.max()) + 1):
            inside = batch.documents[0] == document
            learned = [i for i in batch.targets[0][inside].tolist() if i != -100]
            if learned:
                question = tokenizer.decode(batch.ids[0][inside].tolist()).split("\n")[1][:3].partition("assistant")[0]
                assert learned[-1] == end
                assert tokenizer.decode(learned) == str(sum(map(int, question.split("+"))))
                seen.add(question)
    assert len(seen) == corpus.splits["train"].documents
    val = open_corpus(config.data.corpus, "val")
    assert val.loss_mask is not None
    assert int(val.loss_mask.sum()) > 0


def test_evaluation_reads_whole_conversations(config: RunConfig) -> None:
    """What is measured as held-out text has the questions too."""
    val = open_corpus(config.data.corpus, "val").documents.tokens
    assert held_out_tokens(config.data, 0).tolist() == val.read(0, val.size).tolist()


@pytest.fixture(scope="module")
def model(config: RunConfig) -> Transformer:
    """Random weights in float64, none of them 0 as at the start of a training."""
    made, draw = Transformer(config.model, seed=0).double(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in made.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=draw, dtype=torch.float64)
    return made


def test_packed_examples_are_as_if_alone(config: RunConfig, model: Transformer) -> None:
    """Logits to 1e-6, and no gradient at all from one example's loss to another's inputs."""
    batch = open_stream(config.data, 64, 0).batch(0, 1)
    data = MicroBatch.from_batch(batch, True)
    assert data.documents is not None
    together = model(data.ids, documents=data.documents)
    count = int(batch.documents.max()) + 1
    assert count >= 3, "two examples and padding"
    for document in range(count):
        inside = batch.documents[0] == document
        assert (together[:, inside] - model(batch.ids[:, inside])).abs().max() <= 1e-6
    assert (together - model(data.ids)).abs().max() > 1e-3, "they would see each other without document numbers"
    kept: list[Tensor] = []

    def keep(module: torch.nn.Module, arguments: object, result: Tensor) -> Tensor:
        kept.append(result.detach().requires_grad_())
        return kept[-1]

    handle = model.embedding.tokens.register_forward_hook(keep)
    logits = model(data.ids, documents=data.documents)
    handle.remove()
    second = batch.documents[0] == 1
    targets = torch.where(second, batch.targets[0], -100)
    torch.nn.functional.cross_entropy(logits[0], targets, ignore_index=-100).backward()
    gradient = kept[0].grad
    assert gradient is not None
    assert gradient[0, second].abs().max() > 0
    assert gradient[0, ~second].abs().max() == 0


def test_gradient_of_any_split(config: RunConfig, model: Transformer) -> None:
    """Eight sequences with different numbers of targets, in 1, 2, 4 and 8 micro-batches."""
    batch = open_stream(config.data, 64, 0).batch(0, 8)
    data, objective = MicroBatch.from_batch(batch, True), NextTokenObjective(model)

    def gradient(parts: int) -> Tensor:
        model.zero_grad()
        for part in data.split(8 // parts):
            (objective(part).total / batch.tokens).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    whole = gradient(1)
    for parts in (2, 4, 8):
        assert (gradient(parts) - whole).norm() <= 1e-12 * whole.norm()


def test_new_tokens_begin_as_the_mean(base: Path, sums: Path, tmp_path: Path) -> None:
    """Rows of the embedding, the value embedding and the head; all others are the old run's; the template travels with its hash."""
    out = tmp_path / "out"
    assert call("tune", "sft", str(base), "--data", str(sums), "--out", str(out), "--steps", "2", "train.checkpoints.keep=9") == 0
    old, new = tensors(base, 2), tensors(out, 0)
    grown = [name for name in old if old[name].shape != new[name].shape]
    assert sorted(name.split(".")[0] for name in grown) == ["embedding", "head", "value_embedding"]
    for name, before in old.items():
        assert torch.equal(new[name][: len(before)] if before.ndim else new[name], before)
        if name in grown:
            assert new[name].shape == (261, *before.shape[1:])
            torch.testing.assert_close(new[name][257:], before.double().mean(0).float().expand(4, -1))
    tokenizer = Tokenizer.load(out)
    assert tokenizer.chat_template
    assert tokenizer.extends(Tokenizer.load(base))
    assert template_sha256(tokenizer.chat_template) in (out / "report.html").read_text()
    assert call("export", str(out), "--to", str(tmp_path / "hub")) == 0
    assert (tmp_path / "hub" / "chat_template.jinja").read_text() == tokenizer.chat_template
    (out / "tokenizer" / "chat_template.jinja").write_text("changed")
    assert call("export", str(out), "--to", str(tmp_path / "hub2")) == 2


class Killed(NullReporter):
    """Kills its process after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def step_done(self, step: int) -> None:
        if step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def killed(config: RunConfig, out: Path, base: Path, step: int) -> None:
    torch.set_num_threads(1)
    train(config, out, init_from=base, reporter=Killed(step))


def test_killed_run_resumes_to_the_bit(base: Path, sums: Path, tmp_path: Path) -> None:
    """SIGKILL after step 3 of 6, between two checkpoints; the resumed run has the weights of one that ran through."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    settings = ("train.checkpoints.every=2", "train.checkpoints.background=false")
    train(prepared(base, sums, whole, *settings), whole, init_from=base)
    process = multiprocessing.get_context("spawn").Process(target=killed, args=(prepared(base, sums, broken, *settings), broken, base, 3))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert call("train", "--out", str(broken), "--resume") == 0
    a, b = tensors(whole, 6), tensors(broken, 6)
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
    assert not torch.equal(a["head.weight"][:257], tensors(base, 2)["head.weight"])


def test_inspect(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every token with its role and weight; examples that are cut are counted, and those cut before their answer left out."""
    long = {"messages": [{"role": "user", "content": "x" * 80}, {"role": "assistant", "content": "no"}]}
    cut = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y" * 80}]}
    write(tmp_path / "d.jsonl", [sum_record(1, 2), long, cut])
    assert call("tune", "inspect", str(base), str(tmp_path / "d.jsonl"), "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [token["token"] for token in found["tokens"] if token["weight"]] == ["'3'", "<|im_end|>"]
    assert "".join(token["token"][1:-1] for token in found["tokens"] if token["role"] == "user") == "1+2"
    figures = found["statistics"]
    assert (figures["examples"], figures["truncated"], figures["unlearned"]) == (2, 2, 1)
    # The answer of the third begins where that of the first does, two characters of the question earlier.
    start = next(place for place, token in enumerate(found["tokens"]) if token["weight"]) - 2
    assert figures["learned"] == 2 + 64 - start
    assert figures["truncated_learned"] == 80 + 1 - (64 - start) + 3
    assert call("tune", "inspect", str(base), str(tmp_path / "d.jsonl")) == 0
    assert "2 examples were cut" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((), "--data"),
        (("--data", "DATA", "--out", "BASE"), "never modified"),
        (("--data", "DATA", "train.steps=3"), "--steps"),
        (("--data", "DATA", "--lr-scale", "0"), "--lr-scale"),
        (("--data", "DATA", "--template", "chatm"), "did you mean chatml"),
        (("--data", "ONE"), "needs one to learn from and one to hold out"),
    ],
)
def test_refused_calls(
    base: Path, sums: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], sentence: str
) -> None:
    """One sentence, and no run is begun."""
    write(tmp_path / "one.jsonl", [sum_record(1, 2)] * 3)
    names = {"DATA": str(sums), "BASE": str(base), "ONE": str(tmp_path / "one.jsonl")}
    given = [names.get(argument, argument) for argument in arguments]
    given += [] if "--out" in given else ["--out", str(tmp_path / "out")]
    assert call("tune", "sft", str(base), *given) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out" / "config.toml").exists()
