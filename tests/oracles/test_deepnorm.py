"""DeepNorm (arXiv 2203.00555): its constants, its start, and a decoder against one written out from the paper."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from andromeda.config.model import AttentionConfig, FeedForwardConfig, InitConfig, ModelConfig, RotaryConfig
from andromeda.model.block import deepnorm_alpha
from andromeda.model.init import deepnorm_beta
from andromeda.model.transformer import Transformer

CONSTANTS = {6: (1.861, 0.380), 12: (2.213, 0.319), 24: (2.632, 0.269), 32: (2.828, 0.250), 48: (3.130, 0.226), 96: (3.722, 0.190)}


@pytest.mark.parametrize("depth", CONSTANTS)
def test_constants_are_the_papers(depth: int) -> None:
    alpha, beta = deepnorm_alpha(depth), deepnorm_beta(depth)
    assert (round(alpha, 3), round(beta, 3)) == CONSTANTS[depth]
    # What bounds the update: the sum over 2 depth branches of v^2 + w^2 = 2 beta^2, over alpha^2.
    assert 2 * depth * 2 * beta**2 / alpha**2 == pytest.approx(1.0)


def config(kind: str = "serial", depth: int = 3, width: int = 16) -> ModelConfig:
    return ModelConfig.model_validate(
        {
            "vocab_size": 23,
            "max_seq_len": 32,
            "hidden_size": width,
            "num_layers": depth,
            "attention": AttentionConfig(num_heads=2, num_kv_heads=2, head_dim=width // 2, backend="eager"),
            "rotary": RotaryConfig(kind="none"),
            "feedforward": FeedForwardConfig(kind="relu", intermediate_size=4 * width),
            "block": {"kind": kind, "residual": "deepnorm", "norm": "layer", "eps": 1e-5},
            "init": InitConfig(kind="deepnorm"),
        }
    )


def decoder(w: dict[str, Tensor], ids: Tensor, depth: int, parallel: bool) -> Tensor:
    """LN(a x + attention(x)), LN(a x + ffn(x)) for each layer, one head after the other; parallel sums both branches under one norm."""
    x, alpha = w["embedding.tokens.weight"][ids], (2 * depth) ** 0.25
    causal = torch.full((len(ids), len(ids)), -math.inf, dtype=torch.float64).triu(1)
    for layer in range(depth):
        p = {name.removeprefix(f"decoder.blocks.{layer}."): value for name, value in w.items()}

        def attention(x: Tensor, p: dict[str, Tensor] = p) -> Tensor:
            q, k, v = ((x @ p[f"attention.{name}.weight"].T).chunk(2, -1) for name in ("query", "key", "value"))
            mixed = [torch.softmax(a @ b.T / math.sqrt(b.shape[1]) + causal, -1) @ c for a, b, c in zip(q, k, v, strict=True)]
            return torch.cat(mixed, -1) @ p["attention.out.weight"].T

        def network(x: Tensor, p: dict[str, Tensor] = p) -> Tensor:
            return (x @ p["feedforward.inner.weight"].T).clamp_min(0) @ p["feedforward.out.weight"].T

        def norm(x: Tensor, gain: Tensor) -> Tensor:
            centered = x - x.mean(-1, keepdim=True)
            return centered / torch.sqrt(centered.square().mean(-1, keepdim=True) + 1e-5) * gain

        if parallel:
            x = norm(alpha * x + attention(x) + network(x), p["norm.weight"])
        else:
            x = norm(alpha * x + attention(x), p["attention_norm.weight"])
            x = norm(alpha * x + network(x), p["feedforward_norm.weight"])
    return x @ w["head.weight"].T


@pytest.mark.parametrize("kind", ["serial", "parallel"])
@torch.no_grad()
def test_the_decoder_is_the_papers(kind: str) -> None:
    model = Transformer(config(kind)).double()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter += torch.linspace(-0.3, 0.3, parameter.numel(), dtype=torch.float64)
    ids = torch.randint(0, 23, (9,), generator=torch.Generator().manual_seed(0))
    expected = decoder(model.state_dict(), ids, 3, kind == "parallel")
    torch.testing.assert_close(model(ids[None])[0], expected, rtol=1e-12, atol=1e-12)


def test_the_start_is_xavier_with_beta_on_all_but_queries_and_keys() -> None:
    width, depth = 128, 6
    model = Transformer(config(depth=depth, width=width))
    gains = {"query": 1.0, "key": 1.0, "value": CONSTANTS[6][1], "attention.out": CONSTANTS[6][1], "feedforward": CONSTANTS[6][1]}
    checked = 0
    for name, parameter in model.decoder.named_parameters():
        gain = next((gain for part, gain in gains.items() if part in name and parameter.ndim == 2), None)
        if gain is None:
            assert torch.equal(parameter, torch.ones_like(parameter))
            continue
        checked += 1
        assert float(parameter.detach().std()) == pytest.approx(gain * math.sqrt(2 / sum(parameter.shape)), rel=0.03)
    assert checked == 6 * depth


def update(model: Transformer, ids: Tensor, rate: float) -> float:
    """How far one step of SGD moves the last hidden states, as a root mean square."""
    before = model.hidden(ids).detach()
    F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            parameter -= rate * parameter.grad
        return float((model.hidden(ids) - before).square().mean().sqrt())


@pytest.mark.parametrize("depth", [8, 32])
def test_one_step_moves_the_output_far_less_than_without_the_constants(depth: int) -> None:
    """What the constants are for: the first steps of a deep post-norm model are tamed. Without them alpha and all gains are one."""
    ids = torch.randint(0, 23, (8, 16), generator=torch.Generator().manual_seed(0))
    plain, tamed = (
        Transformer(config(depth=depth, width=32)).double(),
        Transformer(config(depth=depth, width=32)).double(),
    )
    for block in plain.decoder.blocks:
        block.alpha = 1.0
        with torch.no_grad():
            for weight in (block.attention.value.weight, block.attention.out.weight, *block.feedforward.parameters()):
                weight /= deepnorm_beta(depth)
    assert update(tamed, ids, 0.05) < 0.1 * update(plain, ids, 0.05)
