"""Nebula: declared tasks, their weights, masks and normalizers, against float64 sums worked apart from it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from andromeda.loss import Categorical, LossHead, LossSums, Nebula, PredictionTask, next_token
from andromeda.ops.cross_entropy import reference
from andromeda.utils.errors import ConfigError


class TinyHead(nn.Module):
    def __init__(self, V: int = 11, C: int = 5, softcap: float = 0.0, bias: bool = False, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(V, C, generator=generator, dtype=torch.float64))
        self.bias = nn.Parameter(torch.randn(V, generator=generator, dtype=torch.float64)) if bias else None
        self.softcap = softcap


@dataclass(frozen=True)
class Batch:
    targets: Tensor
    labels: Tensor

    def rows(self, start: int, stop: int) -> Batch:
        return replace(self, targets=self.targets[start:stop], labels=self.labels[start:stop])


def problem(B: int = 6, T: int = 4) -> tuple[Tensor, Batch]:
    """Hidden states and targets whose rows have 4, 3, 2, 1, 0 and 4 that count."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(B, T, 5, generator=generator, dtype=torch.float64)
    targets = torch.randint(11, (B, T), generator=generator)
    for row in range(B):
        targets[row, : row % 5] = -100
    return hidden, Batch(targets, torch.randint(3, (B, T), generator=generator))


@dataclass(frozen=True)
class SquaredError:
    """A likelihood that is not categorical: the wall that later tasks need must hold one."""

    def count(self, target: Tensor) -> Tensor:
        return torch.tensor(target.numel())

    def __call__(self, head: LossHead, hidden: Tensor, target: Tensor) -> LossSums:
        error = 0.5 * ((hidden @ head.weight.T)[..., 0] - target).square().sum()
        return LossSums(error, error.detach(), self.count(target))


@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_next_token_is_the_mean_over_counted_targets(softcap: float, bias: bool, z_loss: float) -> None:
    hidden, batch = problem()
    head = TinyHead(softcap=softcap, bias=bias)
    result = Nebula([next_token(z_loss)])(head, hidden, batch)
    expected = reference(hidden, head.weight, batch.targets, bias=head.bias, softcap=softcap, z_loss=z_loss)
    assert result.tokens == 14
    torch.testing.assert_close(result.total, expected.total / 14)
    torch.testing.assert_close(result.parts, {"next_token": expected.nll / 14})
    assert not result.parts["next_token"].requires_grad


@pytest.mark.parametrize("cuts", [[0, 6], [0, 1, 6], [0, 2, 4, 6], [0, 4, 5, 6]])
def test_any_split_of_a_step_has_the_gradient_of_the_whole(cuts: list[int]) -> None:
    """Micro-batches with 4, 3, 2, 1 and 0 targets: the mean of their means would be wrong, the common divisor is not."""
    hidden, batch = problem()
    head = TinyHead(softcap=3.0)
    whole_head = TinyHead(softcap=3.0)
    (reference(hidden, whole_head.weight, batch.targets, softcap=3.0).total / 14).backward()
    loss = Nebula([next_token()])
    pieces = [(hidden[a:b], batch.rows(a, b)) for a, b in itertools.pairwise(cuts)]
    normalizer = {"next_token": sum(loss.counts(piece)["next_token"] for _, piece in pieces)}
    results = [loss(head, h, piece, normalizer) for h, piece in pieces]
    for result in results:
        result.total.backward()
    torch.testing.assert_close(head.weight.grad, whole_head.weight.grad)
    total = sum(result.parts["next_token"].item() for result in results)
    assert total == pytest.approx(loss(head, hidden, batch).parts["next_token"].item())


def test_a_batch_without_targets_gives_zero() -> None:
    hidden, batch = problem()
    result = Nebula([next_token(z_loss=1.0)])(TinyHead(), hidden, replace(batch, targets=torch.full_like(batch.targets, -100)))
    assert (result.total, result.tokens, result.parts["next_token"]) == (0, 0, 0)


def test_tasks_of_other_heads_and_likelihoods_are_weighed_and_reported() -> None:
    """0.5 x next token + 2 x classification by its own head + 0.1 x a regression: each its own divisor."""
    hidden, batch = problem()
    heads = {"head": TinyHead(), "classes": TinyHead(V=3, seed=1), "value": TinyHead(V=1, seed=2)}
    tasks = [
        next_token(weight=0.5),
        PredictionTask("kind", Categorical(), head="classes", target="labels", weight=2.0),
        PredictionTask("score", SquaredError(), head="value", target="labels", weight=0.1),
    ]
    result = Nebula(tasks)(heads, hidden, batch)
    first = reference(hidden, heads["head"].weight, batch.targets).total / 14
    second = reference(hidden, heads["classes"].weight, batch.labels).total / 24
    third = 0.5 * ((hidden @ heads["value"].weight[0]) - batch.labels).square().mean()
    torch.testing.assert_close(result.total, 0.5 * first + 2.0 * second + 0.1 * third)
    torch.testing.assert_close(result.parts, {"next_token": first.detach(), "kind": second.detach(), "score": third.detach()})
    result.total.backward()
    assert all(head.weight.grad is not None for head in heads.values())


def test_a_class_with_the_face_of_a_task_is_one() -> None:
    """A task that makes its own targets (here: the token after the next) needs nothing but the protocol."""

    class AfterNext:
        name, weight = "after_next", 1.0

        def count(self, batch: Any) -> Tensor:
            return (batch.targets[:, 1:] != -100).sum()

        def __call__(self, heads: Mapping[str, LossHead], hidden: Tensor, batch: Any) -> LossSums:
            return Categorical()(heads["head"], hidden[:, :-1], batch.targets[:, 1:])

    hidden, batch = problem()
    head = TinyHead()
    result = Nebula([AfterNext()])(head, hidden, batch)
    expected = reference(hidden[:, :-1], head.weight, batch.targets[:, 1:])
    torch.testing.assert_close(result.total, expected.total / expected.tokens)


def test_refusals() -> None:
    hidden, batch = problem()
    with pytest.raises(ConfigError, match=r"no balance 'fixd' \(did you mean fixed\?\)"):
        Nebula([next_token()], balance="fixd")
    with pytest.raises(ConfigError, match="has next_token, next_token"):
        Nebula([next_token(), next_token()])
    with pytest.raises(ConfigError, match="has none"):
        Nebula([])
    with pytest.raises(ConfigError, match=r"head 'heed', which the model does not have \(did you mean head\?\)"):
        Nebula([PredictionTask("x", Categorical(), head="heed")])(TinyHead(), hidden, batch)
