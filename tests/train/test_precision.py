"""The loss scale against torch's GradScaler, and what `auto` takes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from andromeda.config.model import AttentionConfig, FeedForwardConfig, ModelConfig
from andromeda.model.master_weight_linear import MasterWeightLinear
from andromeda.model.transformer import Transformer
from andromeda.train.precision import Float16, build_precision
from andromeda.utils.errors import ConfigError

CPU = torch.device("cpu")


@given(st.lists(st.sampled_from(["good", "inf", "nan"]), max_size=15))
def test_loss_scale_follows_grad_scaler(steps: list[str]) -> None:
    """Scale, gradients and the decision to step, over any sequence of good and overflowing gradients."""
    ours = Float16(CPU)
    ours.INTERVAL = 4
    theirs = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=4)
    a, b = nn.Parameter(torch.tensor([3.0, -1.0])), nn.Parameter(torch.tensor([3.0, -1.0]))
    optimizer = torch.optim.SGD([b], lr=0.1)
    for kind in steps:
        factor = {"good": 1.0, "inf": math.inf, "nan": math.nan}[kind]
        a.grad = b.grad = None
        (a.square().sum() * ours.loss_scale).backward()
        theirs.scale(b.square().sum()).backward()
        assert a.grad is not None
        assert b.grad is not None
        a.grad *= factor
        b.grad *= factor
        ours.unscale_grads([a])
        theirs.unscale_(optimizer)
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=0, equal_nan=True)
        before = b.detach().clone()
        theirs.step(optimizer)
        theirs.update()
        norm = float(a.grad.norm())
        taken = not ours.overflowed(1.0, norm)
        assert taken == bool((b != before).any())
        if taken:
            with torch.no_grad():
                a -= 0.1 * a.grad
        ours.update(norm)
        assert float(ours.loss_scale) == theirs.get_scale() or float(ours.scale) == 1.0 > theirs.get_scale()
        assert torch.equal(a, b)


def test_a_scale_of_one_does_not_hide_a_broken_run() -> None:
    precision = Float16(CPU)
    for _ in range(16):
        assert precision.overflowed(1.0, math.inf)
        precision.update(math.inf)
    assert float(precision.loss_scale) == 1.0
    assert not precision.overflowed(1.0, math.inf), "from here on it is the guard's matter"
    assert not Float16(CPU).overflowed(math.nan, math.nan), "a loss that is not finite is no overflow of gradients"


@pytest.mark.parametrize(("bf16", "amx", "expected"), [(False, False, "fp32"), (True, False, "bf16"), (False, True, "bf16")])
def test_auto_on_a_cpu(monkeypatch: pytest.MonkeyPatch, bf16: bool, amx: bool, expected: str) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert build_precision("auto", CPU).name == expected


def test_fp8_is_refused_in_one_sentence() -> None:
    with pytest.raises(ConfigError, match=r"'fp8' needs a GPU with 8-bit matmuls .* and cpu has none: use bf16 or auto\."):
        build_precision("fp8", CPU)


@pytest.mark.parametrize(("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_products_run_in_the_named_type(name: str, dtype: torch.dtype) -> None:
    precision = build_precision(name, CPU)
    layer = nn.Linear(4, 4)
    with precision.autocast():
        assert layer(torch.ones(1, 4)).dtype == dtype
    assert layer.weight.dtype == torch.float32


def test_state_round_trip() -> None:
    precision, again = Float16(CPU), Float16(CPU)
    for norm in (1.0, math.inf, 1.0, 1.0):
        precision.update(norm)
    again.load_state_dict(precision.state_dict())
    assert again.state_dict() == precision.state_dict() == {"scale": 2.0**15, "good": 2}


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_layers_of_the_blocks_are_exchanged_on_a_gpu(name: str, dtype: torch.dtype) -> None:
    """All but the router, whose scores decide by small differences; nowhere else."""
    config = ModelConfig(
        vocab_size=64,
        max_seq_len=16,
        hidden_size=32,
        num_layers=1,
        attention=AttentionConfig(num_heads=2, head_dim=16),
        feedforward=FeedForwardConfig(kind="moe"),
    )
    made = build_precision(name, CPU)
    plain = made.convert_model(Transformer(config))
    assert not any(isinstance(module, MasterWeightLinear) for module in plain.modules())
    made.device = torch.device("cuda")
    on_gpu = made.convert_model(Transformer(config))
    exchanged = {path: module.dtype for path, module in on_gpu.named_modules() if isinstance(module, MasterWeightLinear)}
    assert exchanged == {f"decoder.blocks.0.attention.{part}": dtype for part in ("query", "key", "value", "out")}
    with made.accumulate_grads():
        query = on_gpu.decoder.blocks[0].attention.query
        assert query.weight.grad is not None
    assert query.total is None
