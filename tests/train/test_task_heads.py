"""Training of several heads: the gradient of a step, what is logged, resumed and refused, and heads of a user's own."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from andromeda.config.own_code import CodeNotAllowed
from andromeda.config.run import RunConfig
from andromeda.data.loader import open_stream
from andromeda.loss.head_tasks import ahead_targets
from andromeda.train.build_objective import build_objective
from andromeda.train.objective import MicroBatch
from andromeda.train.state import TrainState, build_train_state
from andromeda.train.step import StepBatch, TrainStep
from andromeda.train.trainer import train
from andromeda.utils.errors import ConfigError
from tests.labeled_corpora import labeled_corpus, labeled_rows
from tests.parallel.test_equal_training import state_of
from tests.parallel.whole_runs import train_on

CPU = torch.device("cpu")
HEADS: dict[str, dict[str, Any]] = {
    "score": {"weight": 0.7},
    "topic": {"weight": 2.0},
    "tags": {},
    "moods": {"weight": 0.3},
    "better": {},
    "ahead": {"kind": "multi_token", "tokens": 3},
}
Make = Callable[..., RunConfig]
Metrics = Callable[[Path], list[dict[str, Any]]]


@pytest.fixture(scope="session")
def labeled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return labeled_corpus(tmp_path_factory.mktemp("labeled"), labeled_rows(60, pairs=20))


@pytest.fixture
def several(tiny: Make, labeled: Path) -> Make:
    """The tiny model with a head of every kind."""

    def make(**changes: object) -> RunConfig:
        values: dict[str, object] = {"data__corpus": str(labeled), "data__packing": "documents", "model__task_heads": HEADS}
        return tiny(**values | changes)

    return make


def step_batch(config: RunConfig, rows: int = 6) -> StepBatch:
    batch = open_stream(config.data, 32, 0).batch(0, rows)
    return StepBatch(MicroBatch.from_batch(batch, True), batch.tokens, (0, rows))


def gradients_of(config: RunConfig) -> tuple[dict[str, Tensor], TrainState]:
    """What one step of a float64 model accumulates."""
    state, found = build_train_state(config, CPU, "data"), {}
    state.model.double()
    state.optimizer.zero_grad = lambda: None  # type: ignore[method-assign]
    TrainStep(state, build_objective(state.model, config, state.balance), config.train)(step_batch(config))
    found = {name: p.grad for name, p in state.model.named_parameters() if p.grad is not None}
    return found, state


@pytest.mark.parametrize("balance", ["fixed", "uncertainty", "gradnorm"])
def test_any_split_of_a_step_has_the_same_gradient_and_weights(several: Make, balance: str) -> None:
    """Whole, in two, three and six: also the state of the balance afterwards."""
    keys: dict[str, Any] = {
        "train__batch_size": 6,
        "train__clip": {"kind": "none"},
        "loss__balance": balance,
        "train__optim": {"lr": 1e-12},
    }
    whole, state = gradients_of(several(**keys))
    assert len(whole) == len(list(state.model.parameters()))
    for size in (3, 2, 1):
        split, other = gradients_of(several(**keys, train__micro_batch_size=size))
        for name, gradient in whole.items():
            torch.testing.assert_close(split[name], gradient, rtol=1e-12, atol=1e-14)
        for name, value in state.balance.state_tensors().items():
            torch.testing.assert_close(other.balance.state_tensors()[name], value, rtol=1e-12, atol=1e-14)


def test_the_gradient_is_that_of_torchs_own_losses(several: Make) -> None:
    """The weighted sum of the mean of each head's loss over its targets, worked from logits with torch.nn.functional."""
    heads = {name: HEADS[name] for name in ("score", "topic", "tags", "moods")}
    config = several(train__batch_size=6, train__clip={"kind": "none"}, model__task_heads=heads, train__optim={"lr": 1e-12})
    found, _ = gradients_of(config)
    data, model = step_batch(config).data, build_train_state(config, CPU, "data").model.double()  # before the update
    hidden = model.hidden(data.ids, documents=data.documents)
    targets, keys = data.head_targets, config.model.task_heads["score"].own
    loss = F.cross_entropy(model.head(hidden).flatten(0, 1), data.targets.flatten(), ignore_index=-100)
    known = ~targets["score"].isnan()
    truth = (targets["score"][known] - keys["shift"]) / keys["scale"]
    loss = loss + 0.7 * 0.5 * F.mse_loss(model.task_heads["score"](hidden)[known][:, 0], truth)
    for name, weight in (("topic", 2.0), ("tags", 1.0)):
        outputs = model.task_heads[name](hidden).flatten(0, 1)
        loss = loss + weight * F.cross_entropy(outputs, targets[name].flatten(), ignore_index=-100)
    there = targets["moods"] != 255
    loss = loss + 0.3 * F.binary_cross_entropy_with_logits(model.task_heads["moods"](hidden)[there], targets["moods"][there].double())
    parameters = dict(model.named_parameters())
    for (name, gradient), wanted in zip(found.items(), torch.autograd.grad(loss, [parameters[n] for n in found]), strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-10, atol=1e-12, msg=name)


