"""Balances against the equations of their papers, and any split of a step against the whole."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from andromeda.config.loss import LossConfig
from andromeda.loss import Bernoulli, Categorical, Nebula, Numeric, PlackettLuce, PredictionTask, build_balance, next_token
from andromeda.loss.balance import BALANCES, FixedWeights, gradnorm_gradient
from andromeda.loss.nebula import shared_gradients
from tests.loss.heads import WIDTH, LabeledBatch, SmallHead, draw_hidden

WIDE = torch.float64
ALL = torch.ones(2, dtype=torch.bool)


def balance_of(
    name: str, declared: tuple[float, ...] = (1.0, 1.0), squared: tuple[bool, ...] = (False, True), **keys: float
) -> FixedWeights:
    return BALANCES[name](declared, squared, LossConfig.model_validate(keys))


def test_uncertainty_weights_are_kendalls() -> None:
    """e^-s L + s/2 for classes and e^-s L / 2 + s/2 for errors, by autograd; the optimum is e^s = 2 L and L."""
    losses = torch.tensor([0.7, 3.0], dtype=WIDE)
    s = torch.tensor([0.3, -0.4], dtype=WIDE, requires_grad=True)
    factor = torch.tensor([1.0, 0.5], dtype=WIDE)
    objective = (factor * torch.exp(-s) * losses + s / 2).sum()
    balance = balance_of("uncertainty")
    balance.load_state({"log_variance": s.detach(), "adam": torch.zeros(3, 2, dtype=WIDE)})
    torch.testing.assert_close((balance.weights * losses).sum() + s.detach().sum() / 2, objective.detach(), rtol=1e-12, atol=0)
    expected = nn.Parameter(s.detach().clone())
    adam = torch.optim.Adam([expected], lr=0.025)
    for _ in range(5):
        adam.zero_grad()
        (factor * torch.exp(-expected) * losses + expected / 2).sum().backward()
        adam.step()
        balance.update(losses, ALL)
    torch.testing.assert_close(balance.state_tensors()["log_variance"], expected.detach(), rtol=1e-10, atol=1e-12)
    for _ in range(3000):
        balance.update(losses, ALL)
    torch.testing.assert_close(balance.state_tensors()["log_variance"].exp(), torch.tensor([1.4, 3.0], dtype=WIDE), rtol=1e-3, atol=0)


def test_a_loss_of_zero_does_not_send_the_weight_to_infinity() -> None:
    balance = balance_of("uncertainty", weight_lr=1.0)
    for _ in range(200):
        balance.update(torch.zeros(2, dtype=WIDE), ALL)
    assert balance.weights.max() <= math.exp(10.0)


def test_gradnorm_follows_its_equations() -> None:
    """The gradient of sum |G_i - const| by autograd, with G_i the norm of the weighted loss's gradient (arXiv 1711.02257, section 3)."""
    # The third is above its target with alpha = 1.5 and below it with alpha = 1.
    norms, first = torch.tensor([2.0, 0.5, 0.95], dtype=WIDE), torch.tensor([4.0, 1.0, 2.0], dtype=WIDE)
    losses, w = torch.tensor([1.0, 0.9, 1.0], dtype=WIDE), torch.tensor([0.8, 1.2, 1.0], dtype=WIDE, requires_grad=True)
    sizes = w * norms
    ratio = losses / first
    target = (sizes.mean() * (ratio / ratio.mean()) ** 1.5).detach()
    (expected,) = torch.autograd.grad((sizes - target).abs().sum(), w)
    found = gradnorm_gradient(w.detach(), norms, losses, first, torch.ones(3, dtype=torch.bool), 1.5)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_gradnorm_makes_equal_gradients_of_equal_rates_and_keeps_the_sum() -> None:
    balance, norms = balance_of("gradnorm", declared=(1.0, 2.0), weight_lr=0.01), torch.tensor([9.0, 1.0], dtype=WIDE)
    for _ in range(2000):
        balance.update(torch.tensor([1.0, 5.0], dtype=WIDE), ALL, norms)
    assert float(balance.weights.sum()) == pytest.approx(3.0, abs=1e-12)
    assert float(balance.weights[0] * 9) == pytest.approx(float(balance.weights[1]), rel=0.15)


def test_gradnorm_pulls_up_the_task_that_has_come_less_far() -> None:
    balance, norms = balance_of("gradnorm"), torch.ones(2, dtype=WIDE)
    balance.update(torch.tensor([2.0, 2.0], dtype=WIDE), ALL, norms)
    for _ in range(20):
        balance.update(torch.tensor([1.0, 1.9], dtype=WIDE), ALL, norms)
    assert balance.weights[1] > balance.weights[0]


def test_dynamic_weight_average_is_its_equation() -> None:
    """Declared weights for two spans; then w_i proportional to exp(L_i(k-1) / L_i(k-2) / T) (arXiv 1803.10704, equation 7)."""
    balance = balance_of("dwa", every=2, temperature=2.0)
    spans = [[(4.0, 1.0), (2.0, 3.0)], [(1.0, 2.0), (2.0, 1.6)]]
    for span in spans:
        torch.testing.assert_close(balance.weights, torch.ones(2, dtype=WIDE))
        for losses in span:
            balance.update(torch.tensor(losses, dtype=WIDE), ALL)
    shares = [math.exp(1.5 / 3 / 2), math.exp(1.8 / 2 / 2)]
    expected = 2 * torch.tensor(shares, dtype=WIDE) / sum(shares)
    torch.testing.assert_close(balance.weights, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["uncertainty", "gradnorm", "dwa"])
