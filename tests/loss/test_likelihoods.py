"""Likelihoods against scipy, scikit-learn and torch's own losses in float64; masks; which likelihood a target asks for."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, distributions

from andromeda.loss import Bernoulli, Categorical, Numeric, PlackettLuce, SoftCategorical, infer_likelihood
from andromeda.loss.distillation import Distillation, divergence
from andromeda.utils.errors import ConfigError
from tests.loss.heads import SmallHead, draw_hidden

LOOSE = {"rtol": 1e-10, "atol": 1e-10}


def draw(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def numbers(missing: float = 0.4) -> Tensor:
    """Numbers (6, 8), some missing; the last row has none."""
    found = torch.randn(6, 8, generator=draw(), dtype=torch.float64) * 3 + 1
    found[torch.rand(6, 8, generator=draw(4)) < missing] = math.nan
    found[5] = math.nan
    return found


def test_gaussian_is_scipys_density_and_torchs_loss() -> None:
    head, hidden, target = SmallHead(1), draw_hidden(), numbers()
    sums = Numeric("gaussian")(head, hidden, target)
    known = ~target.isnan()
    mean = head(hidden)[..., 0][known]
    assert sums.tokens == known.sum() == Numeric().count(target)
    torch.testing.assert_close(sums.total, -distributions.Normal(mean, 1.0).log_prob(target[known]).sum(), **LOOSE)
    constant = 0.5 * math.log(2 * math.pi) * int(known.sum())
    torch.testing.assert_close(sums.total - constant, 0.5 * F.mse_loss(mean, target[known], reduction="sum"), **LOOSE)
    stats = pytest.importorskip("scipy.stats", reason="scipy comes with scikit-learn")
    assert float(sums.nll) == pytest.approx(-stats.norm.logpdf(target[known].numpy(), mean.detach().numpy()).sum(), abs=1e-10)


@pytest.mark.parametrize(("kind", "law"), [("gaussian", distributions.Normal), ("laplace", distributions.Laplace)])
def test_learned_scales_are_those_of_torchs_distributions(kind: str, law: Any) -> None:
    """In standardized units: the number minus shift, over scale."""
    head, hidden, target = SmallHead(2), draw_hidden(), numbers()
    sums = Numeric(kind, shift=0.7, scale=2.5, learn_scale=True)(head, hidden, target)
    known = ~target.isnan()
    location, log_scale = head(hidden)[known].unbind(-1)
    expected = -law(location, log_scale.exp()).log_prob((target[known] - 0.7) / 2.5).sum()
    torch.testing.assert_close(sums.total, expected, **LOOSE)
    gradients = (torch.autograd.grad(total, [head.weight, head.bias], retain_graph=True) for total in (sums.total, expected))
    for found, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(found, wanted, **LOOSE)


def test_laplace_is_absolute_error_with_its_constant() -> None:
    head, hidden, target = SmallHead(1), draw_hidden(), numbers()
    known = ~target.isnan()
    error = F.l1_loss(head(hidden)[..., 0][known], target[known], reduction="sum")
    torch.testing.assert_close(Numeric("laplace")(head, hidden, target).total, error + math.log(2) * int(known.sum()), **LOOSE)


def test_poisson_is_scikit_learns_deviance() -> None:
    """Half the deviance is the loss minus that of the saturated model."""
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
    head, hidden = SmallHead(1), draw_hidden()
    target = torch.poisson(torch.full((6, 8), 3.0, dtype=torch.float64), generator=draw())
    target[0, :5] = math.nan
    known = ~target.isnan()
    truth, rate = target[known], head(hidden)[..., 0][known].exp()
    sums = Numeric("poisson")(head, hidden, target)
    torch.testing.assert_close(sums.total, -distributions.Poisson(rate).log_prob(truth).sum(), **LOOSE)
    saturated = -distributions.Poisson(truth.clamp(min=1e-300)).log_prob(truth).sum()
    half = 0.5 * metrics.mean_poisson_deviance(truth.numpy(), rate.detach().numpy()) * len(truth)
    assert float((sums.total - saturated).detach()) == pytest.approx(half, abs=1e-10)


def test_bernoulli_is_scikit_learns_log_loss() -> None:
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
    head, hidden = SmallHead(3), draw_hidden()
    target = torch.randint(2, (6, 8, 3), generator=draw(), dtype=torch.uint8)
    target[torch.rand(6, 8, 3, generator=draw(4)) < 0.3] = 255
    known = target != 255
    sums = Bernoulli()(head, hidden, target)
    p = head(hidden).sigmoid()[known].detach().numpy()
    assert sums.tokens == known.sum()
    assert float(sums.nll) == pytest.approx(metrics.log_loss(target[known].numpy(), p) * int(known.sum()), abs=1e-10)


def test_classes_are_scikit_learns_log_loss() -> None:
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
    head, hidden = SmallHead(4), draw_hidden()
    target = torch.randint(4, (6, 8), generator=draw())
    target[torch.rand(6, 8, generator=draw(4)) < 0.5] = -100
    sums, known = Categorical()(head, hidden, target), target != -100
    p = head(hidden).softmax(-1)[known].detach().numpy()
    expected = metrics.log_loss(target[known].numpy(), p / p.sum(-1, keepdims=True), labels=np.arange(4)) * int(known.sum())
    assert float(sums.nll) == pytest.approx(expected, abs=1e-10)


def test_distributions_are_torchs_cross_entropy() -> None:
    head, hidden = SmallHead(4), draw_hidden()
    target = torch.rand(6, 8, 4, generator=draw(), dtype=torch.float64)
    target /= target.sum(-1, keepdim=True)
    target[2, 3:] = math.nan
    known = ~target.isnan().any(-1)
    sums = SoftCategorical()(head, hidden, target)
    torch.testing.assert_close(sums.total, F.cross_entropy(head(hidden)[known], target[known], reduction="sum"), **LOOSE)
    assert sums.tokens == known.sum()


def ranks(rows: list[list[tuple[int, int, int]]], T: int = 8) -> Tensor:
    """Targets with (position, group, rank) in each row."""
    target = torch.full((len(rows), T), -100)
    for row, items in enumerate(rows):
        for position, group, rank in items:
            target[row, position] = group * 64 + rank
    return target


def test_preference_is_bradley_terry() -> None:
    """Two pairs, one of which begins with the rejected document, half a pair, and a row with none."""
    head, hidden = SmallHead(1), draw_hidden(B=3)
    target = ranks([[(1, 0, 0), (3, 0, 1), (4, 2, 1), (7, 2, 0)], [(2, 1, 0)], []])
    sums, s = PlackettLuce()(head, hidden, target), head(hidden)[..., 0]
    expected = -F.logsigmoid(s[0, 1] - s[0, 3]) - F.logsigmoid(s[0, 7] - s[0, 4])
    assert sums.tokens == PlackettLuce().count(target) == 2
    torch.testing.assert_close(sums.total, expected, **LOOSE)
    found, wanted = (torch.autograd.grad(total, head.weight, retain_graph=True)[0] for total in (sums.total, expected))
    torch.testing.assert_close(found, wanted, **LOOSE)


def test_rankings_have_plackett_luces_probabilities() -> None:
    """Over all orders of four documents they sum to one, and a part of a ranking is a ranking of the part."""
    head, hidden = SmallHead(1), draw_hidden(B=1)
    likelihood, total = PlackettLuce(4), 0.0
    for order in itertools.permutations(range(4)):
        total += math.exp(-float(likelihood(head, hidden, ranks([[(2 * i, 0, rank) for i, rank in enumerate(order)]])).nll))
    assert total == pytest.approx(1.0, abs=1e-12)
    part = likelihood(head, hidden, ranks([[(0, 3, 2), (4, 3, 1)]]))
    s = head(hidden)[0, :, 0]
    torch.testing.assert_close(part.total, -F.logsigmoid(s[4] - s[0]), **LOOSE)
    assert part.tokens == 1


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_divergences_are_scipys(kind: str) -> None:
    special = pytest.importorskip("scipy.special", reason="scipy comes with scikit-learn")
    teacher, student = (torch.randn(5, 7, generator=draw(seed), dtype=torch.float64) * 2 for seed in (1, 2))
    p, q = teacher.softmax(-1).numpy(), student.softmax(-1).numpy()
    beta = 0.3
    m = beta * p + (1 - beta) * q
    expected = {
        "forward_kl": special.rel_entr(p, q),
        "reverse_kl": special.rel_entr(q, p),
        "jsd": beta * special.rel_entr(p, m) + (1 - beta) * special.rel_entr(q, m),
    }[kind].sum(-1)
    np.testing.assert_allclose(divergence(teacher, student, kind, beta).numpy(), expected, atol=1e-10)
    assert divergence(teacher, teacher, kind).abs().max() < 1e-14


def test_distillation_has_the_gradient_of_soft_targets_and_none_at_the_teacher() -> None:
    """d/dz T^2 KL(p || softmax(z / T)) = T (softmax(z / T) - p) (arXiv 1503.02531)."""
    student, teacher, x, t = SmallHead(11), SmallHead(11, seed=7), draw_hidden(), draw_hidden(seed=9)
    targets = torch.randint(11, (6, 8), generator=draw())
    targets[1:3] = -100
    sums = Distillation("forward_kl", temperature=2.0)(student, x, teacher, t, targets)
    sums.total.backward()
    known = (targets != -100).flatten()
    gap = 2.0 * ((student(x) / 2).softmax(-1) - (teacher(t) / 2).softmax(-1)).flatten(0, 1)[known]
    torch.testing.assert_close(student.weight.grad, (gap.T @ x.flatten(0, 1)[known]).detach(), **LOOSE)
    assert teacher.weight.grad is None
    same = Distillation("reverse_kl")(teacher, t, teacher, t, targets)
    same.total.backward()
    assert teacher.weight.grad is not None
    assert abs(float(same.nll)) < 1e-12
    assert teacher.weight.grad.abs().max() < 1e-12


@pytest.mark.parametrize(
    "likelihood", [Numeric("gaussian"), Numeric("laplace"), Numeric("poisson"), Bernoulli(), SoftCategorical(), PlackettLuce()]
)
def test_what_is_masked_never_counts(likelihood: Any) -> None:
    """Not its value, not its hidden state, not in the divisor, and no gradient is NaN."""
    shape = (6, 8, 2) if isinstance(likelihood, Bernoulli | SoftCategorical) else (6, 8)
    floating = not isinstance(likelihood, PlackettLuce)
    target = torch.full(shape, math.nan, dtype=torch.float64) if floating else torch.full(shape, -100)
    hidden, head = draw_hidden().requires_grad_(), SmallHead(2)
    sums = likelihood(head, hidden, target)
    sums.total.backward()
    assert sums.total == sums.tokens == likelihood.count(target) == 0
    assert hidden.grad is not None
    assert (hidden.grad == 0).all()
    assert head.weight.grad is None or (head.weight.grad == 0).all()


def test_the_target_names_its_likelihood() -> None:
    classes, labels = torch.tensor([[0, 2, -100]]), torch.tensor([[[0, 1], [1, 255]]], dtype=torch.uint8)
    assert infer_likelihood(classes, 3) == Categorical()
    assert infer_likelihood(labels, 2) == infer_likelihood(labels == 1, 2) == Bernoulli()
    assert infer_likelihood(torch.tensor([[0.5, -2.0, math.nan]]), 1) == Numeric("gaussian")
    assert infer_likelihood(torch.tensor([[0.5, -2.0]]), 2) == Numeric("gaussian", learn_scale=True)
    assert infer_likelihood(torch.tensor([[[0.2, 0.8], [0.5, 0.5]]]), 2) == SoftCategorical()
    assert infer_likelihood(torch.tensor([[[0.2, 0.9], [1.0, 1.0]]]), 2) == Bernoulli()


@pytest.mark.parametrize(
    ("target", "outputs", "sentence"),
    [
        (torch.tensor([[1, 2]]), 1, "count .Poisson. and a quantity .Gaussian."),
        (torch.tensor([[1, 5]]), 3, "classes from 1 to 5, and its head gives 3 outputs: set num_labels"),
        (torch.tensor([[1.0, 5.0]]), 1, "may be classes, counts or quantities"),
        (torch.tensor([[1.5]]), 4, "one number for a token, and its head gives 4"),
        (torch.tensor([[[0.0, 1.0]]]), 2, "may be a class or a label"),
        (torch.tensor([[[0.0, 1.5]]]), 2, "a regression head for each"),
        (torch.tensor([[[0.0, 1.5]]]), 3, "2 values for a token, and its head gives 3"),
        (torch.tensor([[[0, 7]]]), 2, "labels are 0 or 1"),
        (torch.tensor([1.5]), 1, r"shape \(1,\)"),
    ],
)
def test_an_ambiguous_target_is_one_sentence(target: Tensor, outputs: int, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence) as error:
        infer_likelihood(target, outputs, "stars")
    assert str(error.value).startswith("stars ")
