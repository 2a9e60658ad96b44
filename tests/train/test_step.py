"""One step against plain PyTorch in float64: gradients, normalization, scaling, and steps that are not taken."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from andromeda.config.run import RunConfig
from andromeda.model.feedforward.moe import Router
from andromeda.model.master_weight_linear import accumulate_weight_grads, convert_to_master_weights
from andromeda.train.objective import MicroBatch, NextTokenObjective, ObjectiveSums
from andromeda.train.precision import Precision
from andromeda.train.state import TrainState, build_train_state
from andromeda.train.step import StepBatch, StepResult, TrainStep
from tests.ops import emulated16

assert emulated16
CPU = torch.device("cpu")


def batch(rows: int = 6, length: int = 16) -> MicroBatch:
    """Random ids in random documents, with an uneven third of the targets left out."""
    draw = torch.Generator().manual_seed(5)
    ids = torch.randint(0, 257, (rows, length + 1), generator=draw)
    targets = ids[:, 1:].clone()
    targets[torch.rand(targets.shape, generator=draw) < torch.linspace(0, 0.9, rows)[:, None]] = -100
    documents = (torch.rand(rows, length, generator=draw) < 0.1).cumsum(1).int()
    return MicroBatch(ids[:, :-1], targets, documents)


def work(rows: MicroBatch) -> StepBatch:
    return StepBatch(rows, int((rows.targets != -100).sum()), (0, len(rows.ids)))


class Kept:
    """A step whose gradients stay to be looked at."""

    def __init__(self, config: RunConfig, wide: bool = True) -> None:
        self.session = build_train_state(config, CPU, "data")
        if wide:
            self.session.model.double()
        self.gradients: dict[str, Tensor] = {}
        self.session.optimizer.zero_grad = self._keep  # type: ignore[method-assign]
        self.stepper = TrainStep(self.session, NextTokenObjective(self.session.model, config.train.z_loss), config.train)

    def _keep(self) -> None:
        for name, p in self.session.model.named_parameters():
            assert p.grad is not None, name
            self.gradients[name], p.grad = p.grad, None

    def __call__(self, rows: MicroBatch) -> StepResult:
        return self.stepper(work(rows))


def reference(session: TrainState, rows: MicroBatch, z_loss: float) -> tuple[float, dict[str, Tensor]]:
    """Mean cross entropy over the targets that count, and its gradient with the z-loss, by PyTorch's own functions."""
    model = session.model
    logits = model(rows.ids, documents=rows.documents)
    loss = F.cross_entropy(logits.flatten(0, 1), rows.targets.flatten().long(), ignore_index=-100)
    z = logits.logsumexp(-1)[rows.targets != -100].square().mean()
    gradients = torch.autograd.grad(loss + z_loss * z, list(model.parameters()))
    return loss.item(), dict(zip([name for name, _ in model.named_parameters()], gradients, strict=True))