def test_a_task_without_targets_teaches_nothing_and_state_is_restored(name: str) -> None:
    balance, other, norms = balance_of(name, every=1), balance_of(name, every=1), torch.ones(2, dtype=WIDE)
    balance.update(torch.tensor([2.0, 1.0], dtype=WIDE), ALL, norms)
    before = {key: value.clone() for key, value in balance.state_tensors().items()}
    balance.update(torch.tensor([1.0, 0.0], dtype=WIDE), torch.tensor([True, False]), norms)
    key = {"uncertainty": "log_variance", "gradnorm": "first_losses"}.get(name)
    if key:
        assert balance.state_tensors()[key][1] == before[key][1]
    assert balance.weights.isfinite().all()
    other.load_state(dict(balance.state_tensors()))
    for one in (balance, other):
        one.update(torch.tensor([1.5, 0.5], dtype=WIDE), ALL, norms)
    assert torch.equal(balance.weights, other.weights)


def several() -> tuple[dict[str, SmallHead], list[PredictionTask], LabeledBatch]:
    """Five tasks of different kinds whose targets are spread unevenly over six rows."""
    draw = torch.Generator().manual_seed(2)
    heads = {"head": SmallHead(11), "kind": SmallHead(3, 1), "tags": SmallHead(4, 2), "stars": SmallHead(2, 3), "better": SmallHead(1, 4)}
    tasks = [
        next_token(weight=0.5),
        PredictionTask("kind", Categorical(), "kind", "kind", 2.0),
        PredictionTask("tags", Bernoulli(), "tags", "tags", 0.3),
        PredictionTask("stars", Numeric(learn_scale=True), "stars", "stars", 0.7, squared=True),
        PredictionTask("better", PlackettLuce(), "better", "better", 1.0),
    ]
    targets = torch.randint(11, (6, 8), generator=draw)
    kind = torch.full((6, 8), -100)
    kind[0, 7], kind[3, 2], kind[3, 7] = 2, 0, 1
    tags = torch.randint(2, (6, 8, 4), generator=draw, dtype=torch.uint8)
    tags[torch.rand(6, 8, 4, generator=draw) < torch.linspace(0, 1, 6)[:, None, None]] = 255
    stars = torch.randn(6, 8, generator=draw, dtype=WIDE)
    stars[2:] = math.nan
    better = torch.full((6, 8), -100)
    better[4, 3], better[4, 6], better[5, 1], better[5, 7] = 0, 1, 65, 64
    targets[5] = -100
    return heads, tasks, LabeledBatch(targets, {"kind": kind, "tags": tags, "stars": stars, "better": better})


@pytest.mark.parametrize("cuts", [[0, 1, 6], [0, 2, 4, 6], [0, 1, 2, 3, 4, 5, 6]])
@pytest.mark.parametrize("name", list(BALANCES))
def test_any_split_of_a_step_has_the_gradient_of_the_whole(name: str, cuts: list[int]) -> None:
    """In one piece each mean is over its own targets; a piece without targets of a task adds nothing to it."""
    heads, tasks, batch = several()
    x = draw_hidden(6, 8)
    config = LossConfig(balance=name)  # type: ignore[arg-type]
    balance = build_balance(tasks, name, config)
    balance.update(
        torch.rand(5, generator=torch.Generator().manual_seed(5), dtype=WIDE) + 0.1, torch.ones(5, dtype=torch.bool), torch.ones(5)
    )
    loss, parameters = Nebula(tasks, balance, config), [p for head in heads.values() for p in head.parameters()]
    expected = torch.autograd.grad(loss(heads, x, batch).total, parameters)
    normalizer = loss.counts(batch)
    for a, b in itertools.pairwise(cuts):
        piece = batch.map(lambda value, a=a, b=b: value[a:b])  # type: ignore[misc]
        loss(heads, x[a:b], piece, normalizer).total.backward()
    for p, wanted in zip(parameters, expected, strict=True):
        torch.testing.assert_close(p.grad, wanted, rtol=1e-12, atol=1e-14)


def test_weights_are_those_of_the_balance() -> None:
    heads, tasks, batch = several()
    loss = Nebula(tasks, "uncertainty")
    result = loss(heads, draw_hidden(6, 8), batch)
    parts = torch.stack(list(result.parts.values()))
    expected = (torch.tensor([0.5, 2.0, 0.3, 0.35, 1.0], dtype=WIDE) * parts).sum()
    torch.testing.assert_close(result.total.detach(), expected, rtol=1e-12, atol=0)


def reference_gradients(x: Tensor) -> Tensor:
    """Gradient of each task's mean by a linear layer at the identity, by autograd."""
    heads, tasks, batch = several()
    layer = torch.eye(WIDTH, dtype=WIDE, requires_grad=True)
    sums = Nebula(tasks).sums(heads, x @ layer.T, batch)
    return torch.stack([torch.autograd.grad(one.total / one.tokens, layer, retain_graph=True)[0] for one in sums.values()])


def test_gradients_of_the_shared_layer_are_those_of_a_linear_layer_at_the_identity() -> None:
    heads, tasks, batch = several()
    x = draw_hidden(6, 8).requires_grad_()
    loss = Nebula(tasks, "gradnorm")
    total = torch.zeros((), dtype=WIDE)
    for a in (0, 2, 4):
        part, piece = x[a : a + 2], batch.map(lambda value, a=a: value[a : a + 2])  # type: ignore[misc]
        total = total + shared_gradients(loss.hidden_gradients(loss.sums(heads, part, piece), part), part)
    counts = torch.stack(list(loss.counts(batch).values()))
    torch.testing.assert_close(total / counts[:, None, None], reference_gradients(x.detach()), rtol=1e-12, atol=1e-14)
