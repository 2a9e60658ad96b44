"""The chunked cross entropy against its float64 reference, finite differences, torch's functions and closed forms."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from andromeda.ops.cross_entropy import CrossEntropy, chunk_tokens, linear_cross_entropy, reference

OPTIONS: list[dict[str, Any]] = [{}, {"softcap": 3.0}, {"z_loss": 0.1}, {"softcap": 3.0, "z_loss": 0.1}]


def problem(
    B: int = 3, T: int = 7, C: int = 5, V: int = 11, seed: int = 0, bias: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """x, weight, targets (about a third ignored) and bias, in float64."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(B, T, C, generator=generator, dtype=torch.float64)
    weight = torch.randn(V, C, generator=generator, dtype=torch.float64)
    targets = torch.randint(V, (B, T), generator=generator)
    targets[torch.rand(B, T, generator=generator) < 0.3] = -100
    return x, weight, targets, torch.randn(V, generator=generator, dtype=torch.float64) if bias else None


def with_gradients(
    function: Any, x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, scale: float = 1.0, **options: Any
) -> tuple[CrossEntropy, list[Tensor]]:
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias) if t is not None]
    out = function(leaves[0], leaves[1], targets, bias=leaves[2] if bias is not None else None, **options)
    return out, list(torch.autograd.grad(out.total * scale, leaves))


@settings(max_examples=40, deadline=None)
@given(
    B=st.integers(1, 3),
    T=st.integers(1, 9),
    V=st.integers(1, 12),
    chunk=st.integers(0, 30),
    bias=st.booleans(),
    softcap=st.sampled_from([0.0, 0.5, 30.0]),
    z_loss=st.sampled_from([0.0, 1e-4, 1.0]),
    seed=st.integers(0, 99),
)
def test_equals_the_reference(B: int, T: int, V: int, chunk: int, bias: bool, softcap: float, z_loss: float, seed: int) -> None:
    x, weight, targets, b = problem(B, T, 4, V, seed, bias)
    out, gradients = with_gradients(linear_cross_entropy, x, weight, targets, b, scale=0.3, softcap=softcap, z_loss=z_loss, chunk=chunk)
    expected, wanted = with_gradients(reference, x, weight, targets, b, scale=0.3, softcap=softcap, z_loss=z_loss)
    assert out.tokens == expected.tokens == (targets != -100).sum()
    torch.testing.assert_close(out.total, expected.total)
    torch.testing.assert_close(out.nll, expected.nll)
    for got, want in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("options", OPTIONS)
def test_gradients_by_finite_differences(options: dict[str, Any]) -> None:
    x, weight, targets, bias = problem()
    assert bias is not None
    leaves = tuple(t.requires_grad_() for t in (x, weight, bias))
    assert torch.autograd.gradcheck(lambda x, w, b: linear_cross_entropy(x, w, targets, bias=b, chunk=4, **options).total, leaves)


