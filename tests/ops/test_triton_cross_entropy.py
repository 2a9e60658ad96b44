"""The kernels of the loss against their float64 definitions: any row length, cap, z-loss and ignored targets, gradients in place."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from andromeda.ops.cross_entropy import IGNORE_INDEX, linear_cross_entropy, reference
from tests.ops import interpreted


def wanted(logits: Tensor, labels: Tensor, softcap: float, z_loss: float) -> tuple[Tensor, Tensor, Tensor]:
    """The definition, by autograd."""
    raw = logits.double().requires_grad_()
    z = softcap * torch.tanh(raw / softcap) if softcap else raw
    nll = F.cross_entropy(z, labels, ignore_index=IGNORE_INDEX, reduction="none")
    total = nll + z_loss * z.logsumexp(-1).square() * (labels != IGNORE_INDEX)
    (gradient,) = torch.autograd.grad(total.sum(), raw)
    return total.detach(), nll.detach(), gradient


@pytest.mark.gpu
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    n=st.integers(1, 4),
    V=st.integers(1, 150),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    softcap=st.sampled_from([0.0, 0.5, 30.0]),
    z_loss=st.sampled_from([0.0, 0.1]),
    size=st.sampled_from([1.0, 80.0]),
    seed=st.integers(0, 99),
)
def test_rows(n: int, V: int, dtype: torch.dtype, softcap: float, z_loss: float, size: float, seed: int) -> None:
    """Large logits too, which overflow an exponential that nothing was taken from."""
    from andromeda.ops.triton import cross_entropy as device

    place = interpreted.device()
    generator = torch.Generator().manual_seed(seed)
    logits = (size * torch.randn(n, V, generator=generator)).to(dtype)
    labels = torch.randint(V, (n,), generator=generator)
    labels[torch.rand(n, generator=generator) < 0.3] = IGNORE_INDEX
    expected = wanted(logits, labels, softcap, z_loss)
    # Rows that lie apart, as a slice of a larger buffer.
    held = torch.full((n, V + 3), 7.0, dtype=dtype, device=place)
    held[:, :V] = logits.to(place)
    untouched = device.logits_loss(held[:, :V].clone(), labels.to(place), softcap, z_loss, False, IGNORE_INDEX, block=32)
    found = device.logits_loss(held[:, :V], labels.to(place), softcap, z_loss, True, IGNORE_INDEX, block=32)
    for a, b, want in zip(found[:2], untouched[:2], expected[:2], strict=True):
        torch.testing.assert_close(a.cpu().double(), want, rtol=1e-5, atol=1e-4)
        assert torch.equal(a, b)
    assert torch.equal(untouched[2].cpu(), logits)
    slack = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    torch.testing.assert_close(held[:, :V].cpu().double(), expected[2], rtol=slack, atol=slack * (1 + size * z_loss))
    assert (held[:, V:] == 7).all()


@pytest.mark.gpu
@pytest.mark.parametrize("factor", [1.0, 1 / 560])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("held", [torch.float32, torch.bfloat16])
def test_scaled(held: torch.dtype, dtype: torch.dtype, factor: float) -> None:
    """The exact matmul, rounded once; in place only what was asked for is written. (The interpreter cuts bits off, a GPU rounds.)"""
    from andromeda.ops.triton import cross_entropy as device

    place = interpreted.device()
    gradient = torch.randn(37, 131, generator=torch.Generator().manual_seed(0)).to(held).to(place)
    by = torch.tensor(factor, device=place)
    before = gradient.clone()
    exact = before.double() * by.double()
    found = device.scale_grad(gradient, by, dtype, False)
    assert found.dtype == dtype
    assert torch.equal(gradient, before)
    torch.testing.assert_close(found.double(), exact, rtol=torch.finfo(dtype).eps / (1 if interpreted.INTERPRETED else 1.99), atol=0)
    if held == dtype:
        whole = torch.cat([gradient, before])
        placed = device.scale_grad(whole[:37], by, dtype, True)
        assert placed.data_ptr() == whole.data_ptr()
        assert torch.equal(placed, found)
        assert torch.equal(whole[37:], before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_memory_on_a_gpu() -> None:
    """At most the sums of both gradients and one chunk's logits are held, and a graph that is kept gives the same gradients again."""
    N, C, V, chunk = 4096, 256, 16384, 512
    g = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(N, C, device="cuda", generator=g).bfloat16().requires_grad_()
    weight = torch.randn(V, C, device="cuda", generator=g).bfloat16().requires_grad_()
    targets = torch.randint(V, (N,), device="cuda", generator=g)

    def gradients(kept: bool = False) -> tuple[Tensor, ...]:
        total = linear_cross_entropy(x, weight, targets, chunk=chunk).total / N
        if kept:
            torch.autograd.grad(total, (x, weight), retain_graph=True)
        return torch.autograd.grad(total, (x, weight))

    once, twice = gradients(), gradients(kept=True)
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))
    del once, twice
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    gradients()
    held = 2 * N * C + 4 * V * C
    largest = max(held + 2 * chunk * V, held + 2 * V * C)
    assert torch.cuda.max_memory_allocated() - before < largest + (4 << 20)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("options", [{}, {"softcap": 15.0}, {"z_loss": 1e-2}])
def test_the_whole_loss_on_a_gpu(options: dict[str, float]) -> None:
    """Sums and gradients of bfloat16 matmuls within their rounding, and of float32 states and weights in float32 gradients."""
    g = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(700, 64, device="cuda", generator=g)
    weight = torch.randn(1000, 64, device="cuda", generator=g) / 8
    bias = torch.randn(1000, device="cuda", generator=g)
    targets = torch.randint(1000, (700,), device="cuda", generator=g)
    targets[::5] = IGNORE_INDEX
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    with torch.autocast("cuda", torch.bfloat16):
        out = linear_cross_entropy(x, weight, targets, bias=bias, chunk=256, **options)
    found = torch.autograd.grad(out.total / 560, leaves)
    exact = reference(x, weight, targets, bias=bias, **options)
    assert abs(out.total / exact.total - 1) < 1e-3
    for a, b in zip(found, torch.autograd.grad(exact.total / 560, leaves), strict=True):
        assert a.dtype == torch.float32
        assert (a.double() - b.double()).norm() / b.double().norm() < 1e-2


def test_the_kernel_under_the_interpreter() -> None:
    interpreted.run(__file__)
