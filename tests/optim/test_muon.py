"""Muon against the SVD, against its own polynomial in closed form, against torch's Muon and a step worked in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from andromeda.optim import Muon
from andromeda.optim.muon import orthogonalize

SHAPES = [(16, 16), (8, 24), (24, 8), (3, 12, 6)]


def polynomial(s: np.ndarray, steps: int = 5) -> np.ndarray:
    """What Newton-Schulz does to a singular value."""
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return s


def with_singular_values(rows: int, columns: int, values: np.ndarray) -> torch.Tensor:
    generator = np.random.default_rng(0)
    u, _, vt = np.linalg.svd(generator.standard_normal((rows, columns)), full_matrices=False)
    return torch.from_numpy(u * values @ vt)


@pytest.mark.parametrize(("rows", "columns"), [(16, 16), (8, 24), (24, 8)])
def test_keeps_singular_vectors_and_maps_values_by_the_polynomial(rows: int, columns: int) -> None:
    values = np.geomspace(1e-3, 1.0, min(rows, columns))
    g = with_singular_values(rows, columns, values)
    u, s, vt = np.linalg.svd(g.numpy(), full_matrices=False)
    expected = u * polynomial(s / np.sqrt((s**2).sum())) @ vt
    np.testing.assert_allclose(orthogonalize(g).numpy(), expected, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_singular_values_land_in_the_known_band(dtype: torch.dtype) -> None:
    """Every normalized value of at least 0.01 ends in [0.68, 1.13]; bfloat16 adds its rounding."""
    values = np.concatenate([[1.0], np.geomspace(0.02, 0.9, 15)])
    g = with_singular_values(32, 16, values)
    assert values.min() / np.sqrt((values**2).sum()) >= 0.01
    s = torch.linalg.svdvals(orthogonalize(g, dtype=dtype).double())
    slack = 0.03 if dtype == torch.bfloat16 else 0.005
    assert s.min() > 0.68 - slack
    assert s.max() < 1.13 + slack


def test_reference_values() -> None:
    """Published behavior at single values: .001 -> .47, .003 -> 1.11, .01 -> .70, .1 -> .71, 1 -> .70."""
    known = {0.001: 0.47, 0.003: 1.11, 0.01: 0.70, 0.1: 0.71}
    for value, expected in known.items():
        rest = np.sqrt(1 - value**2)
        s = torch.linalg.svdvals(orthogonalize(torch.diag(torch.tensor([rest, value], dtype=torch.float64))))
        assert min(abs(s.numpy() - expected)) < 0.01
    assert orthogonalize(torch.ones(1, 1)).item() == pytest.approx(0.70, abs=0.01)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1e-3, 1e3, 1e-8])
def test_does_not_depend_on_the_scale(shape: tuple[int, ...], scale: float) -> None:
    g = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    change = orthogonalize(g * scale) - orthogonalize(g)
    assert change.norm() / orthogonalize(g).norm() < 1e-5


def test_no_gradient_no_direction() -> None:
    assert torch.equal(orthogonalize(torch.zeros(2, 4, 3)), torch.zeros(2, 4, 3))


def float64_step(w: np.ndarray, m: np.ndarray, g: np.ndarray, lr: float, mu: float, decay: float) -> tuple[np.ndarray, np.ndarray]:
    """One Muon step of one matrix, through the SVD instead of matmuls."""
    m = mu * m + g
    u, s, vt = np.linalg.svd(g + mu * m, full_matrices=False)
    direction = u * polynomial(s / np.sqrt((s**2).sum())) @ vt
    return w * (1 - lr * decay) - lr * max(1.0, w.shape[0] / w.shape[1]) ** 0.5 * direction, m


def test_steps_equal_a_float64_step_for_every_matrix() -> None:
    """Several shapes, several parameters of one shape, a stack of experts, and a momentum that changes on the way."""
    generator = np.random.default_rng(2)
    shapes = [(6, 4), (4, 6), (6, 4), (2, 4, 3)]
    params = [nn.Parameter(torch.from_numpy(generator.standard_normal(shape))) for shape in shapes]
    expected = [p.detach().numpy().reshape(-1, *p.shape[-2:]).copy() for p in params]
    momenta = [np.zeros_like(w) for w in expected]
    optimizer = Muon(params, lr=0.1, weight_decay=0.3)
    for mu in (0.85, 0.9, 0.95):
        optimizer.param_groups[0]["momentum"] = mu
        for p, w, m in zip(params, expected, momenta, strict=True):
            g = generator.standard_normal(p.shape)
            p.grad = torch.from_numpy(g)
            for i, one in enumerate(g.reshape(w.shape)):
                w[i], m[i] = float64_step(w[i], m[i], one, 0.1, mu, 0.3)
        optimizer.step()
    for p, w in zip(params, expected, strict=True):
        np.testing.assert_allclose(p.detach().numpy(), w.reshape(p.shape), atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES[:3])
def test_agrees_with_torchs_muon_while_the_momentum_is_constant(shape: tuple[int, ...]) -> None:
    """torch averages its momentum (a constant factor) and iterates in bfloat16, which leaves about one percent."""
    generator = torch.Generator().manual_seed(3)
    start = torch.randn(shape, generator=generator)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    a = Muon([ours], lr=0.05, weight_decay=0.1, momentum=0.95, dtype=torch.bfloat16)
    b = torch.optim.Muon([theirs], lr=0.05, weight_decay=0.1, momentum=0.95, nesterov=True)
    for _ in range(5):
        g = torch.randn(shape, generator=generator)
        ours.grad, theirs.grad = g.clone(), g.clone()
        a.step()
        b.step()
    moved = (theirs - start).norm()
    assert (ours - theirs).norm() / moved < 0.02


def test_vectors_are_refused() -> None:
    with pytest.raises(ValueError, match="belongs to AdamW"):
        Muon([nn.Parameter(torch.zeros(3))])
