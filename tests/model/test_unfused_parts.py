"""Parts without a fused kernel are named, those with one are not."""

from __future__ import annotations

from typing import Any

import pytest

from andromeda.config.load import from_values
from andromeda.model.meta_model import meta_model
from andromeda.model.unfused_parts import describe_unfused, unfused_parts
from tests.hub.exported import small_preset


def parts(**changes: Any) -> dict[str, int]:
    sizes = {"hidden_size": 64, "num_layers": 3, "attention": {"num_heads": 2, "head_dim": 32}}
    values = {key: sizes.get(key, {}) | value if isinstance(value, dict) else value for key, value in changes.items()}
    base = {"feedforward": {"kind": "gelu", "bias": True}}
    return unfused_parts(meta_model(from_values({"model": base | sizes | values, "train": {"seq_len": 64}}).model))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {}),
        ({"feedforward": {"kind": "swiglu"}}, {}),
        ({"shift": {"kind": "chunks", "tokens": 1}}, {}),
        ({"shift": {"kind": "chunks", "tokens": 2}}, {"ChunkShift by 2 tokens": 6}),
        ({"shift": {"kind": "lerp"}}, {"LerpShift": 6}),
        ({"feedforward": {"kind": "relu2", "bias": True}}, {"MLP with relu2": 3}),
        ({"feedforward": {"kind": "gelu"}}, {"MLP with gelu and no biases": 3}),
        ({"attention": {"mixer": "sigmoid"}}, {"SigmoidAttention": 3}),
    ],
)
def test_parts(changes: dict[str, Any], expected: dict[str, int]) -> None:
    assert parts(**changes) == expected
    assert (describe_unfused(expected) == "") == (not expected)
    assert all(name in describe_unfused(expected) for name in expected)


def test_a_norm_of_a_users_own_is_named() -> None:
    """An exchanged part is seen, since kernels are matched again."""
    from andromeda.model.norm import RMSNorm

    class OwnNorm(RMSNorm):
        def forward(self, x: Any) -> Any:
            return super().forward(x) * 2

    model = meta_model(small_preset("speedrun"))
    before = unfused_parts(model)
    model.decoder.blocks[0].add_module("feedforward_norm", OwnNorm(64, 1e-6))
    assert unfused_parts(model) == before | {"OwnNorm": 1}


def test_the_default_preset_has_a_kernel_for_every_part() -> None:
    assert unfused_parts(meta_model(small_preset("andromeda"))) == {}