def test_tokens_ahead_are_of_the_same_document() -> None:
    targets = torch.tensor([[1, 2, 9, 4, 5, -100]])
    batch = MicroBatch(torch.zeros(1, 6), targets, torch.tensor([[0, 0, 0, 1, 1, 2]]))
    assert ahead_targets(batch, 2).tolist() == [[2, 9, -100, 5, -100, -100]]
    assert ahead_targets(batch, 3).tolist() == [[9, -100, -100, -100, -100, -100]]
    assert ahead_targets(batch._replace(documents=None), 3).tolist() == [[9, 4, 5, -100, -100, -100]]


@pytest.mark.parametrize("balance", ["uncertainty", "gradnorm", "dwa"])
def test_an_interrupted_run_ends_as_one_that_was_not(
    several: Make,
    tmp_path: Path,
    balance: str,
    assert_same_run: Callable[[Path, Path], None],
    metrics: Metrics,
) -> None:
    """Heads, task weights and losses since the last line of metrics.jsonl, to the bit."""
    config = several(train__micro_batch_size=2, loss__balance=balance, loss__every=3, train__ema=0.9, train__log__every=3)
    train(config, tmp_path / "whole")
    train(config, tmp_path / "cut")
    for path in (tmp_path / "cut" / "checkpoints").glob("step-*"):
        if int(path.name[5:]) > 8:  # of step 8, between two lines of metrics.jsonl and two spans of dwa
            path.rename(tmp_path / path.name)
    train(config, tmp_path / "cut", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    last = next(line for line in reversed(metrics(tmp_path / "whole")) if "loss" in line)
    assert {f"loss/{name}" for name in HEADS} < last.keys()
    assert {f"weight/{name}" for name in (*HEADS, "next_token")} < last.keys()
    assert len({last[f"weight/{name}"] for name in HEADS}) > 2


def test_losses_of_heads_are_logged_as_means_over_their_targets(several: Make, tmp_path: Path, metrics: Metrics) -> None:
    """The first line's, of one step, and the validation's, against torch on the model of that step."""
    config = several(train__steps=1, train__log__every=1, train__eval_every=1, train__optim={"lr": 1e-12})
    train(config, tmp_path / "run")
    training, validation = metrics(tmp_path / "run")
    state = build_train_state(config, CPU, "data")
    data = step_batch(config, 4).data
    with torch.no_grad():
        outputs = state.model.task_heads["topic"](state.model.hidden(data.ids, documents=data.documents))
    wanted = F.cross_entropy(outputs.flatten(0, 1), data.head_targets["topic"].flatten(), ignore_index=-100)
    assert training["loss/topic"] == pytest.approx(float(wanted), rel=1e-5)
    stream = open_stream(config.data, 32, 0, "val")
    assert stream.num_sequences is not None
    data = MicroBatch.from_batch(stream.gather([i * stream.num_sequences // 8 for i in range(min(8, stream.num_sequences))]), True)
    if stream.num_sequences >= 8:
        with torch.no_grad():
            outputs = state.model.task_heads["topic"](state.model.hidden(data.ids, documents=data.documents))
        wanted = F.cross_entropy(outputs.flatten(0, 1), data.head_targets["topic"].flatten(), ignore_index=-100)
        assert validation["validation/loss/topic"] == pytest.approx(float(wanted), rel=1e-4)


def test_two_processes_learn_what_one_learns(several: Make, tmp_path: Path, metrics: Metrics) -> None:
    """FSDP over two: weights, balance and losses of heads in float64."""
    config = several(train__steps=3, loss__balance="gradnorm", train__eval_every=2, train__log__every=1)
    train_on(0, config, tmp_path / "one")
    train_on(2, config, tmp_path / "two")
    one, two = (state_of(tmp_path / name) for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-9, atol=1e-12, msg=name)
    for line, same in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        kept = [key for key in line if key.startswith(("loss", "weight/", "validation/", "gradient_norm"))]
        assert {key: same[key] for key in kept} == pytest.approx({key: line[key] for key in kept}, rel=1e-9)


def test_open_keys_are_those_of_the_corpus(several: Make) -> None:
    heads = several().model.task_heads
    assert {name: head.kind for name, head in heads.items()} == {
        "score": "regression",
        "topic": "classification",
        "tags": "token_classification",
        "moods": "multi_label",
        "better": "preference",
        "ahead": "multi_token",
    }
    assert (heads["topic"].own["num_labels"], heads["tags"].own["num_labels"], heads["moods"].own["num_labels"]) == (2, 3, 2)
    assert math.isfinite(heads["score"].own["shift"])
    assert heads["score"].own["scale"] > 0


def test_mistakes_are_one_sentence(several: Make, tiny: Make, tmp_path: Path) -> None:
    def refuse(sentence: str, heads: dict[str, Any], **changes: object) -> None:
        with pytest.raises(ConfigError, match=sentence):
            train(several(model__task_heads=heads, **changes), tmp_path / "run")

    refuse(r"predicts the target 'scores', which no corpus of the run has", {"scores": {}})
    refuse(r"which the corpus does not have \(did you mean score\?\)", {"scores": {"kind": "regression"}})
    refuse("kind 'label', and 'score' is of kind 'number': take 'regression'", {"score": {"kind": "classification", "num_labels": 3}})
    refuse("num_labels = 1, and the target 'topic' has 2 labels", {"topic": {"kind": "classification", "num_labels": 1}})
    refuse(r"is not a kind of head \(did you mean regression\?\)", {"score": {"kind": "regresion"}})
    refuse("is no name for a head", {"head": {}})
    refuse("model.task_heads.score.likelihod", {"score": {"kind": "regression", "likelihod": "gaussian"}})
    with pytest.raises(ConfigError, match="has nothing to balance"):
        tiny(loss__balance="gradnorm")
    with pytest.raises(ConfigError, match="leaves nothing to learn"):
        tiny(loss__next_token_weight=0.0)
    with pytest.raises(ConfigError, match="whole sequences and matrices"):
        several(parallel__tensor=2)
    with pytest.raises(ConfigError, match="learns weights that workers of"):
        several(loss__balance="gradnorm", train__diloco={"workers": 2})


def test_whole_numbers_are_ambiguous(tiny: Make, tmp_path: Path) -> None:
    rows = [{"text": f"{i} stars", "stars": i % 5} for i in range(40)]
    corpus = labeled_corpus(tmp_path, rows, ("stars=number",))
    with pytest.raises(ConfigError, match="may be classes, counts or quantities: set model"):
        tiny(data__corpus=str(corpus), model__task_heads={"stars": {}})
    counts = {"stars": {"kind": "regression", "likelihood": "poisson"}}
    train(tiny(data__corpus=str(corpus), model__task_heads=counts, train__steps=1, train__eval_every=0), tmp_path / "run")


def test_a_run_may_learn_its_heads_alone(several: Make, tmp_path: Path, metrics: Metrics) -> None:
    """The language model's head keeps its weights, and its loss is measured all the same."""
    config = several(loss__next_token_weight=0.0, train__steps=2, train__log__every=1, model__task_heads={"topic": {}})
    before = build_train_state(config, CPU, "data").model.head.weight.detach()
    train(config, tmp_path / "run")
    from andromeda.train.weights import load_weights

    after = load_weights(tmp_path / "run").head.weight
    torch.testing.assert_close(after / after.norm(), before / before.norm(), rtol=1e-4, atol=1e-6)
    assert all(line["loss"] > 1 for line in metrics(tmp_path / "run") if "loss" in line)


def test_new_heads_on_the_weights_of_a_run_without_them(several: Make, tmp_path: Path) -> None:
    config = several(model__task_heads={}, train__steps=2, train__eval_every=0)
    train(config, tmp_path / "text")
    heads = several(train__steps=1, train__eval_every=0, train__optim={"lr": 1e-12})
    train(heads, tmp_path / "heads", init_from=tmp_path / "text")
    from andromeda.train.weights import read_weights

    old, new = read_weights(tmp_path / "text")[1], read_weights(tmp_path / "heads")[1]
    assert all(torch.allclose(new[name], tensor, atol=1e-6) for name, tensor in old.items())
    assert any(name.startswith("task_heads.topic") for name in new)


def test_a_student_learns_from_its_teacher(several: Make, tmp_path: Path, metrics: Metrics) -> None:
    """From its own weights the divergence is zero at first; from others it falls."""
    plain: dict[str, Any] = {"model__task_heads": {}, "train__eval_every": 0}
    train(several(**plain, train__steps=12), tmp_path / "teacher")
    learning = {"loss__distillation": {"teacher": str(tmp_path / "teacher"), "divergence": "jsd", "weight": 2.0}, "train__log__every": 1}
    train(several(**plain, **learning, train__steps=1), tmp_path / "same", init_from=tmp_path / "teacher")
    assert abs(metrics(tmp_path / "same")[0]["loss/distillation"]) < 1e-7
    train(several(**plain, **learning, train__steps=12, seed=1), tmp_path / "student")
    losses = [line["loss/distillation"] for line in metrics(tmp_path / "student") if "loss" in line]
    assert losses[-1] < 0.7 * losses[0]


OWN_HEAD = '''
import torch
from torch import nn
from pydantic import PositiveFloat
from andromeda.config.base import BaseConfig
from andromeda.loss import LossSums


class LengthHead(nn.Module):
    """How many tokens of its document come before a token, by squared error."""

    class Config(BaseConfig):
        unit: PositiveFloat = 10.0

    squared = True

    def __init__(self, model, name, config):
        super().__init__()
        self.unit, self.linear = config.unit, nn.Linear(model.hidden_size, 1)

    def forward(self, x):
        return self.linear(x)

    def count(self, batch):
        return torch.tensor(batch.targets.numel())

    def loss_sums(self, hidden, batch):
        documents = batch.documents.long()
        first = (documents[:, :, None] == documents[:, None, :]).long().argmax(-1)
        truth = (torch.arange(documents.shape[1], device=documents.device) - first) / self.unit
        error = (self(hidden)[..., 0] - truth).square().sum()
        return LossSums(error, error.detach(), self.count(batch))
'''


def test_a_head_of_a_users_own(several: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, metrics: Metrics) -> None:
    (tmp_path / "own_length_head.py").write_text(OWN_HEAD)
    monkeypatch.syspath_prepend(tmp_path)
    heads = {"length": {"kind": "own_length_head:LengthHead", "unit": 5.0}, "topic": {}}
    config = several(model__task_heads=heads, train__log__every=1, loss__balance="uncertainty")
    with pytest.raises(CodeNotAllowed):
        train(config, tmp_path / "run")
    train(config, tmp_path / "run", allow_code=True)
    losses = [line["loss/length"] for line in metrics(tmp_path / "run") if "loss" in line]
    assert losses[-1] < losses[0]
