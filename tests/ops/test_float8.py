"""Casting to 8 bits for training: every kernel against PyTorch's own rounding, and bounds that nothing exceeds."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from andromeda.ops.float8 import FORWARD_DTYPE, GRAD_DTYPE, power_of_two_scale, quantize_weights
from tests.ops import emulated8, interpreted

SHAPES = [(16, 16), (48, 272), (144, 80), (272, 144)]


def drawn(*shape: int, seed: int = 0, spread: float = 3.0) -> Tensor:
    """Numbers over many powers of two, as bfloat16."""
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=g) * torch.exp(spread * torch.randn(shape, generator=g))).bfloat16()


def same(found: Tensor, exact: Tensor, scale: Tensor, slack: float = 0.0) -> None:
    """found in 8 bits are the exact numbers over scale as PyTorch rounds them, or as it rounds them with `slack` of themselves more
    or less."""
    dtype, exact = found.dtype, exact.double()
    low, high = (emulated8.rounded(exact * (1 + side * slack), scale, dtype).double() for side in (-1, 1))
    found = found.cpu().double()
    right = (found >= torch.minimum(low, high)) & (found <= torch.maximum(low, high))
    if interpreted.INTERPRETED:
        # Triton's interpreter rounds ties up, and loses the carry where rounding reaches the next power of two, and the smallest numbers.
        size = (exact / scale).abs()
        power = torch.exp2(torch.floor(torch.log2(size.clamp(min=1e-30))))
        right |= (found.abs() - size).abs() <= power * torch.finfo(dtype).eps / 2
        right |= (size >= power * (2 - torch.finfo(dtype).eps / 2)) | (size < 4 * torch.finfo(dtype).tiny)
    assert right.all(), (found[~right][:5], low[~right][:5], high[~right][:5])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [FORWARD_DTYPE, GRAD_DTYPE])
@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_cast(N: int, K: int, dtype: torch.dtype) -> None:
    """Rows are rounded exactly, columns are the rows transposed, tails that fill no tile included; the sum is not rounded before."""
    from andromeda.ops.triton import float8 as device

    place, x = interpreted.device(), drawn(N, K)
    scale = power_of_two_scale(x.abs().amax(), dtype)
    rows, columns, total = device.cast_to_float8(x.to(place), scale.to(place), dtype, row_sum=True)
    assert rows is not None
    assert columns is not None
    assert total is not None
    same(rows, x, scale)
    assert torch.equal(columns.cpu().view(torch.uint8), rows.cpu().view(torch.uint8).T)
    torch.testing.assert_close(total.cpu().double(), x.double().sum(0), rtol=1e-5, atol=1e-5 * float(x.abs().sum(0).max()))


@pytest.mark.gpu
def test_what_is_not_asked_for_is_not_made_and_nothing_is_hidden() -> None:
    """Beyond the scale numbers saturate; NaN stays NaN, so that a broken step is seen."""
    from andromeda.ops.triton import float8 as device

    place, x = interpreted.device(), torch.ones(16, 32)
    x[3, 5], x[4, 6], x[5, 7] = 1e6, -1e6, torch.nan
    rows, columns, total = device.cast_to_float8(x.to(place), torch.ones((), device=place), FORWARD_DTYPE, columns=False)
    assert columns is None
    assert total is None
    assert rows is not None
    assert [float(rows[at].float()) for at in ((3, 5), (4, 6))] == [448.0, -448.0]
    assert rows.float().isnan().sum() == 1 or interpreted.INTERPRETED  # whose conversion knows no NaN


@pytest.mark.gpu
@pytest.mark.parametrize(("N", "K"), [*SHAPES, (33, 7)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, FORWARD_DTYPE])
def test_measure(N: int, K: int, dtype: torch.dtype) -> None:
    from andromeda.ops.triton import float8 as device

    x = drawn(N, K).clamp(-400, 400).to(dtype)
    largest, norm = device.amax_and_norm_partials(x.to(interpreted.device()), 16).amax(1).tolist()
    assert largest == x.double().abs().max()
    assert norm == pytest.approx(float(x.double().norm(dim=1).max()), rel=1e-6)


@pytest.mark.gpu
def test_weights_are_cast_together_as_each_is_alone() -> None:
    if interpreted.INTERPRETED or not torch.cuda.is_available():
        pytest.skip("one operator of a GPU")
    weights = [drawn(*shape, seed=seed).float() for seed, shape in enumerate(SHAPES)]
    weights[1].zero_()
    found, wanted = quantize_weights([weight.cuda() for weight in weights]), quantize_weights(weights)
    for ours, exact in zip(found, wanted, strict=True):
        assert ours.scale.cpu() == exact.scale
        same(ours.rows, exact.rows.float() * exact.scale, exact.scale)
        assert torch.equal(ours.columns.view(torch.uint8), ours.rows.view(torch.uint8).T)
        torch.testing.assert_close(ours.norms.cpu(), exact.norms, rtol=1e-5, atol=0)
        assert ours.scale.data_ptr() % 16 == 0


@pytest.mark.gpu
@pytest.mark.parametrize(("N", "H"), SHAPES)
def test_gelu(N: int, H: int) -> None:
    """Both passes round the exact numbers to 8 bits but for the share of 1e-5 that the tail is exact to; transposes and sums too."""
    from andromeda.ops.triton import gelu as device

    place, g = interpreted.device(), torch.Generator().manual_seed(1)
    u, da, bias = (2 * torch.randn(N, H, generator=g)).bfloat16(), drawn(N, H, seed=2, spread=1.0), torch.randn(H, generator=g)
    z = (u.double() + bias.double()).requires_grad_()
    a = F.gelu(z)
    (dz,) = torch.autograd.grad(a, z, da.double())
    scales = power_of_two_scale(a.detach().abs().amax(), FORWARD_DTYPE), power_of_two_scale(dz.abs().amax(), GRAD_DTYPE)
    on = [t.to(place) for t in (da, u, bias, *scales)]
    forward = device.gelu_fp8(on[1], on[2], on[3], FORWARD_DTYPE)
    rows, columns, a_columns, total = device.gelu_fp8_backward(*on, FORWARD_DTYPE, GRAD_DTYPE)
    same(forward, a.detach(), scales[0], 1e-5)
    # Near its zero the derivative is a difference of numbers that are near each other.
    clear = (dz.abs() > 1e-3 * da.double().abs()) | (dz == 0)
    same(torch.where(clear, rows.cpu().float(), 0.0).to(GRAD_DTYPE), torch.where(clear, dz, 0.0), scales[1], 1e-3)
    assert torch.equal(a_columns.cpu().view(torch.uint8), forward.cpu().view(torch.uint8).T)
    assert torch.equal(columns.cpu().view(torch.uint8), rows.cpu().view(torch.uint8).T)
    torch.testing.assert_close(total.cpu().double(), dz.sum(0), rtol=1e-4, atol=1e-4)


@given(st.floats(1e-15, 1e20), st.sampled_from([FORWARD_DTYPE, GRAD_DTYPE]))
def test_a_scale_is_the_least_power_of_two_that_fits(bound: float, dtype: torch.dtype) -> None:
    given_bound = torch.tensor(bound, dtype=torch.float32)
    scale = power_of_two_scale(given_bound, dtype)
    assert torch.frexp(scale).mantissa == 0.5
    assert given_bound / scale <= torch.finfo(dtype).max
    assert given_bound / (scale / 2) > torch.finfo(dtype).max * (1 - 2**-23)


def test_what_is_zero_has_a_scale_of_one_and_scales_have_products() -> None:
    """A layer whose output projection begins at zero has gradients of zero below it."""
    zero, tiny = torch.zeros(()), torch.tensor(1e-30)
    for dtype in (FORWARD_DTYPE, GRAD_DTYPE):
        assert power_of_two_scale(zero, dtype) == 1
        assert power_of_two_scale(tiny, dtype) * power_of_two_scale(tiny, FORWARD_DTYPE) > 0


def test_the_kernels_under_the_interpreter() -> None:
    interpreted.run(__file__)
