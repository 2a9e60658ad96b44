"""What cannot fit is refused before it is built; what fits is not."""

from __future__ import annotations

from itertools import product
from typing import Literal

import psutil
import pytest
import torch

from andromeda.config.load import load, presets
from andromeda.config.model import ModelConfig
from andromeda.config.run import RunConfig
from andromeda.config.train import TrainConfig
from andromeda.model.transformer import Transformer
from andromeda.train.activation_checkpoint import checkpoint_blocks
from andromeda.train.memory_check import (
    check_activations_fit,
    check_state_fits,
    check_weights_fit,
    count_parameters,
    min_saved_bytes_per_token,
)
from andromeda.utils.errors import ConfigError
from tests.conformance.covering import rows


def test_the_count_is_that_of_the_model() -> None:
    config = load("nano", ["model.head.tied=true", "model.init.kind=normal"]).model
    assert count_parameters(config) == sum(weight.numel() for weight in Transformer(config).parameters())


def test_the_limit_is_the_whole_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load("nano", ["train.optim.kind=adamw"])
    tensors = list(Transformer(config.model).parameters())
    needed = 4 * (4 * sum(p.numel() for p in tensors) + len(tensors))  # weights, gradients, two moments; a step count for each
    for total, fits in ((needed, True), (needed - 1, False)):
        monkeypatch.setattr(psutil, "virtual_memory", lambda total=total: type("Memory", (), {"total": total}))
        if fits:
            check_state_fits(config, torch.device("cpu"))
        else:
            with pytest.raises(ConfigError, match=r"need 0\.0 GiB for weights, gradients and optimizer state alone"):
                check_state_fits(config, torch.device("cpu"))


@pytest.mark.parametrize("name", presets())
def test_every_preset_is_counted_without_memory(name: str) -> None:
    assert count_parameters(load(name).model) > 1_000_000


def test_sizes_that_overflow_are_refused_too() -> None:
    huge = ModelConfig(vocab_size=2_000_000_000, hidden_size=1_000_000, num_layers=1)
    with pytest.raises(ConfigError, match="GiB"):
        check_weights_fit(huge, torch.device("cpu"))


@pytest.mark.parametrize(
    ("name", "checkpointing"), [*((name, "none") for name in [*rows()][::2]), *product([*rows()][::16], ["selective", "full"])]
)
def test_no_more_is_said_to_be_kept_than_is(name: str, checkpointing: Literal["none", "selective", "full"]) -> None:
    model = rows()[name]
    config = RunConfig(model=model, train=TrainConfig(activation_checkpointing=checkpointing))
    live = Transformer(model)
    checkpoint_blocks(live, checkpointing)
    own, kept = {weight.untyped_storage().data_ptr() for weight in live.parameters()}, {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    batch, length = 2, 16
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        logits = live(torch.zeros(batch, length, dtype=torch.long))
    assert logits.requires_grad
    assert batch * length * min_saved_bytes_per_token(config, "fp32") <= sum(kept.values())


def test_rows_that_cannot_fit_are_refused_before_anything_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load("nano", ["train.batch_size=3", "model.max_seq_len=1000"])
    needed = 3 * 1000 * min_saved_bytes_per_token(config, "bf16")
    for total, fits in ((needed, True), (needed - 1, False)):
        monkeypatch.setattr(psutil, "virtual_memory", lambda total=total: type("Memory", (), {"total": total}))
        if fits:
            check_activations_fit(config, torch.device("cpu"), "bf16")
        else:
            with pytest.raises(ConfigError, match="micro-batch of 3 sequences of 1,000 tokens saves at least"):
                check_activations_fit(config, torch.device("cpu"), "bf16")
