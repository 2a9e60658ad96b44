"""The identities behind `andromeda explain`, in float64, for every pair of parts that a configuration can combine."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from andromeda.config.model import ModelConfig
from andromeda.explain.integrated_gradients import TOLERANCE, _inputs, _integral, integrated_gradients
from andromeda.explain.residual_decomposition import ResidualPart, apply_frozen_norm, decompose_residual, direct_attribution
from andromeda.explain.trace import logit_lens, trace
from andromeda.model.attention import Attention
from andromeda.ops.attention import AttentionSpec
from andromeda.utils.errors import RequestError
from tests.conformance.models import ROWS, T, build, ids, shaken

EXACT = 1e-9
DOCUMENTS = torch.tensor([[0] * 5 + [1] * 4 + [2] * 3]).expand(2, -1)
SMALL = {"vocab_size": 29, "max_seq_len": 16, "hidden_size": 24, "num_layers": 3}


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["one", "documents"])
def test_every_architecture(row: str, documents: Tensor | None) -> None:
    model, text = build(row), ids()
    seen = trace(model, text, documents)
    with torch.no_grad():
        logits = model(text, documents=documents)
    torch.testing.assert_close(seen.logits, logits, rtol=0, atol=EXACT)
    assert logit_lens(model, seen, 3).error <= EXACT
    for layer, block in zip(seen.layers, model.decoder.blocks, strict=True):
        if not hasattr(block.attention, "core_attention"):
            # A mixer without weights over keys has no map.
            assert layer.weights is None
            continue
        assert layer.weights is not None
        assert layer.weights_error <= EXACT
        if model.config.attention.mixer == "softmax":
            torch.testing.assert_close(layer.weights.sum(-1), torch.ones_like(layer.weights[..., 0]), rtol=0, atol=EXACT)
        assert float(layer.weights.triu(1).abs().max()) == 0.0
    for position in (0, T // 2, T - 1):
        shares = direct_attribution(model, seen, position, 3, 7, row=1)
        # Of the logit itself, which the soft cap of the head bounds.
        capped = sum(shares.parts.values()) + shares.bias
        if model.head.softcap:
            capped = model.head.softcap * torch.tanh(torch.tensor(capped / model.head.softcap, dtype=torch.float64)).item()
        assert abs(capped - float(logits[1, position, 3])) <= EXACT
        assert shares.error <= EXACT
        if not model.head.softcap:
            lead = sum(shares.lead.values()) + shares.lead_bias
            assert abs(lead - float(logits[1, position, 3] - logits[1, position, 7])) <= EXACT


def test_maps_do_not_cross_documents() -> None:
    seen = trace(build(ROWS[0]), ids(), DOCUMENTS)
    other = DOCUMENTS[0][:, None] != DOCUMENTS[0][None]
    for layer in seen.layers:
        assert layer.weights is not None
        assert float(layer.weights[:, :, other].abs().max()) == 0.0


def test_maps_are_the_textbooks_softmax() -> None:
    """Against the formula written out, on the projections' own outputs, for heads without positions."""
    config = ModelConfig.model_validate(
        {**SMALL, "rotary": {"kind": "none"}, "attention": {"num_heads": 2, "num_kv_heads": 2, "head_dim": 8}}
    )
    model = shaken(config)
    seen, block = trace(model, ids()), model.decoder.blocks[0]
    x = block.attention_norm(seen.embedded)
    q, k = (f(x).unflatten(-1, (2, 8)).transpose(1, 2) for f in (block.attention.query, block.attention.key))
    logits = q @ k.transpose(-1, -2) / 8**0.5
    expected = logits.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)
    assert seen.layers[0].weights is not None
    torch.testing.assert_close(seen.layers[0].weights, expected, rtol=0, atol=EXACT)


def test_the_way_straight_to_the_head() -> None:
    """A part's share is what the logit loses when the part is taken out of the last sum and the norm keeps its statistics."""
    heads = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 8}
    model = shaken(ModelConfig.model_validate({**SMALL, "block": {"norm": "layer"}, "attention": heads})).requires_grad_(False)
    seen = trace(model, ids())
    at = seen.layers[-1].output[0, -1]
    last = seen.layers[-1].feedforward[0, -1]
    scale = torch.sqrt(at.var(correction=0) + model.norm.eps)
    without = (at - last - (at - last).mean()) / scale * model.norm.weight @ model.head.weight[3]
    share = direct_attribution(model, seen, T - 1, 3, 7).parts[ResidualPart("feed-forward", 2)]
    assert abs(float(seen.logits[0, -1, 3] - without) - share) <= EXACT


