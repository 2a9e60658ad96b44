"""A layer rearranged for inference is the same layer: compared with its parts in float64, whole, in chunks, packed, and token by token."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from andromeda.config.load import load
from andromeda.config.model import ModelConfig
from andromeda.generate import fused_block
from andromeda.generate.optimize import optimize_for_inference
from andromeda.model.kv_cache.dynamic import DynamicKVCache
from andromeda.model.transformer import Transformer
from andromeda.ops import add_norm_shift
from tests.ops import interpreted

SIZES = {"hidden_size": 64, "num_layers": 2, "vocab_size": 96, "max_seq_len": 128}
KINDS: dict[str, list[str]] = {
    "preset andromeda": ["model.alibi.num_heads=2", "model.alibi.fold_into_qk=true"],
    "no shift, RMS norm": ["model.shift.kind=none", "model.block.norm=rms", "model.attention.num_kv_heads=2"],
    "biases, windows": [
        "model.attention.bias=true",
        "model.attention.sliding_window=16",
        "model.block.norm=rms_plain",
        "model.alibi.num_heads=0",
    ],
    "two tokens back, relu2": ["model.shift.tokens=2", "model.feedforward.kind=relu2", "model.feedforward.bias=false"],
}


def configuration(changes: list[str]) -> ModelConfig:
    heads = ["model.attention.num_heads=4", "model.attention.head_dim=32", "model.alibi.num_heads=2"]
    return load("andromeda", [*(f"model.{name}={size}" for name, size in SIZES.items()), *heads, *changes]).model


def model(changes: list[str], dtype: torch.dtype = torch.float64, device: str = "cpu") -> Transformer:
    torch.manual_seed(0)
    made = Transformer(configuration(changes)).eval()
    for parameter in made.parameters():
        # Gains and biases too, so that each of them counts.
        nn.init.normal_(parameter, 1.0 if parameter.ndim < 2 else 0.0, 0.2)
    return made.to(device, dtype)


def tokens() -> Tensor:
    return torch.randint(SIZES["vocab_size"], (2, 53), generator=torch.Generator().manual_seed(1))


def read(made: Transformer, ids: Tensor, **options: Any) -> Tensor:
    with torch.no_grad():
        return made.hidden(ids, **options)


@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)
def test_it_is_the_same_layer(changes: list[str]) -> None:
    plain = model(changes)
    rearranged = optimize_for_inference(copy.deepcopy(plain), compile=False)
    assert all(isinstance(block, fused_block.FusedBlock) for block in rearranged.decoder.blocks)
    ids = tokens()
    documents = (torch.arange(53) // 20).expand(2, -1)
    wanted = read(plain, ids)
    assert torch.allclose(read(rearranged, ids), wanted, rtol=1e-9, atol=1e-9)
    assert torch.allclose(read(rearranged, ids, documents=documents), read(plain, ids, documents=documents), rtol=1e-9, atol=1e-9)
    cache = DynamicKVCache()
    parts = [read(rearranged, part, cache=cache) for part in ids.split([30, 20, 1, 1, 1], 1)]
    assert torch.allclose(torch.cat(parts, 1), wanted, rtol=1e-9, atol=1e-9)


def test_other_layers_stay_as_they_are() -> None:
    for changes in (
        ["model.block.kind=parallel"],
        ["model.block.residual=deepnorm"],
        ["model.feedforward.kind=swiglu"],
        ["model.shift.kind=lerp"],
    ):
        assert not any(fused_block.can_fuse(block) for block in model(changes).decoder.blocks)


@pytest.mark.gpu
@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)
def test_the_kernels_path_is_the_same_layer(changes: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """In chunks, so that the shift's state passes from one to the next."""
    device = str(interpreted.device())
    plain = model(changes, torch.float32, device)
    rearranged = optimize_for_inference(copy.deepcopy(plain), compile=False)
    if interpreted.INTERPRETED:
        monkeypatch.setattr(add_norm_shift, "is_supported", lambda x: True)
    ids, cache = tokens().to(device), DynamicKVCache()
    parts = [read(rearranged, part, cache=cache) for part in ids.split([30, 23], 1)]
    exact = read(plain.double(), ids)
    assert (torch.cat(parts, 1) - exact).norm() / exact.norm() < 1e-5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("compile", [False, True])
def test_in_16_and_8_bits_on_a_gpu(fp8: bool, compile: bool) -> None:
    """As near to float64 as the layer's own parts in bfloat16, twice over; in 8 bits within the error of their rounding."""
    plain = model(KINDS["preset andromeda"], torch.bfloat16, "cuda")
    exact = read(copy.deepcopy(plain).double(), tokens().cuda())
    own = (read(plain, tokens().cuda()) - exact).norm() / exact.norm()
    made = optimize_for_inference(plain, fp8=fp8, compile=compile)
    error = (read(made, tokens().cuda()) - exact).norm() / exact.norm()
    assert error < (0.15 if fp8 else 2 * own)


def test_under_the_interpreter() -> None:
    interpreted.run(__file__)