@pytest.mark.parametrize("micro_batch", [0, 1, 2, 3])
def test_gradient_is_that_of_the_whole_batch(tiny: Callable[..., RunConfig], micro_batch: int) -> None:
    """Six rows with very different numbers of targets, in micro-batches of 6, 1, 2 and 3."""
    config = tiny(train__batch_size=6, train__micro_batch_size=micro_batch, train__z_loss=0.01, train__clip={"kind": "none"})
    step = Kept(config)
    loss, gradients = reference(step.session, batch(), 0.01)
    outcome = step(batch())
    assert float(outcome.nll) == pytest.approx(loss, rel=1e-6)
    norm = torch.cat([g.flatten() for g in gradients.values()]).norm()
    assert float(outcome.grad_norm) == pytest.approx(float(norm), rel=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(step.gradients[name], gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("micro_batch", [0, 2, 3])
def test_gradient_that_products_add_up(tiny: Callable[..., RunConfig], micro_batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As layers in 16 bits do it, and only where there is something to add: one micro-batch takes no memory for it beforehand."""
    step, used = Kept(tiny(train__batch_size=6, train__micro_batch_size=micro_batch, train__clip={"kind": "none"})), []
    layers = convert_to_master_weights(step.session.model.decoder, lambda path: True, torch.float64)

    def accumulate_grads() -> contextlib.AbstractContextManager[None]:
        used.append(True)
        return accumulate_weight_grads(layers)

    monkeypatch.setattr(step.session.precision, "accumulate_grads", accumulate_grads)
    for _ in range(2):
        step(batch())
    assert len(used) == (0 if micro_batch == 0 else 2)
    step.session.model.zero_grad()
    _, gradients = reference(step.session, batch(), 0.0)
    step(batch())
    for name, gradient in gradients.items():
        torch.testing.assert_close(step.gradients[name], gradient, rtol=1e-9, atol=1e-12)


class Scaled(Precision):
    """Float64 with a constant loss scale."""

    FACTOR = 1024.0

    @property
    def loss_scale(self) -> Tensor:
        return torch.tensor(self.FACTOR)

    def unscale_grads(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        for p in parameters:
            if p.grad is not None:
                p.grad /= self.FACTOR


def experts(tiny: Callable[..., RunConfig], **changes: object) -> RunConfig:
    return tiny(
        train__batch_size=6,
        train__clip={"kind": "none"},
        model__feedforward={"kind": "moe", "mlp_ratio": 1.0},
        **{"model__experts": {"num_experts": 4, "top_k": 2, "balance": "loss", "aux_loss_coef": 0.5}} | changes,
    )


@pytest.mark.parametrize("precision", [Precision, Scaled])
@pytest.mark.parametrize("micro_batch", [0, 1, 2, 3])
def test_balance_loss_is_that_of_the_whole_step(tiny: Callable[..., RunConfig], precision: type[Precision], micro_batch: int) -> None:
    """E/k sum f P with f and P over all tokens of the step, by PyTorch's own functions: for any split, and whatever the loss scale."""
    step = Kept(experts(tiny, train__micro_batch_size=micro_batch))
    step.session.precision = precision(CPU)
    step(batch())

    plain = Kept(experts(tiny, model__experts={"num_experts": 4, "top_k": 2, "balance": "none"})).session.model
    projected: list[Tensor] = []
    for module in plain.modules():
        if isinstance(module, Router):
            module.register_forward_pre_hook(lambda router, given: projected.append(F.linear(given[0], router.project.weight)))
    total = F.cross_entropy(plain(batch().ids, documents=batch().documents).flatten(0, 1), batch().targets.flatten(), ignore_index=-100)
    for logits in projected:
        scores = logits.sigmoid()
        chosen = F.one_hot(scores.topk(2).indices, 4).sum((0, 1)).double() / len(scores)
        total = total + 0.5 * (4 / 2) * (chosen * (scores / scores.sum(-1, keepdim=True)).mean(0)).sum()
    gradients = torch.autograd.grad(total, list(plain.parameters()))
    for (name, _), gradient in zip(plain.named_parameters(), gradients, strict=True):
        torch.testing.assert_close(step.gradients[name], gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("activation_checkpointing", ["none", "full"])
def test_balance_loss_does_not_depend_on_the_split(tiny: Callable[..., RunConfig], activation_checkpointing: str) -> None:
    """Six sequences whole, one by one and by three: gradients in float64 to 1e-12 of their norm, in two steps after each other."""
    found = {}
    for micro_batch in (0, 1, 3):
        changes = {"train__micro_batch_size": micro_batch, "train__activation_checkpointing": activation_checkpointing}
        step = Kept(experts(tiny, **changes))
        for _ in range(2):
            step(batch())
        found[micro_batch] = step.gradients
        assert all(not router.step_load.any() and not router.load.any() for router in step.stepper._routers)
    norm = float(torch.cat([gradient.flatten() for gradient in found[0].values()]).norm())
    for other in (1, 3):
        gaps = [found[0][name] - found[other][name] for name in found[0]]
        assert float(torch.cat([gap.flatten() for gap in gaps]).norm()) < 1e-12 * norm


def test_counting_costs_nothing_without_the_balance_loss(tiny: Callable[..., RunConfig]) -> None:
    """The passes of the model: one more for each micro-batch with `balance = "loss"` and several of them, and only there."""
    for balance, micro_batch, passes in (("loss", 2, 6), ("loss", 0, 1), ("bias", 2, 3), ("none", 2, 3)):
        settings = {"num_experts": 4, "top_k": 2, "balance": balance}
        step, seen = Kept(experts(tiny, train__micro_batch_size=micro_batch, model__experts=settings)), []
        step.session.model.norm.register_forward_hook(lambda *_, seen=seen: seen.append(True))
        step(batch())
        assert len(seen) == passes, (balance, micro_batch)


class Poisoned:
    """The objective, with a total that is not finite at the calls that are named."""

    def __init__(self, inner: NextTokenObjective, calls: set[int], value: float) -> None:
        self._inner, self._calls, self._value, self._count = inner, calls, value, 0

    def __call__(self, rows: MicroBatch, window: int) -> ObjectiveSums:
        sums = self._inner(rows, window)
        self._count += 1
        return ObjectiveSums(sums.total * self._value, sums.nll) if self._count in self._calls else sums


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_step_that_is_not_finite_changes_nothing(tiny: Callable[..., RunConfig], value: float, precision: str) -> None:
    """The second micro-batch of the second of four steps breaks: weights, optimizer, average and router stay as they were."""
    config = tiny(
        train__batch_size=6,
        train__micro_batch_size=2,
        train__precision=precision,
        train__ema=0.9,
        model__feedforward={"kind": "moe", "mlp_ratio": 1.0},
        model__experts={"num_experts": 4, "top_k": 2, "bias_update_rate": 0.1},
    )
    session = build_train_state(config, CPU, "data")
    stepper = TrainStep(session, Poisoned(NextTokenObjective(session.model), {5}, value), config.train)
    states, verdicts = [], []
    for _ in range(4):
        verdicts.append(stepper(work(batch())).skip_reason)
        held = dict(session.model.named_parameters()) | session.optimizer.state_tensors() | session.ema.state_tensors()
        held |= {name: buffer for name, buffer in session.model.named_buffers() if name.endswith(("votes", "load"))}
        states.append({name: tensor.detach().clone() for name, tensor in held.items()})
    assert [verdict is None for verdict in verdicts] == [True, False, True, True]
    assert verdicts[1] == "the loss is not finite"
    equal = [all(torch.equal(a[name], b[name]) for name in a) for a, b in pairwise(states)]
    assert equal == [True, False, False]
    assert all(not tensor.isnan().any() for tensor in states[-1].values())


def test_fp16_overflow_halves_the_scale_and_is_no_fault(tiny: Callable[..., RunConfig]) -> None:
    """Gradients that overflow below a finite loss are no bad step of the guard: the scale falls until they fit."""
    config = tiny(train__batch_size=6, train__precision="fp16", train__spike_guard={"patience": 1})
    session = build_train_state(config, CPU, "data")
    inner = NextTokenObjective(session.model)

    def steep(rows: MicroBatch, window: int) -> ObjectiveSums:
        sums = inner(rows, window)
        # The value stays what it is, its slope is 2^12 times as steep.
        return ObjectiveSums(sums.total * 2.0**12 - (sums.total * (2.0**12 - 1)).detach(), sums.nll)

    stepper = TrainStep(session, steep, config.train)
    verdicts = [stepper(work(batch())).skip_reason for _ in range(40)]
    overflows = verdicts.count("the scaled gradient overflowed")
    assert 5 < overflows < 40
    assert session.spike_guard.healthy
    assert verdicts[-1] is None
    assert float(session.precision.loss_scale) == max(1.0, 2.0 ** (16 - overflows))


def test_fp16_learns_what_fp32_learns(tiny: Callable[..., RunConfig]) -> None:
    losses = {}
    for precision in ("fp32", "fp16", "bf16"):
        config = tiny(train__batch_size=6, train__precision=precision)
        session = build_train_state(config, CPU, "data")
        stepper = TrainStep(session, NextTokenObjective(session.model), config.train)
        losses[precision] = [float(stepper(work(batch())).nll) for _ in range(12)]
    assert losses["fp32"][-1] < losses["fp32"][0] - 0.5
    assert losses["fp16"] == pytest.approx(losses["fp32"], rel=0.01)
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.03)
