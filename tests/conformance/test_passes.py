"""Every legal pair of parts: the ways to run a model agree, and a saved model is the same model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from andromeda.model.transformer import Transformer
from tests.conformance.checks import CHECKS
from tests.conformance.models import ROWS, T, build, ids, logits


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@torch.no_grad()
def test_ways_agree(check: Callable[[Transformer, Tensor], None], row: str) -> None:
    check(build(row), logits(row))


@pytest.mark.parametrize("row", ROWS)
@torch.no_grad()
def test_a_saved_model_is_the_same_model(row: str, tmp_path: Path) -> None:
    model = build(row)
    shared = {"head.weight"} if model.config.head.tied else set()
    save_file({name: value for name, value in model.state_dict().items() if name not in shared}, tmp_path / "model.safetensors")
    other = Transformer(model.config, seed=99).double().eval()
    missing, unexpected = other.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    assert not unexpected
    assert set(missing) == shared
    for block, twin in zip(model.decoder.blocks, other.decoder.blocks, strict=True):
        twin.attention.backend = block.attention.backend
    assert torch.equal(other(ids(), span=T), logits(row))
