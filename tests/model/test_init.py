"""How weights start: the documented spread of each matrix, from one seed, whatever the device and precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from andromeda.config.model import ModelConfig
from andromeda.model.transformer import Transformer
from tests.conformance.covering import CHOICES, DEFAULTS, model_config

BIG: dict[str, Any] = {
    "vocab_size": 400,
    "max_seq_len": 300,
    "hidden_size": 128,
    "num_layers": 8,
    "attention": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 32, "bias": True, "qk_norm": "l2_dim_scale"},
    "feedforward": {"kind": "swiglu", "intermediate_size": 192, "bias": True},
    "embedding": {"absolute": True},
    "value_embedding": {"kind": "layered"},
    "shift": {"kind": "smear"},
    "skips": {"first": True, "unet": True},
}
OUT = 1 / (2 * 8) ** 0.5
"""What branch outputs are divided by at depth 8."""
SPREADS = {
    "tokens.weight": 0.02,
    "absolute.table.weight": 0.02,
    "value_embedding.table.weight": 0.02,
    "smear.gate.weight": 12**-0.5,
    "query.weight": 128**-0.5,
    "key.weight": 128**-0.5,
    "value.weight": 128**-0.5,
    "attention.out.weight": 128**-0.5 * OUT,
    "gate.weight": 128**-0.5,
    "inner.weight": 128**-0.5,
    "feedforward.out.weight": 192**-0.5 * OUT,
    "head.weight": 128**-0.5,
}


def build(seed: int = 0, **tables: Any) -> Transformer:
    return Transformer(ModelConfig.model_validate(BIG | tables), seed=seed)


def spread(parameter: Tensor) -> float:
    return float(parameter.detach().double().std())


def test_normal_spreads_are_those_documented() -> None:
    checked = set()
    for name, parameter in build().named_parameters():
        end = next((end for end in SPREADS if name.endswith(end)), None)
        if end is not None:
            checked.add(end)
            tolerance = 0.6 if parameter.numel() < 100 else 0.05
            assert spread(parameter) == pytest.approx(SPREADS[end], rel=tolerance), name
            assert float(parameter.detach().mean().abs()) < 4 * SPREADS[end] / parameter.numel() ** 0.5, name
        elif "bias" in name:
            assert not parameter.any(), name
    assert checked == set(SPREADS)


def test_a_given_spread_replaces_the_fan_in_alone() -> None:
    model = build(init={"std": 0.03})
    assert spread(model.decoder.blocks[0].attention.query.weight) == pytest.approx(0.03, rel=0.05)
    assert spread(model.decoder.blocks[0].attention.out.weight) == pytest.approx(0.03 * OUT, rel=0.05)
    assert spread(model.embedding.tokens.weight) == pytest.approx(0.02, rel=0.05)


def test_gains_and_mixes_start_as_their_parts_say() -> None:
    model = build()
    block = model.decoder.blocks[3]
    assert torch.equal(block.attention_norm.weight, torch.ones(128))
    assert torch.equal(block.attention.qk_norm.query_scale, torch.full((4, 32), 32**0.25))
    assert block.attention.value_mix.weight.item() == 0.5
    assert model.decoder.mixes[0].weights.tolist() == [1.0, 0.0]
    assert model.embedding.smear.weight.item() == 0.0


def test_zero_projections_zero_outputs_and_head_and_spread_embeddings_by_one() -> None:
    model = build(init={"kind": "zero_projections"})
    zero = {name.rsplit(".", 2)[-2] for name, p in model.named_parameters() if p.ndim == 2 and not p.any()}
    assert zero == {"out", "head"}
    assert spread(model.embedding.tokens.weight) == pytest.approx(1.0, rel=0.05)
    assert spread(model.value_embedding.table.weight) == pytest.approx(1.0, rel=0.05)
    assert spread(model.decoder.blocks[0].attention.query.weight) == pytest.approx(128**-0.5, rel=0.05)


def test_one_seed_is_one_model_and_leaves_the_callers_randomness_alone() -> None:
    torch.manual_seed(5)
    first = build(seed=7).state_dict()
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(3), drawn)
    torch.manual_seed(6)
    second, other = build(seed=7).state_dict(), build(seed=8).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_one_seed_is_one_model_in_any_precision(dtype: torch.dtype) -> None:
    wanted = {name: value.to(dtype) for name, value in build().state_dict().items()}
    torch.set_default_dtype(dtype)
    try:
        built = build().state_dict()
    finally:
        torch.set_default_dtype(torch.float32)
    for name, value in built.items():
        if value.dtype == dtype and value.ndim == 2 and "qk_norm" not in name:
            torch.testing.assert_close(value, wanted[name], rtol=0, atol=0, msg=name)


ALONE = [choice for choice in CHOICES if choice[1] != DEFAULTS[choice[0]]]


@pytest.mark.parametrize(("slot", "value"), ALONE)
def test_on_the_meta_device_a_model_has_the_same_shapes_and_no_storage(slot: str, value: str) -> None:
    c = model_config({slot: value})
    with torch.device("meta"):
        meta = Transformer(c)
    real = Transformer(c).state_dict()
    assert {name: tuple(x.shape) for name, x in meta.state_dict().items()} == {name: tuple(x.shape) for name, x in real.items()}
    assert all(x.is_meta for x in meta.state_dict().values())


class Own(nn.Module):
    """An attention of a user's own, with weights that it fills itself."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.rand(config.hidden_size))

    def forward(self, x: Tensor, ctx: object) -> Tensor:
        return x + self.shift


@pytest.mark.usefixtures("allow_code")
def test_parts_of_a_users_own_draw_from_the_seed_too() -> None:
    attention = BIG["attention"] | {"mixer": f"{__name__}:Own"}
    shifts = [build(seed=seed, attention=attention).decoder.blocks[2].attention.shift for seed in (1, 1, 2)]
    assert torch.equal(shifts[0], shifts[1])
    assert not torch.equal(shifts[0], shifts[2])