@pytest.mark.parametrize("options", OPTIONS)
def test_the_reference_is_the_definition(options: dict[str, Any]) -> None:
    """Worked token by token with logarithms and exponentials of Python's own floats."""
    x, weight, targets, bias = problem(B=1)
    assert bias is not None
    total = nll = 0.0
    for hidden, target in zip(x[0], targets[0].tolist(), strict=True):
        if target == -100:
            continue
        logits = [float(row @ hidden + b) for row, b in zip(weight, bias, strict=True)]
        if cap := options.get("softcap"):
            logits = [cap * math.tanh(z / cap) for z in logits]
        log_z = math.log(sum(math.exp(z) for z in logits))
        nll += log_z - logits[target]
        total += log_z - logits[target] + options.get("z_loss", 0.0) * log_z**2
    out = reference(x, weight, targets, bias=bias, **options)
    assert (out.total.item(), out.nll.item()) == pytest.approx((total, nll))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_narrow_dtypes_stay_within_their_rounding(dtype: torch.dtype, autocast: bool) -> None:
    """Weights stay float32 under autocast; the loss and all sums are at least float32 in every case."""
    if autocast and dtype == torch.float32:
        pytest.skip("float32 is what autocast leaves out")
    x, weight, targets, bias = problem(B=4, T=64, C=32, V=50)
    eps = torch.finfo(dtype).eps
    # A factor that this dtype rounds by almost half of its eps.
    scale = (1 + 0.49 * eps) / 1024
    expected, wanted = with_gradients(reference, x, weight * 0.2, targets, bias, scale=scale)
    held = torch.float32 if autocast else dtype
    with torch.autocast("cpu", dtype, enabled=autocast):
        out, gradients = with_gradients(
            linear_cross_entropy,
            x.to(held),
            weight.to(held) * 0.2,
            targets,
            None if bias is None else bias.to(held),
            scale=scale,
            chunk=100,
        )
    assert out.total.dtype == torch.float32
    torch.testing.assert_close(out.total.double(), expected.total, rtol=eps, atol=0)
    for got, want in zip(gradients, wanted, strict=True):
        assert got.dtype == held
        assert (got.double() - want).norm() / want.norm() < 2 * eps
        # Rounding must not lean to one side: a factor rounded once would scale all of a gradient.
        assert ((got.double() * want).sum() / want.square().sum()).item() == pytest.approx(1.0, abs=max(eps / 4, 1e-6))


