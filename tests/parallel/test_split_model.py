"""Layouts that a configuration cannot be trained in: one sentence each, before anything is allocated."""

from __future__ import annotations

import pytest

from andromeda.config.load import load
from andromeda.parallel.layout_rules import check_layout
from andromeda.parallel.split_model import check_model
from andromeda.utils.errors import ConfigError

MOE = ["model.feedforward.kind=moe", "model.feedforward.bias=false", "model.experts.num_experts=8"]


@pytest.mark.parametrize(
    ("changes", "processes", "named"),
    [
        (["parallel.tensor=5"], 5, "model.attention.num_heads"),
        (["parallel.tensor=3"], 3, "inner features"),
        (["parallel.tensor=4", "model.attention.num_kv_heads=2"], 4, "model.attention.num_kv_heads"),
        (["parallel.tensor=2", "model.vocab_size=50257"], 2, "model.vocab_size"),
        (["parallel.tensor=2", "model.num_layers=3", "model.value_embedding.kind=layered"], 2, "model.num_layers"),
        (["parallel.tensor=2", "train.precision=fp8"], 2, "fp8"),
        (["parallel.tensor=2", "train.clip.kind=adaptive"], 2, "adaptive"),
        (["parallel.tensor=2", "parallel.expert=2", *MOE], 4, "parallel.expert"),
        (["parallel.expert=2"], 2, "has none"),
        (["parallel.expert=4", "model.experts.num_experts=6", *MOE[:2]], 4, "num_experts"),
        (["parallel.context=2", "train.seq_len=1022"], 2, "train.seq_len"),
        (["parallel.context=64", "train.seq_len=256", "model.shift.tokens=3"], 64, "token shift"),
        (["parallel.context=2", "parallel.shard=1"], 4, "--nproc 2"),
        (["parallel.tensor=3"], 4, "parallel.tensor = 3"),
    ],
)
def test_layouts_that_do_not_fit_are_refused(changes: list[str], processes: int, named: str) -> None:
    config = load("andromeda", ["train.batch_size=64", *changes])
    with pytest.raises(ConfigError, match=named) as error:
        check_model(config, check_layout(config, processes))
    assert str(error.value).count(". ") == 0


@pytest.mark.parametrize("changes", [["parallel.tensor=2"], ["parallel.context=2"], ["parallel.tensor=2", "parallel.context=2"]])
def test_the_preset_can_be_split(changes: list[str]) -> None:
    config = load("andromeda", changes)
    check_model(config, check_layout(config, 8))
