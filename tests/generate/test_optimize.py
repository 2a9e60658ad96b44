"""An optimized model is the same model: compiled it writes the same tokens; in 8 bits only blocks change, routers not."""

from __future__ import annotations

import pytest
import torch

from andromeda import Andromeda
from andromeda.ops.float8_inference import Float8DynamicLinear

NAMES = {"dim": 64, "depth": 2, "heads": 4, "dim_head": 16, "num_tokens": 128, "max_seq_len": 128, "alibi_num_heads": 2}


def model(**more: object) -> Andromeda:
    return Andromeda(**{**NAMES, **more}, seed=1).eval()


@pytest.mark.slow
def test_compiled_it_writes_the_same() -> None:
    prompt = list(range(1, 40))
    plain = model().generate(prompt, max_new_tokens=12, temperature=0)
    assert model().optimize_for_inference().generate(prompt, max_new_tokens=12, temperature=0) == plain


def test_only_the_blocks_are_in_8_bits() -> None:
    eight = model().optimize_for_inference(fp8=True, compile=False)
    inside = {name for name, part in eight.named_modules() if isinstance(part, Float8DynamicLinear)}
    assert inside
    assert all(name.startswith("decoder.blocks.") for name in inside)
    assert eight.head.weight.dtype == torch.float32


def test_a_router_keeps_its_type() -> None:
    mixture = model(feedforward={"kind": "moe", "bias": False}).optimize_for_inference(fp8=True, compile=False)
    assert not any("router" in name for name, part in mixture.named_modules() if isinstance(part, Float8DynamicLinear))
    assert mixture(torch.zeros(1, 4, dtype=torch.long)).isfinite().all()
