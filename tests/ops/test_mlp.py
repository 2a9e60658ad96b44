"""The feed-forward network in one step: its kernels against float64, its gradients by finite differences, compiled and recomputed."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from andromeda.model.feedforward import dense
from andromeda.ops import mlp
from andromeda.ops.compute_dtype import compute_dtype
from andromeda.ops.master_weight_linear import CastWeight
from andromeda.train.activation_checkpoint import checkpoint_blocks
from tests.ops import emulated16, interpreted

assert emulated16
C, H = 24, 40


def exact(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """The definition."""
    return F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)


def network(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """By weights that are cast now."""
    first, second = (CastWeight(w.detach().to(compute_dtype(x)), None) for w in (w1, w2))
    return mlp.gelu_mlp(x, first, w1, b1, second, w2, b2)


def parameters(dtype: torch.dtype = torch.float64, device: str = "cpu") -> list[Tensor]:
    """x (2, 5, C), w1, b1, w2, b2."""
    g = torch.Generator().manual_seed(0)
    shapes = ((2, 5, C), (H, C), (H,), (C, H), (C,))
    drawn = [torch.randn(shape, generator=g, dtype=torch.float64) * (shape[-1] ** -0.5 if len(shape) == 2 else 1) for shape in shapes]
    return [t.to(device, dtype).requires_grad_() for t in drawn]


@pytest.mark.gpu
@pytest.mark.parametrize(("N", "columns"), [(1, 8), (5, 257), (300, 72)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernels(N: int, columns: int, dtype: torch.dtype) -> None:
    """Both passes of GELU within its type's rounding, far tails too, and the bias's gradient as a sum that was not rounded before."""
    from andromeda.ops.triton import gelu as device

    place, g = interpreted.device(), torch.Generator().manual_seed(0)
    u = (3 * torch.randn(N, columns, generator=g)).to(dtype)
    da, bias = torch.randn(N, columns, generator=g).to(dtype), torch.randn(columns, generator=g)
    z = (u.double() + bias.double()).requires_grad_()
    a = F.gelu(z)
    (dz,) = torch.autograd.grad(a, z, da.double())
    found = device.gelu_backward(da.to(place), u.to(place), bias.to(place))
    forward = device.gelu(u.to(place), bias.to(place))
    # The interpreter cuts bits off where a GPU rounds.
    eps = torch.finfo(dtype).eps
    near = partial(torch.testing.assert_close, rtol=eps if interpreted.INTERPRETED else 0.6 * eps, atol=1e-5)
    near(forward.cpu().double(), a.detach())
    assert torch.equal(found[1], forward)
    near(found[0].cpu().double(), dz)
    torch.testing.assert_close(found[2].cpu().double(), dz.sum(0), rtol=1e-5, atol=1e-4)


def test_gradients_by_finite_differences() -> None:
    given = parameters()
    assert torch.autograd.gradcheck(network, given)
    torch.testing.assert_close(network(*given), exact(*given))


@pytest.mark.parametrize("frozen", range(5))
def test_only_wanted_gradients_are_taken(frozen: int) -> None:
    given, plain = parameters(), parameters()
    for leaves, function in ((given, network), (plain, exact)):
        leaves[frozen].requires_grad_(False)
        function(*leaves).square().sum().backward()
    for number, (a, b) in enumerate(zip(given, plain, strict=True)):
        if number == frozen:
            assert a.grad is None
        else:
            torch.testing.assert_close(a.grad, b.grad)


@pytest.fixture
def accepted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The path that a GPU takes, on a CPU."""
    monkeypatch.setattr(mlp, "is_supported", lambda x, *parameters: torch.is_grad_enabled())
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Block(nn.Module):
    """A residual layer around the network, as a model's."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.feedforward = nn.LayerNorm(C), dense.MLP(C, H, "gelu", bias=True)
        for linear in (self.feedforward.inner, self.feedforward.out):
            nn.init.normal_(linear.weight, std=0.2, generator=torch.Generator().manual_seed(0))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., C)."""
        return x + self.feedforward(self.norm(x))


class Model(nn.Module):
    """What `checkpoint_blocks` takes."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks: Any = nn.ModuleList([Block(), Block()])
        self.decoder = SimpleNamespace(blocks=self.blocks)

    def gradients(self, x: Tensor) -> dict[str, Tensor]:
        """Of the sum of squares, under bfloat16 autocast as a training step has it."""
        with torch.autocast("cpu", torch.bfloat16):
            y = x
            for block in self.blocks:
                y = block(y)
        y.float().square().sum().backward()
        return {name: p.grad for name, p in self.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["none", "selective", "full"])
@pytest.mark.parametrize("backend", ["", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_block_compiled_and_recomputed(accepted: None, kind: str, backend: str) -> None:
    """One graph without a break; float32 gradients at the distance from float64 that bfloat16's matmuls have."""
    model, x = Model(), torch.randn(3, 7, C, generator=torch.Generator().manual_seed(1)).requires_grad_()
    wanted = copy.deepcopy(model).double()
    y = x.double()
    for block in wanted.blocks:
        inside = block.feedforward
        y = y + exact(block.norm(y), inside.inner.weight, inside.inner.bias, inside.out.weight, inside.out.bias)
    y.square().sum().backward()
    checkpoint_blocks(model, kind)  # type: ignore[arg-type]
    counter = CompileCounterWithBackend(backend) if backend else None
    for block in model.blocks:
        if counter:
            block.compile(fullgraph=True, backend=counter)
    found = model.gradients(x)
    assert counter is None or counter.frame_count == 1
    for name, p in wanted.named_parameters():
        assert found[name].dtype == torch.float32
        assert p.grad is not None
        assert (found[name].double() - p.grad).norm() / p.grad.norm() < 2e-2


def test_other_layers_keep_their_own_products(accepted: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network without GELU or without biases, and layers that were exchanged, as for 8 bits."""
    monkeypatch.setattr(mlp, "gelu_mlp", lambda *given: pytest.fail("not this network"))
    x = torch.randn(3, C)
    dense.MLP(C, H, "relu2", bias=True)(x)
    dense.MLP(C, H, "gelu", bias=False)(x)
    exchanged = dense.MLP(C, H, "gelu", bias=True)
    exchanged.add_module("out", nn.Linear(H, C))
    exchanged(x)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compiled", [False, True])
def test_on_a_gpu(compiled: bool) -> None:
    """Under autocast, as a training step runs it, compared with float64."""
    torch._dynamo.reset()
    given = parameters(torch.float32, "cuda")
    wanted = [t.detach().double().requires_grad_() for t in given]
    assert not mlp.is_supported(*given)
    with torch.autocast("cuda", torch.bfloat16):
        assert mlp.is_supported(*given)
        found = (torch.compile(network, fullgraph=True) if compiled else network)(*given)
    assert found.dtype == torch.bfloat16
    found.float().square().sum().backward()
    exact(*wanted).square().sum().backward()
    for a, b in zip(given, wanted, strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert a.grad.dtype == torch.float32
        assert (a.grad.double() - b.grad).norm() / b.grad.norm() < 2e-2


def test_the_kernels_under_the_interpreter() -> None:
    interpreted.run(__file__)
