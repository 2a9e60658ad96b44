"""Gradients against central differences in float64: all parameters of every legal pair, and each part by itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.func import functional_call

from andromeda.model.transformer import Transformer
from tests.conformance.covering import CHOICES, DEFAULTS, model_config
from tests.conformance.models import ROWS, T, build, ids, shaken

STEP = 1e-6


def loss(model: Transformer, parameters: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """A smooth function of all logits."""
    return functional_call(model, parameters, (tokens,), {"span": T}).square().mean()


@pytest.mark.parametrize("row", ROWS)
def test_the_gradient_is_the_slope_along_a_direction(row: str) -> None:
    """Along one random direction in which each parameter tensor has the same share of the slope's size."""
    model, tokens = build(row), ids(length=6)
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(loss(model, parameters, tokens), list(parameters.values()))
    draw = torch.Generator().manual_seed(3)
    direction = {}
    for name, gradient in zip(parameters, gradients, strict=True):
        assert gradient.abs().max() > 0, f"{name} has no influence"
        noise = torch.randn(gradient.shape, generator=draw, dtype=torch.float64)
        direction[name] = (noise + gradient.sign()) / (gradient.norm() * gradient.numel() ** 0.5)
    predicted = sum((g * d).sum() for g, d in zip(gradients, direction.values(), strict=True))
    longest = max(float(d.norm()) for d in direction.values())
    with torch.no_grad():
        there, back = (
            loss(model, {name: p + sign * STEP / longest * direction[name] for name, p in parameters.items()}, tokens) for sign in (1, -1)
        )
    assert (there - back) * longest / (2 * STEP) == pytest.approx(float(predicted), rel=1e-5)


ALONE = [choice for choice in CHOICES if choice[1] != DEFAULTS[choice[0]] and choice[0] not in ("embedding", "init", "skips")]


@pytest.mark.parametrize(("slot", "value"), [next(iter(DEFAULTS.items())), *ALONE])
def test_gradcheck_of_a_layer(slot: str, value: str) -> None:
    """The second layer of a model with one part exchanged, for its input, its parameters and the embedded values."""
    model = shaken(model_config({slot: value}))
    tokens, documents = ids(batch=1, length=5), torch.tensor([[0, 0, 1, 1, 1]])
    ctx = model.context(tokens, documents=documents, span=T).for_layer(1)
    x = torch.randn(1, 5, model.config.hidden_size, dtype=torch.float64, generator=torch.Generator().manual_seed(4)).requires_grad_()
    layer = model.decoder.blocks[1]
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def run(x: Tensor, *values: Tensor) -> Tensor:
        return functional_call(layer, dict(zip(names, values, strict=True)), (x, ctx))

    assert gradcheck(run, (x, *parameters), fast_mode=True)


@pytest.mark.parametrize("value", ["untied", "tied", "capped-head"])
@pytest.mark.parametrize("embedding", ["plain", "factorized", "normed"])
def test_gradcheck_of_embedding_and_head(embedding: str, value: str) -> None:
    if (embedding, value) == ("factorized", "tied"):
        pytest.skip("refused")
    model = shaken(model_config({"embedding": embedding, "head": value, "shift": "smear", "position": "absolute"}))
    ctx = model.context(ids(batch=1, length=5))
    ends = nn.ModuleList([model.embedding, model.head])
    names, parameters = zip(*ends.named_parameters(), strict=True)

    def run(*values: Tensor) -> Tensor:
        held = dict(zip(names, values, strict=True))
        x = functional_call(model.embedding, {n[2:]: p for n, p in held.items() if n.startswith("0.")}, (ctx,))
        head = {n[2:]: p for n, p in held.items() if n.startswith("1.")}
        return functional_call(model.head, head if value != "tied" else head | {"weight": held["0.tokens.weight"]}, (x,))

    assert gradcheck(run, parameters, fast_mode=True)
