"""Which layers are replaced by those with cast weights, and which of them share a matmul, in modules that a user may write."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from andromeda.model import fused_qkv
from andromeda.model.layers import Linear
from andromeda.model.master_weight_linear import MasterWeightLinear, accumulate_weight_grads, convert_to_master_weights
from andromeda.optim import parameter_roles
from tests.ops import emulated16

assert emulated16


class Attention(nn.Module):
    """What of attention is linear; keys and values may read something narrower, and share a weight."""

    def __init__(self, latent: int, tied: bool) -> None:
        super().__init__()
        self.down = Linear(32, latent, bias=False)
        self.query, self.key, self.value = Linear(32, 16), Linear(latent, 16), Linear(latent, 16)
        torch.manual_seed(0)
        for p in self.parameters():
            nn.init.normal_(p, std=0.2)
        if tied:
            self.value.weight = self.key.weight

    def forward(self, x: Tensor) -> Tensor:
        """x (N, 32) -> (N, 16)."""
        linears = (self.query, self.value, self.key)
        qkv = fused_qkv.match(linears)(x, linears)
        if qkv is not None:
            query, value, key = fused_qkv.split(qkv, linears)
        else:
            z = self.down(x) if self.key.in_features != 32 else x
            query, value, key = self.query(x), self.value(z), self.key(z)
        return query * key + value


def gradients(module: nn.Module, layers: list[MasterWeightLinear]) -> dict[str, Tensor]:
    """Of two micro-batches."""
    g = torch.Generator().manual_seed(1)
    with accumulate_weight_grads(layers):
        for _ in range(2):
            module(torch.randn(5, 32, generator=g, dtype=torch.float64)).pow(3).sum().backward()
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("latent", "tied"), [(32, False), (32, True), (8, False), (8, True)])
def test_gradients_whatever_is_joined(latent: int, tied: bool) -> None:
    plain, made = Attention(latent, tied).double(), Attention(latent, tied).double()
    layers = convert_to_master_weights(made, lambda path: True, torch.float64)
    assert (made.query in layers and len(made.query.fused_group) == 3) == (latent == 32 and not tied)  # type: ignore[operator]
    wanted, found = gradients(plain, []), gradients(made, layers)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-10, atol=1e-13, msg=name)


def test_layers_with_something_of_their_own_stay() -> None:
    made = Attention(32, False)
    made.query.role = "scalar"  # type: ignore[assignment]
    called: list[nn.Module] = []
    made.value.register_forward_hook(lambda module, args, out: called.append(module))
    before = parameter_roles(made)
    convert_to_master_weights(made, lambda path: True, torch.bfloat16)
    assert [type(made.get_submodule(name)) for name in ("query", "value", "key")] == [Linear, Linear, MasterWeightLinear]
    assert parameter_roles(made) == before
    with torch.autocast("cpu", torch.bfloat16):
        made(torch.randn(5, 32))
    assert called == [made.value]
