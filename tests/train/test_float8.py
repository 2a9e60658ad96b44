"""8-bit matmuls: what is exchanged, and how far the rounding may reach. On a CPU torchao emulates it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from andromeda.config.model import ExpertsConfig, FeedForwardConfig
from andromeda.model.float8_linear import Float8TrainingLinear
from andromeda.model.transformer import Transformer
from andromeda.ops import float8
from andromeda.train import convert_float8, precision
from andromeda.train.precision import Float8, build_precision
from andromeda.utils.errors import ConfigError
from tests.model.exchanged import CONFIG

pytest.importorskip("torchao")

CPU = torch.device("cpu")


def test_parameters_and_names_stay_the_same_tensors() -> None:
    model = Transformer(CONFIG)
    before = dict(model.named_parameters())
    after = dict(Float8(CPU).convert_model(model).named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name] is parameter for name, parameter in before.items())


def test_only_products_of_the_blocks_that_fit_are_exchanged() -> None:
    odd = CONFIG.model_copy(
        update={
            "feedforward": FeedForwardConfig(kind="moe", intermediate_size=24),
            "experts": ExpertsConfig(num_shared_experts=1, num_experts=16),
        }
    )
    kinds = {name: type(module).__name__ for name, module in Float8(CPU).convert_model(Transformer(odd)).named_modules()}
    exchanged = {name for name, kind in kinds.items() if kind == "Float8Linear"}
    assert exchanged == {f"decoder.blocks.{layer}.attention.{part}" for layer in (0, 1) for part in ("query", "key", "value", "out")}


@pytest.mark.parametrize(("triton", "kind"), [(True, "Float8TrainingLinear"), (False, "Float8Linear")])
def test_our_own_layers_where_they_can_run(triton: bool, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(float8, "TRITON", triton)
    on_gpu = Float8(CPU)
    on_gpu.device = torch.device("cuda")
    kinds = {
        type(module).__name__ for module in on_gpu.convert_model(Transformer(CONFIG)).decoder.modules() if isinstance(module, nn.Linear)
    }
    assert kinds == {kind}


def test_a_router_is_left_alone() -> None:
    """The shared expert's first two layers, 24 wide, are filled up together; its last one reads 24."""
    mixture = CONFIG.model_copy(
        update={
            "feedforward": FeedForwardConfig(kind="moe", intermediate_size=24),
            "experts": ExpertsConfig(num_shared_experts=1, num_experts=16),
        }
    )
    model = Transformer(mixture)
    convert_float8.convert_to_float8(model.decoder, precision._is_block_linear)
    exchanged = {name for name, module in model.decoder.named_modules() if isinstance(module, Float8TrainingLinear)}
    attention = {f"attention.{part}" for part in ("query", "key", "value", "out")}
    shared = {f"feedforward.shared.0.{part}" for part in ("gate", "inner")}
    assert exchanged == {f"blocks.{layer}.{part}" for layer in (0, 1) for part in attention | shared}


def test_a_product_is_that_of_the_rounded_factors() -> None:
    """Each factor is rounded to e4m3 after its largest value has been scaled to 448; the matmul itself is exact but for float32."""
    model = Float8(CPU).convert_model(Transformer(CONFIG))
    layer = model.decoder.blocks[0].attention.query
    x = torch.randn(1, 5, 32)

    def rounded(t: torch.Tensor) -> torch.Tensor:
        scale = 448 / t.abs().max()
        return (t * scale).to(torch.float8_e4m3fn).double() / scale

    expected = rounded(x) @ rounded(layer.weight.detach()).T
    assert (layer(x) - expected).abs().max() < 1e-2 * expected.abs().max()
    exact = x.double() @ layer.weight.detach().double().T
    assert (layer(x) - exact).norm() < 0.08 * exact.norm()  # e4m3 rounds each factor by at most 1/16


def test_gradients_are_near_those_of_float32() -> None:
    ids = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(0))
    gradients = []
    for prepare in (lambda model: model, Float8(CPU).convert_model):
        model = prepare(Transformer(CONFIG))
        model(ids).square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    plain, rounded = gradients
    assert not torch.equal(plain, rounded)
    assert torch.cosine_similarity(plain, rounded, dim=0) > 0.98


def test_a_cpu_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"needs a GPU with 8-bit matmuls .* use bf16 or auto\.$"):
        build_precision("fp8", CPU)
