"""Mixture of experts against a loop over tokens, and its balance against what it must do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from andromeda.config.model import ExpertsConfig, FeedForwardConfig, ModelConfig
from andromeda.model.feedforward.dense import ACTIVATIONS, GATES
from andromeda.model.feedforward.moe import AttachLoss, MoE, balance_loss, grouped_linear
from andromeda.model.init import initialize
from andromeda.model.transformer import Transformer

WIDTH, HIDDEN = 16, 24


def build(**experts: Any) -> MoE:
    """A mixture with random weights, in float64."""
    config = ModelConfig(
        hidden_size=WIDTH, feedforward=FeedForwardConfig(kind="moe", intermediate_size=HIDDEN), experts=ExpertsConfig(**experts)
    )
    part = MoE(config).double()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw, dtype=torch.float64) * 0.4)
    return part.eval()


def inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def looped(part: MoE, x: Tensor, kind: str, score: str, normalize: bool) -> Tensor:
    """One token after the other, one expert after the other."""
    out = torch.zeros_like(x)
    experts, router = part.experts, part.router
    for n, token in enumerate(x):
        z = router.project.weight @ token
        scores = torch.sigmoid(z) if score == "sigmoid" else torch.exp(z) / torch.exp(z).sum()
        votes = router.votes.double()
        chosen = (scores + router.bias_update_rate * (votes - votes.mean())).argsort(descending=True)[: router.active].tolist()
        total = sum(scores[e] for e in chosen) if normalize else 1.0
        for e in chosen:
            inner = experts.inner[e] @ token
            hidden = GATES[kind](experts.gate[e] @ token) * inner if kind in GATES else ACTIVATIONS[kind](inner)
            out[n] += scores[e] / total * (experts.out[e] @ hidden)
        for shared in part.shared:
            out[n] += shared(token)
    return out


@pytest.mark.parametrize("kind", ["swiglu", "relu2"])
@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("shared", [0, 2])
@torch.no_grad()
def test_the_mixture_is_the_loop(kind: str, score: str, normalize: bool, shared: int) -> None:
    part = build(
        num_experts=5, top_k=2, num_shared_experts=shared, kind=kind, router_activation=score, normalize=normalize, bias_update_rate=0.01
    )
    part.router.votes.copy_(torch.tensor([9, -4, 0, 30, 2]))
    x = inputs(3, 7)
    torch.testing.assert_close(part(x).flatten(0, 1), looped(part, x.flatten(0, 1), kind, score, normalize), rtol=1e-11, atol=1e-11)


@torch.no_grad()
def test_no_token_is_dropped_however_uneven_the_load() -> None:
    part = build(num_experts=4, top_k=1, bias_update_rate=1.0)
    part.router.votes.copy_(torch.tensor([0, 100, 0, 0]))
    x = inputs(1, 50)
    part.train()
    out = part(x)
    assert part.router.load.tolist() == [0, 50, 0, 0]
    only = F.silu(x @ part.experts.gate[1].T) * (x @ part.experts.inner[1].T) @ part.experts.out[1].T
    torch.testing.assert_close(out, only, rtol=1e-11, atol=1e-11)


@torch.no_grad()
def test_identical_experts_with_normalized_gates_are_one_dense_network() -> None:
    part = build(num_experts=4, top_k=3, kind="swiglu")
    for stacked in part.experts.parameters():
        stacked.copy_(stacked[:1].expand_as(stacked))
    x = inputs(2, 5)
    dense = F.silu(x @ part.experts.gate[0].T) * (x @ part.experts.inner[0].T) @ part.experts.out[0].T
    torch.testing.assert_close(part(x), dense, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("E", "k"), [(8, 2), (16, 1), (6, 3)])
def test_the_balance_loss_is_one_when_balanced_and_e_over_k_collapsed(E: int, k: int) -> None:
    balanced = balance_loss(torch.ones(40, E), torch.full((E,), 40 * k / E), k)
    one_hot = torch.zeros(40, E)
    one_hot[:, :k] = 1.0
    collapsed = balance_loss(one_hot, one_hot.sum(0), k)
    assert (float(balanced), float(collapsed)) == pytest.approx((1.0, E / k))


def auxiliary(part: MoE, x: Tensor) -> Tensor:
    """E/k sum_i f_i P_i from the definition, f from the choice that the mixture makes."""
    scores = (x @ part.router.project.weight.T).softmax(-1)
    E, k = part.router.count, part.router.active
    chosen = scores.topk(k, -1).indices
    f = torch.stack([(chosen == e).any(-1).double().mean() for e in range(E)])
    return E / k * (f * scores.mean(0)).sum()


def gradients(part: MoE, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*part.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, retain_graph=True)
    return dict(zip(names, found, strict=True))


def test_the_gradient_is_that_of_the_explicit_sum() -> None:
    x = inputs(30)
    part = build(num_experts=4, top_k=2, router_activation="softmax", balance="loss", aux_loss_coef=0.3).train()
    attached = gradients(part, part(x).square().mean())
    part.router.balance = "none"
    explicit = gradients(part, part(x).square().mean() + 0.3 * auxiliary(part, x))
    without = gradients(part, part(x).square().mean())
    for name, expected in explicit.items():
        torch.testing.assert_close(attached[name], expected, rtol=1e-10, atol=1e-12)
    assert (without["router.project.weight"] - explicit["router.project.weight"]).abs().max() > 1e-3


def test_the_loss_scale_scales_the_auxiliary_loss_alone() -> None:
    x, part = inputs(30), build(num_experts=4, top_k=2, router_activation="softmax", balance="loss", aux_loss_coef=0.3).train()
    part.router.loss_scale.fill_(8.0)
    attached = gradients(part, 8.0 * part(x).square().mean())
    part.router.balance = "none"
    explicit = gradients(part, 8.0 * (part(x).square().mean() + 0.3 * auxiliary(part, x)))
    for name, expected in explicit.items():
        torch.testing.assert_close(attached[name], expected, rtol=1e-10, atol=1e-12)


def test_recomputed_activations_do_not_count_the_auxiliary_loss_twice() -> None:
    x, part = inputs(30).requires_grad_(), build(num_experts=4, top_k=2, balance="loss", aux_loss_coef=0.3).train()
    plain = gradients(part, part(x).square().mean())
    recomputed = gradients(part, checkpoint(part, x, use_reentrant=False).square().mean())
    for name, expected in plain.items():
        torch.testing.assert_close(recomputed[name], expected, rtol=1e-12, atol=1e-14)


def test_added_gradients_leave_the_value_alone() -> None:
    x, loss = torch.randn(3, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    out = AttachLoss.apply(x, loss, torch.tensor(0.25))
    assert torch.equal(out, x)
    out.sum().backward()
    assert x.grad is not None
    assert loss.grad is not None
    assert (x.grad.tolist(), float(loss.grad)) == ([1.0] * 3, 0.25)


@torch.no_grad()
def test_the_bias_moves_against_the_load_until_it_is_even() -> None:
    part = build(num_experts=4, top_k=1, balance="bias", bias_update_rate=0.02).train()
    x = inputs(500) + 0.5
    part.router.project.weight[2] += 0.2
    part(x)
    load = part.router.load.clone()
    before = part.router.bias.clone()
    part.router.step()
    moved = part.router.bias - before
    assert part.router.load.tolist() == [0] * 4
    assert (torch.sign(moved - moved.mean()) * torch.sign(load - load.double().mean()) <= 0).all()
    assert float(part.router.bias.mean()) == pytest.approx(0.0, abs=1e-7)
    assert load.max() / load.double().mean() > 2
    for _ in range(100):
        part(x)
        load = part.router.load.clone()
        part.router.step()
    assert load.max() / load.double().mean() < 1.25


def test_the_bias_survives_a_change_of_precision() -> None:
    part = build(num_experts=4, top_k=2, bias_update_rate=1e-3)
    part.router.votes.copy_(torch.tensor([1001, 0, -2000, 3]))
    bias = part.router.bias.clone()
    part.bfloat16().float()
    assert torch.equal(part.router.bias, bias)
    assert bias.dtype == torch.float32


@pytest.mark.parametrize("cast", [True, False])
def test_it_learns_in_bfloat16_with_checkpointing(cast: bool) -> None:
    """Weights in bf16, or in fp32 under autocast: near the float32 result, gradients for every expert, load counted."""
    part = build(num_experts=4, top_k=2, num_shared_experts=1, balance="loss", aux_loss_coef=0.1).float().train()
    x = inputs(2, 64).float()
    expected = part(x).detach()
    if cast:
        part, x = part.bfloat16(), x.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not cast):
        out = checkpoint(part, x.requires_grad_(), use_reentrant=False)
        out.float().square().mean().backward()
    error = (out.float() - expected).norm() / expected.norm()
    assert error < 0.03
    for name, parameter in part.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all()
        assert parameter.grad.abs().amax(tuple(range(1, parameter.ndim))).min() > 0, name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [[3, 0, 5, 8], [0, 0, 16, 0]])
def test_the_grouped_product_is_the_loop_and_so_is_its_gradient(dtype: torch.dtype, sizes: list[int]) -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(16, 16, generator=draw).to(dtype).requires_grad_()
    weight = torch.randn(4, 32, 16, generator=draw).to(dtype).requires_grad_()
    ends = torch.tensor(sizes).cumsum(0).int()
    out = grouped_linear(x, weight, ends)
    expected = torch.cat([rows.double() @ w.double().T for rows, w in zip(x.split(sizes), weight, strict=True)])
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    ours = torch.autograd.grad(out.square().sum(), (x, weight))
    theirs = torch.autograd.grad(expected.square().sum(), (x, weight))
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() <= tolerance * b.norm()


def test_initialize_fills_every_expert() -> None:
    config = ModelConfig(
        vocab_size=31,
        hidden_size=WIDTH,
        num_layers=2,
        feedforward=FeedForwardConfig(kind="moe", intermediate_size=HIDDEN),
        experts=ExpertsConfig(num_experts=4, top_k=2, num_shared_experts=1),
    )
    model = Transformer(config)
    initialize(model, config, seed=3)
    for name, parameter in model.decoder.blocks[0].feedforward.named_parameters():
        fan_in = parameter.shape[-1]
        expected = fan_in**-0.5 / (2.0 if ".out" in name else 1.0)
        assert float(parameter.detach().std()) == pytest.approx(expected, rel=0.2), name
