"""One matmul for several layers gives what each gives, and their gradients, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from andromeda.model import fused_qkv
from andromeda.model.layers import Linear, concat_weights


@pytest.mark.parametrize("bias", [False, True])
def test_one_product_is_all_of_them(bias: bool) -> None:
    torch.manual_seed(0)
    linears = [Linear(24, size, bias=bias).double() for size in (40, 12, 9)]
    for linear in linears:
        for parameter in linear.parameters():
            torch.nn.init.normal_(parameter)
    x = torch.randn(2, 5, 24, dtype=torch.float64, requires_grad=True)
    parameters = [x, *(p for linear in linears for p in linear.parameters())]
    whole, wanted = F.linear(x, *concat_weights(linears)), [linear(x) for linear in linears]
    assert whole.shape == (2, 5, 64)
    assert not whole[..., 61:].any()
    outs = whole[..., :61].split([40, 12, 9], -1)
    assert concat_weights(linears)[0].shape == (64, 24)
    weights = [torch.randn_like(out) for out in wanted]
    grads = (torch.autograd.grad(sum((o * w).sum() for o, w in zip(side, weights, strict=True)), parameters) for side in (outs, wanted))
    for actual, right in zip((*outs, *next(grads)), (*wanted, *next(grads)), strict=True):
        torch.testing.assert_close(actual, right, rtol=1e-12, atol=1e-12)


def test_other_layers_keep_their_own_products() -> None:
    x = torch.zeros(1, 8)
    linears = [Linear(8, 8), torch.nn.Linear(8, 8)]
    assert fused_qkv.match(linears) is fused_qkv.separate
    assert fused_qkv.match(linears[:1])(x, linears[:1]) is None, "on a CPU"