def test_equals_torch_in_float32() -> None:
    x, weight, targets, _ = problem(B=4, T=64, C=32, V=50)
    x, weight = x.float(), weight.float()

    def plain(x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> CrossEntropy:
        loss = F.cross_entropy((x @ weight.T).flatten(0, 1), targets.flatten(), reduction="sum")
        return CrossEntropy(loss, loss, loss)

    out, gradients = with_gradients(linear_cross_entropy, x, weight, targets, None, chunk=37)
    expected, wanted = with_gradients(plain, x, weight, targets, None)
    torch.testing.assert_close(out.total, expected.total)
    for got, want in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_zero_head_gives_the_log_of_the_vocabulary() -> None:
    """The speedrun's first loss: ln 50304 = 10.8258."""
    out = linear_cross_entropy(torch.randn(2, 3, 4), torch.zeros(50304, 4), torch.tensor([[1, 2, 3], [4, -100, 50303]]), softcap=30.0)
    assert (out.nll / out.tokens).item() == pytest.approx(10.8258, abs=1e-4)
    assert out.tokens == 5


@pytest.mark.parametrize("options", OPTIONS)
def test_each_token_alone(options: dict[str, Any]) -> None:
    x, weight, targets, bias = problem()
    out = linear_cross_entropy(x, weight, targets, bias=bias, chunk=4, reduction="none", **options)
    assert out.total.shape == out.nll.shape == targets.shape
    for b, t in [(0, 0), (1, 3), (2, 6)]:
        alone = reference(x[b, t : t + 1], weight, targets[b, t : t + 1], bias=bias, **options)
        torch.testing.assert_close(out.total[b, t], alone.total)
        torch.testing.assert_close(out.nll[b, t], alone.nll)
    assert (out.total[targets == -100] == 0).all()


def test_ignored_tokens_leave_no_trace() -> None:
    """Not in the loss and not in any gradient, whatever their hidden state is; with no target at all everything is 0."""
    x, weight, targets, bias = problem()
    kept = targets != -100
    out, gradients = with_gradients(linear_cross_entropy, x, weight, targets, bias, chunk=4, softcap=3.0, z_loss=0.1)
    alone, wanted = with_gradients(linear_cross_entropy, x[kept], weight, targets[kept], bias, softcap=3.0, z_loss=0.1)
    torch.testing.assert_close(out, alone)
    assert (gradients[0][~kept] == 0).all()
    torch.testing.assert_close(gradients[0][kept], wanted[0])
    torch.testing.assert_close(gradients[1:], wanted[1:])
    nothing, gradients = with_gradients(linear_cross_entropy, x, weight, torch.full_like(targets, -100), bias)
    assert nothing.total == nothing.nll == nothing.tokens == 0
    assert all((g == 0).all() for g in gradients)


@pytest.mark.parametrize("frozen", ["x", "weight", "bias", "all"])
def test_only_wanted_gradients_are_taken(frozen: str) -> None:
    x, weight, targets, bias = problem()
    assert bias is not None
    leaves: dict[str, Any] = {"x": x, "weight": weight, "bias": bias}
    for name, leaf in leaves.items():
        leaf.requires_grad_(frozen not in (name, "all"))
    out = linear_cross_entropy(**leaves, targets=targets, chunk=4)
    if frozen == "all":
        assert not out.total.requires_grad
        return
    out.total.backward()
    _, wanted = with_gradients(reference, x.detach(), weight.detach(), targets, bias.detach())
    for (name, leaf), want in zip(leaves.items(), wanted, strict=True):
        if name == frozen:
            assert leaf.grad is None
        else:
            torch.testing.assert_close(leaf.grad, want)


def test_no_chunk_is_ever_larger_than_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []
    original = F.log_softmax

    def watched(z: Tensor, dim: int) -> Tensor:
        rows.append(len(z))
        return original(z, dim=dim)

    monkeypatch.setattr(F, "log_softmax", watched)
    x, weight, targets, _ = problem(B=4, T=64)
    with_gradients(linear_cross_entropy, x, weight, targets, None, chunk=100)
    assert rows == [100, 100, 56]


@given(device=st.sampled_from(["cpu", "cuda"]), tokens=st.integers(0, 200_000), vocabulary=st.integers(1, 300_000))
def test_chunks_are_whole_tiles_and_as_few_as_fit(device: str, tokens: int, vocabulary: int) -> None:
    chunk = chunk_tokens(device, tokens, vocabulary)
    given = {"cpu": 2**20, "cuda": 5 * 2**25}[device]
    assert chunk % 128 == 0
    assert chunk <= 256 or (chunk - 64) * vocabulary <= given
    if tokens > chunk and chunk > 256:
        # One chunk less would need larger ones than the device is given.
        chunks = math.ceil(tokens / chunk)
        assert (tokens / (chunks - 1) + 64) * vocabulary > given


def test_a_kept_graph_gives_the_gradients_again() -> None:
    x, weight, targets, bias = problem()
    assert bias is not None
    leaves = [t.float().requires_grad_() for t in (x, weight, bias)]
    total = linear_cross_entropy(leaves[0], leaves[1], targets, bias=leaves[2], chunk=4).total / 3
    first = torch.autograd.grad(total, leaves, retain_graph=True)
    for again in (torch.autograd.grad(total, leaves, retain_graph=True), torch.autograd.grad(total, leaves)):
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_a_tied_weight_gets_both_gradients() -> None:
    x, weight, targets, _ = problem()
    weight.requires_grad_()
    ids = targets.clamp(min=0)
    linear_cross_entropy(weight[ids] + x, weight, targets, chunk=4).total.backward()
    other = weight.detach().clone().requires_grad_()
    reference(other[ids] + x, other, targets).total.backward()
    torch.testing.assert_close(weight.grad, other.grad)


def test_a_target_outside_the_vocabulary_is_an_error() -> None:
    for wrong in (-1, 11):
        x, weight, targets, _ = problem()
        targets[0, 0] = wrong
        with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
            linear_cross_entropy(x, weight, targets)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_into_one_graph(backend: str) -> None:
    x, weight, targets, bias = problem()
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend=backend)
    out, gradients = with_gradients(compiled, x, weight, targets, bias, softcap=3.0, z_loss=0.1, chunk=16)
    expected, wanted = with_gradients(reference, x, weight, targets, bias, softcap=3.0, z_loss=0.1)
    torch.testing.assert_close(out.total, expected.total)
    torch.testing.assert_close(gradients, wanted)
