"""Matmuls in 8 bits against float64: quantized to half a unit in the last place, rows apart, within the bound of their rounding."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from andromeda.config.load import load
from andromeda.generate.optimize import optimize_for_inference
from andromeda.model.feedforward.dense import ACTIVATIONS
from andromeda.model.transformer import Transformer
from andromeda.ops import activation, float8_inference
from tests.ops import interpreted


def test_quantize_rounds_by_row() -> None:
    """e4m3 has three bits of mantissa: every number is within 1/16 of itself, or within half of the smallest step; the largest is exact."""
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)) * torch.tensor([1e-3, 1.0, 1e3, 1.0, 0.0])[:, None]
    rows, scale = float8_inference.quantize(x)
    back = rows.double() * scale
    step = 2.0**-9 * scale.double()
    assert ((back - x.double()).abs() <= torch.maximum(x.double().abs() / 16, step / 2) * 1.0001).all()
    for row, whole in zip(back[:4], x[:4], strict=True):
        assert row.abs().max() == pytest.approx(float(whole.abs().max()), rel=1e-6)
    assert (back[4] == 0).all()


def test_linear_layer_is_the_product_of_the_quantized_factors() -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(64, 32).bfloat16(), torch.randn(2, 5, 64).bfloat16()
    eight = float8_inference.Float8DynamicLinear(linear)
    rows, scale = float8_inference.quantize(x.flatten(0, 1))
    weight, weight_scale = float8_inference.quantize(linear.weight)
    exact = (rows.double() * scale) @ (weight.double() * weight_scale).T + linear.bias.double()
    assert ((eight(x).flatten(0, 1).double() - exact).abs() <= 2.0**-8 * exact.abs() + 1e-6).all()
    wanted = F.linear(x.double(), linear.weight.double(), linear.bias.double())
    assert (eight(x).double() - wanted).norm() / wanted.norm() < 0.05


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with fp8 matmuls")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("rows", "outputs", "width"),
    [*((rows, 96, width) for rows in (1, 2, 15, 16, 17, 40, 130) for width in (320, 10240)), (2048, 2304, 320)],
)
def test_any_number_of_rows_on_a_gpu(rows: int, outputs: int, width: int, bias: bool) -> None:
    """Also of as many as have their bias added within the matmul."""
    assert (rows * outputs >= float8_inference.SPLIT_K_OUTPUTS) == (outputs > 96)
    torch.manual_seed(0)
    linear, x = nn.Linear(width, outputs, bias=bias).bfloat16(), torch.randn(rows, width).bfloat16()
    wanted = float8_inference.Float8DynamicLinear(linear)(x).double()
    found = float8_inference.Float8DynamicLinear(linear.cuda())(x.cuda()).double().cpu()
    assert (found - wanted).norm() / wanted.norm() < 0.01


@pytest.mark.gpu
@pytest.mark.parametrize("name", activation.ACTIVATIONS)
@pytest.mark.parametrize("K", [16, 100])
def test_activation_and_quantization_at_once(name: str, K: int) -> None:
    """The kernel's scale and numbers are those of the activation in float64, rounded twice."""
    x = (3 * torch.randn(7, K, generator=torch.Generator().manual_seed(1))).bfloat16()
    rows, scale = activation.activate_quantize(x.to(interpreted.device()), name)
    wanted = ACTIVATIONS.get(name, nn.Identity())(x.double())
    largest = wanted.abs().amax(-1, keepdim=True)
    assert (scale.cpu().double() / (largest / float8_inference.FLOAT8_MAX) - 1).abs().max() < 2.0**-7
    if interpreted.INTERPRETED:
        return  # Triton's interpreter loses the carry where rounding to 8 bits reaches the next power of two.
    slack = (wanted.abs() / 16 + 2.0**-10 * scale.cpu().double()) * 1.02 + 2.0**-8 * wanted.abs()
    assert ((rows.cpu().double() * scale.cpu() - wanted).abs() <= slack).all()


def test_a_model_in_8_bits_predicts_nearly_the_same() -> None:
    config = load("nano").model
    model = Transformer(config).eval()
    for block in model.decoder.blocks:
        nn.init.normal_(block.attention.out.weight, std=0.05)
    ids = torch.randint(config.vocab_size, (1, 64), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        before = model.hidden(ids)
        optimize_for_inference(model, fp8=True, compile=False)
        after = model.hidden(ids)
    assert 0 < (after - before).norm() / before.norm() < 0.1
    assert any(isinstance(part, float8_inference.Float8DynamicLinear) for part in model.modules())


def test_under_the_interpreter() -> None:
    interpreted.run(__file__)
