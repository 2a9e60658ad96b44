"""A linear layer by a weight that was cast before: gradients in float64, returned or added up where they are kept."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from andromeda.ops.master_weight_linear import CastWeight, cast_linear, weight_grad_addmm, weight_gradient
from tests.ops import emulated16, interpreted

assert emulated16
K, SIZES = 24, (40, 12, 9)


def drawn(dtype: torch.dtype, bias: bool) -> tuple[Tensor, list[Tensor], Tensor | None]:
    """x (2, 5, K), three weights, and a bias for them and what is filled up below."""
    g = torch.Generator().manual_seed(0)
    x, *weights = (torch.randn(shape, generator=g, dtype=torch.float64) for shape in ((2, 5, K), *((size, K) for size in SIZES)))
    shift = torch.randn(64, generator=g, dtype=torch.float64).to(dtype).requires_grad_() if bias else None
    return x.to(dtype).requires_grad_(), [weight.to(dtype).requires_grad_() for weight in weights], shift


def filled(weights: list[Tensor]) -> Tensor:
    """One below the other, with zeros at the end."""
    return torch.cat([*weights, weights[0].new_zeros(64 - sum(SIZES), K)]).detach()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("added", [False, True])
def test_gradients_in_float64(bias: bool, added: bool) -> None:
    """Of two inputs, one after the other, compared with PyTorch's layers."""
    x, weights, shift = drawn(torch.float64, bias)
    total = torch.zeros(64, K, dtype=torch.float64) if added else None
    other = (2 * x).detach().requires_grad_()
    out = [cast_linear(one, CastWeight(filled(weights), total), weights, shift) for one in (x, other)]
    sum(part.pow(3).sum() for part in out).backward()  # type: ignore[union-attr]
    found = list(total[: sum(SIZES)].split(SIZES)) if added and total is not None else [weight.grad for weight in weights]
    assert not added or all(weight.grad is None for weight in weights)
    leaves = [x, other, *weights, *([] if shift is None else [shift])]
    wide = F.pad(torch.cat(weights), (0, 0, 0, 64 - sum(SIZES)))
    wanted = torch.autograd.grad(sum(F.linear(one, wide, shift).pow(3).sum() for one in (x, other)), leaves)  # type: ignore[arg-type]
    for a, b in zip([x.grad, other.grad, *found, *([] if shift is None else [shift.grad])], wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert total is None or bias or not total[sum(SIZES) :].any()


def test_only_wanted_gradients_are_taken() -> None:
    x, weights, _ = drawn(torch.float64, False)
    total = torch.zeros(64, K, dtype=torch.float64)
    frozen = [weight.detach() for weight in weights]
    cast_linear(x, CastWeight(filled(weights), total), frozen).sum().backward()
    assert x.grad is not None
    assert not total.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_float32_weights_are_not_rounded(dtype: torch.dtype) -> None:
    """As near the matmul of what was cast as float32 is, where a matmul in 16 bits would be rounded."""
    x, weights, bias = drawn(torch.float32, True)
    kept = x.detach().to(dtype)
    out = cast_linear(x, CastWeight(filled(weights).to(dtype), None), weights, bias)
    assert out.dtype == dtype
    dy = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    out.backward(dy)
    wanted = (dy.double().flatten(0, 1).T @ kept.double().flatten(0, 1)).split([*SIZES, 64 - sum(SIZES)])
    assert bias is not None
    for weight, gradient in zip((*weights, bias), (*wanted[:-1], dy.double().sum((0, 1))), strict=True):
        assert weight.grad is not None
        assert weight.grad.dtype == torch.float32
        assert (weight.grad.double() - gradient).abs().max() < 1e-6 * gradient.abs().max()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "outputs", "width"), [(16, 64, 32), (7, 9, 24), (300, 130, 257)])
def test_products_on_a_gpu(tokens: int, outputs: int, width: int, dtype: torch.dtype) -> None:
    """Made and added to, in float32, compared with float64 of the same factors."""
    if interpreted.INTERPRETED or not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    g = torch.Generator().manual_seed(0)
    dy, x = (torch.randn(tokens, size, generator=g).to(dtype) for size in (outputs, width))
    before = torch.randn(outputs, width, generator=g)
    wanted = dy.double().T @ x.double()
    made = weight_gradient(dy.cuda(), x.cuda(), torch.float32)
    total = before.cuda()
    weight_grad_addmm(total, dy.cuda(), x.cuda())
    assert made is not None
    assert made.dtype == torch.float32
    for found, right in ((made, wanted), (total, before.double() + wanted)):
        assert (found.cpu().double() - right).abs().max() < 1e-5 * right.abs().max()
