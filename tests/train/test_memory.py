"""What cannot fit is refused before it is built; what fits is not."""

from __future__ import annotations

import psutil
import pytest
import torch

from andromeda.config.load import load, presets
from andromeda.config.model import ModelConfig
from andromeda.errors import ConfigError
from andromeda.model.transformer import Transformer
from andromeda.train.memory import check_fits, parameters


def test_the_count_is_that_of_the_model() -> None:
    config = load("nano", ["model.head.tied=true", "model.init.kind=normal"]).model
    assert parameters(config) == sum(weight.numel() for weight in Transformer(config).parameters())


def test_the_limit_is_the_whole_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load("nano").model
    needed = 4 * 3 * parameters(config)
    for total, fits in ((needed, True), (needed - 1, False)):
        monkeypatch.setattr(psutil, "virtual_memory", lambda total=total: type("Memory", (), {"total": total}))
        if fits:
            check_fits(config, torch.device("cpu"), 3)
        else:
            with pytest.raises(ConfigError, match=r"need 0\.0 GiB for weights, gradients and optimizer state alone"):
                check_fits(config, torch.device("cpu"), 3)


@pytest.mark.parametrize("name", presets())
def test_every_preset_is_counted_without_memory(name: str) -> None:
    assert parameters(load(name).model) > 1_000_000


def test_sizes_that_overflow_are_refused_too() -> None:
    huge = ModelConfig(vocab_size=2_000_000_000, width=1_000_000, depth=1)
    with pytest.raises(ConfigError, match="GiB"):
        check_fits(huge, torch.device("cpu"), 1)