@pytest.mark.parametrize("row", [name for name in ROWS if "moe" not in name])
def test_frozen_norms_are_linear_and_exact(row: str) -> None:
    norm = next(m for m in build(row).modules() if type(m).__name__ in ("RMSNorm", "RMSNormNoGain", "LayerNorm") and m.eps < 1e-4)
    a, b = torch.randn(2, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(apply_frozen_norm(norm, a + b, a + b), norm(a + b))
    torch.testing.assert_close(apply_frozen_norm(norm, a, a + b) + apply_frozen_norm(norm, b, a + b), norm(a + b))


def smooth(row: str) -> bool:
    return "moe" not in row


def has_corners(row: str) -> bool:
    """Rows with relu, at whose corners the quadrature converges slowly: it may end at its most steps with a larger gap."""
    return "relu" in row.replace("relu2", "")


@pytest.mark.parametrize("row", [name for name in ROWS if smooth(name)][::4])
def test_integrated_gradients_are_complete(row: str) -> None:
    """Their sum is the difference of two passes that no gradient is taken of."""
    model, text = build(row), ids(batch=1)
    nothing = torch.full_like(text, 5)
    found = integrated_gradients(model, text, T - 1, 3, nothing)
    with torch.no_grad():
        difference = float(model(text)[0, -1, 3] - model(nothing)[0, -1, 3])
    assert abs(float(found.shares.sum()) - difference) <= TOLERANCE * float(found.shares.abs().sum()) + 1e-9
    assert found.complete
    assert abs(found.logit - found.baseline - difference) <= EXACT


def test_without_corners_few_steps_are_exact() -> None:
    """GELU has none, so that quadrature converges faster than any power of the steps."""
    model, text = (
        shaken(ModelConfig.model_validate({**SMALL, "attention": {"num_heads": 2, "num_kv_heads": 1, "head_dim": 8}})),
        ids(batch=1),
    )
    nothing = torch.full_like(text, 5)
    inputs = [_inputs(model, x) for x in (nothing, text)]
    with torch.no_grad():
        difference = float(model(text)[0, -1, 3] - model(nothing)[0, -1, 3])
    gaps = [abs(float(_integral(model, text, T - 1, 3, inputs, steps, None).sum()) - difference) for steps in (8, 128)]
    assert gaps[1] <= 1e-7
    assert gaps[0] > 10 * gaps[1]


def test_integrated_gradients_of_a_linear_model_are_its_weights() -> None:
    """With no layer's output left, a hidden state is the normalized embedding: shares of earlier tokens are zero."""
    config = ModelConfig.model_validate({**SMALL, "num_layers": 1, "attention": {"num_heads": 2, "num_kv_heads": 1, "head_dim": 8}})
    model = shaken(config)
    with torch.no_grad():
        model.decoder.blocks[0].attention.out.weight.zero_()
        model.decoder.blocks[0].feedforward.out.weight.zero_()
    found = integrated_gradients(model, ids(batch=1), T - 1, 3, torch.full((1, T), 5))
    assert float(found.shares[:-1].abs().max()) == 0.0
    assert found.complete


def test_a_mixture_is_refused_with_its_reason() -> None:
    row = next(name for name in ROWS if "moe" in name)
    with pytest.raises(RequestError, match="discontinuous"):
        integrated_gradients(build(row), ids(batch=1), T - 1, 3, torch.full((1, T), 5))


class Squares(Attention):
    """Averages the squares of values: its weights cannot be shown."""

    def core_attention(self, q: Tensor, k: Tensor, v: Tensor, pattern: AttentionSpec) -> Tensor:
        return super().core_attention(q, k, v.square() + v, pattern)


@pytest.mark.usefixtures("allow_code")
def test_attention_that_averages_no_values_has_no_map() -> None:
    mechanism = f"{__name__}:Squares"
    config = ModelConfig.model_validate({**SMALL, "attention": {"num_heads": 2, "num_kv_heads": 1, "head_dim": 8, "mixer": mechanism}})
    model = shaken(config)
    seen = trace(model, ids())
    assert all(layer.weights is None for layer in seen.layers)
    # Its heads still go through the output projection one by one, so that the sum stays exact.
    assert direct_attribution(model, seen, T - 1, 3, 7).error <= EXACT


def test_the_model_is_as_it_was() -> None:
    model = build(ROWS[0])
    before = {name: module._forward_hooks.copy() for name, module in model.named_modules()}
    seen = trace(model, ids())
    decompose_residual(model, seen, 0)
    assert all("core_attention" not in vars(block.attention) for block in model.decoder.blocks)
    assert {name: module._forward_hooks for name, module in model.named_modules()} == before
