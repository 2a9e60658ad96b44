"""Matmuls in 8 bits, forward and backward, against float64; bounds that hold for any input. The kernels are emulated on a CPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from andromeda.ops.float8 import float8_linear, quantize_weight
from andromeda.ops.mlp import gelu_mlp_fp8
from tests.ops import emulated8

N, C, H = 64, 48, 80
ROUNDED, GRADIENT = 2.0**-4 / 3**0.5, 2.0**-3 / 3**0.5
"""Root mean square of the rounding of e4m3 and e5m2, of numbers that are rounded by as much as can be."""


def parameters() -> list[Tensor]:
    """x (2, N / 2, C), w1 (H, C), b1 (H,), w2 (C, H), b2 (C,)."""
    g = torch.Generator().manual_seed(0)
    shapes = ((2, N // 2, C), (H, C), (H,), (C, H), (C,))
    return [(torch.randn(s, generator=g) * (s[-1] ** -0.5 if len(s) == 2 else 1)).requires_grad_() for s in shapes]


def network(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """In 8 bits."""
    return gelu_mlp_fp8(x, quantize_weight(w1.detach()), w1, b1, quantize_weight(w2.detach()), w2, b2)


def exact(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """The definition."""
    return F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)


def far(found: Tensor, wanted: Tensor) -> float:
    """Relative distance."""
    return float((found.detach().double() - wanted.detach()).norm() / wanted.detach().norm())


@pytest.mark.parametrize("frozen", [None, 0, 1, 2, 3, 4])
def test_network(frozen: int | None) -> None:
    """Errors of factors that are rounded apart from each other add up as squares: two a matmul, and those of what came before."""
    ours, theirs = parameters(), [p.detach().double().requires_grad_() for p in parameters()]
    for leaves in (ours, theirs):
        if frozen is not None:
            leaves[frozen].requires_grad_(False)
    y, wanted = network(*ours), exact(*theirs)
    assert y.dtype == torch.bfloat16
    assert far(y, wanted) < (4 * ROUNDED**2) ** 0.5
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    y.backward(dy)
    wanted.backward(dy.double())
    for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if number == frozen:
            assert a.grad is None
            continue
        assert a.grad is not None
        assert b.grad is not None
        assert a.grad.dtype == a.dtype
        assert 0 <= far(a.grad, b.grad) < (2 * GRADIENT**2 + 4 * ROUNDED**2) ** 0.5


@pytest.mark.parametrize("bias", [True, False])
def test_layers_side_by_side(bias: bool) -> None:
    """One matmul for two weights with rows of zeros below; gradients arrive at each."""
    x, w1, _, w2, _ = parameters()
    weights = [w1.detach(), w2.detach().mT[:16, :C].contiguous()]
    ours = [x, *(w.clone().requires_grad_() for w in weights)]
    theirs = [p.detach().double().requires_grad_() for p in ours]
    shift = torch.randn(112).requires_grad_() if bias else None
    y = float8_linear(ours[0], quantize_weight(torch.cat([*weights, torch.zeros(16, C)])), ours[1:], shift)
    wanted = F.linear(theirs[0], torch.cat([*theirs[1:], torch.zeros(16, C)]), None if shift is None else shift.detach().double())
    assert far(y, wanted) < (2 * ROUNDED**2) ** 0.5
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    y.backward(dy)
    wanted.backward(dy.double())
    for a, b in zip(ours, theirs, strict=True):
        assert a.grad is not None
        assert a.grad.shape == a.shape
        assert b.grad is not None
        assert far(a.grad, b.grad) < (GRADIENT**2 + ROUNDED**2) ** 0.5
    if shift is not None:
        assert shift.grad is not None
        torch.testing.assert_close(shift.grad, dy.float().sum((0, 1)))


SPIKES = st.lists(st.tuples(st.integers(0, 2**16), st.floats(-1e4, 1e4)), max_size=3)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**16), *[SPIKES] * 4, st.floats(1e-3, 30), st.floats(1e-3, 30), st.floats(1e-8, 1e3))
def test_nothing_exceeds_its_bound(
    seed: int, x_spikes: list, w_spikes: list, v_spikes: list, dy_spikes: list, x_size: float, w_size: float, dy_size: float
) -> None:  # fmt: skip
    """The scales that come from norms fit whatever is cast by them, for any input."""
    g = torch.Generator().manual_seed(seed)
    x, w1, w2, dy = (torch.randn(shape, generator=g) for shape in ((16, C), (H, C), (C, H), (16, C)))
    b1, b2 = torch.randn(H, generator=g), torch.zeros(C)
    x, w1, w2, dy = x * x_size, w1 * w_size, w2 * w_size, dy * dy_size
    for tensor, spikes in ((x, x_spikes), (w1, w_spikes), (w2, v_spikes), (dy, dy_spikes)):
        for place, size in spikes:
            tensor.view(-1)[place % tensor.numel()] *= size
    shares: list[float] = []

    def rounded(t: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        shares.append(float((t.float() / scale).abs().max() / torch.finfo(dtype).max))
        return real(t, scale, dtype)

    real = emulated8.rounded
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(emulated8, "rounded", rounded)
        leaves = [t.requires_grad_() for t in (x, w1, b1, w2, b2)]
        network(*leaves).backward(dy.bfloat16())
    assert len(shares) == 7
    assert max(shares) <= 1
    assert all(leaf.grad.isfinite().all() for leaf in leaves if leaf.grad is not None)


def test_zeros_stay_zeros() -> None:
    """Projections that begin at zero, and gradients that are zero, as the first step of many models has them."""
    x, w1, b1, w2, b2 = parameters()
    with torch.no_grad():
        w2.zero_()
        b2.zero_()
    y = network(x, w1, b1, w2, b2)
    assert (y == 0).all()
    y.backward(torch.ones_like(y))
    assert x.grad is not None
    assert (x.grad == 0).all()
    assert w2.grad is not None
    assert w2.grad.isfinite().all()
    assert w2.grad.norm() > 0
