"""Clipping against torch.nn.utils and against formulas worked in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from andromeda.config.train import ClipConfig
from andromeda.optim import clip_gradients
from andromeda.optim.clipping import clip_units

SHAPES = [(5, 3), (4,), (2, 3, 4), (6, 1)]


def parameters(scale: float = 1.0, seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    made = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    for p in made:
        p.grad = torch.randn(p.shape, generator=generator) * scale
    return made


def grads(params: list[nn.Parameter]) -> list[torch.Tensor]:
    return [p.grad.clone() for p in params if p.grad is not None]


def float64_norm(params: list[nn.Parameter]) -> float:
    return float(np.sqrt(sum((g.double().numpy() ** 2).sum() for g in grads(params))))


@pytest.mark.parametrize("kind", ["none", "norm", "value", "adaptive"])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
def test_returns_the_global_norm_before_clipping(kind: str, scale: float) -> None:
    params = parameters(scale)
    before = float64_norm(params)
    norm = clip_gradients(params, ClipConfig.model_validate({"kind": kind, "limit": 0.5}))
    assert norm.shape == ()
    assert norm.item() == pytest.approx(before, rel=1e-6)


@pytest.mark.parametrize("limit", [0.1, 1.0, 1e3])
def test_norm_and_value_equal_torch(limit: float) -> None:
    ours, theirs = parameters(), parameters()
    clip_gradients(ours, ClipConfig(kind="norm", limit=limit))
    nn.utils.clip_grad_norm_(theirs, limit)
    assert all(torch.equal(a, b) for a, b in zip(grads(ours), grads(theirs), strict=True))
    ours, theirs = parameters(), parameters()
    clip_gradients(ours, ClipConfig(kind="value", limit=limit))
    nn.utils.clip_grad_value_(theirs, limit)
    assert all(torch.equal(a, b) for a, b in zip(grads(ours), grads(theirs), strict=True))


def test_norm_by_hand() -> None:
    params = parameters(10.0)
    before = [g.double() for g in grads(params)]
    coefficient = min(1.0, 1.0 / (float64_norm(params) + 1e-6))
    clip_gradients(params, ClipConfig(kind="norm", limit=1.0))
    for got, was in zip(grads(params), before, strict=True):
        torch.testing.assert_close(got.double(), was * coefficient, rtol=1e-6, atol=0)


def test_none_touches_nothing() -> None:
    params = parameters(1e6)
    before = grads(params)
    clip_gradients(params, ClipConfig(kind="none"))
    assert all(torch.equal(a, b) for a, b in zip(before, grads(params), strict=True))


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e3])
def test_adaptive_by_hand(scale: float) -> None:
    """Brock et al. eq. 3, one unit at a time, with plain loops over rows in float64."""
    limit = 0.01
    params = parameters(scale)
    params[0].data[0] = 0.0
    before = [g.double().numpy() for g in grads(params)]
    clip_gradients(params, ClipConfig(kind="adaptive", limit=limit))
    for p, was, got in zip(params, before, grads(params), strict=True):
        w = p.detach().double().numpy()
        rows = (lambda a: a.reshape(-1, a.shape[-1])) if p.ndim > 1 else (lambda a: a[None])
        expected = []
        for w_row, g_row in zip(rows(w), rows(was), strict=True):
            allowed = limit * max(float(np.sqrt((w_row**2).sum())), 1e-3)
            length = float(np.sqrt((g_row**2).sum()))
            expected.append(g_row * (allowed / length if length > allowed else 1.0))
        np.testing.assert_allclose(rows(got.double().numpy()), np.array(expected), rtol=2e-6)


def test_adaptive_equals_timms_formula_for_matrices_and_vectors() -> None:
    """timm/utils/agc.py, as published: unit norms over all but the first dimension, a floor of 1e-6 under the divisor."""

    def unitwise(x: torch.Tensor) -> torch.Tensor:
        return x.norm(2.0) if x.ndim <= 1 else x.norm(2.0, dim=tuple(range(1, x.ndim)), keepdim=True)

    params = [p for p in parameters(0.02) if p.ndim < 3]
    before = grads(params)
    clip_units(params, 0.01)
    for p, g, got in zip(params, before, grads(params), strict=True):
        longest = unitwise(p.detach()).clamp(min=1e-3).mul(0.01)
        shortened = g * (longest / unitwise(g).clamp(min=1e-6))
        torch.testing.assert_close(got, torch.where(unitwise(g) < longest, g, shortened), rtol=1e-6, atol=1e-9)


def test_adaptive_lets_a_zero_row_move_by_the_floor_only() -> None:
    p = nn.Parameter(torch.zeros(1, 4))
    p.grad = torch.ones(1, 4)
    clip_gradients([p], ClipConfig(kind="adaptive", limit=0.01))
    assert p.grad.norm().item() == pytest.approx(1e-5)


def test_missing_gradients_and_bad_ones() -> None:
    assert clip_gradients([nn.Parameter(torch.ones(2))], ClipConfig()).item() == 0.0
    params = parameters()
    assert params[0].grad is not None
    params[0].grad[0, 0] = float("nan")
    assert clip_gradients(params, ClipConfig()).isnan()
