"""Every parameter has exactly one role, and it is the one its place gives it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from andromeda.config.train import OptimizerConfig
from andromeda.optim import build_optimizer, parameter_roles
from andromeda.utils.errors import ConfigError


class Tiny(nn.Module):
    def __init__(self, tied: bool = False, head_first: bool = False) -> None:
        super().__init__()
        if head_first:
            self.head = nn.Linear(4, 8)
        self.embedding = nn.Embedding(8, 4)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)) for _ in range(2)])
        self.experts = nn.Parameter(torch.zeros(3, 6, 4))
        self.mix = nn.Parameter(torch.ones(2))
        if not head_first:
            self.head = nn.Linear(4, 8)
        if tied:
            self.head.weight = self.embedding.weight


def test_each_kind_of_parameter_has_its_role() -> None:
    found = parameter_roles(Tiny())
    assert found == {
        "embedding.weight": "embedding",
        "blocks.0.0.weight": "matrix",
        "blocks.0.0.bias": "scalar",
        "blocks.0.1.weight": "scalar",
        "blocks.0.1.bias": "scalar",
        "blocks.1.0.weight": "matrix",
        "blocks.1.0.bias": "scalar",
        "blocks.1.1.weight": "scalar",
        "blocks.1.1.bias": "scalar",
        "experts": "matrix",
        "mix": "scalar",
        "head.weight": "head",
        "head.bias": "scalar",
    }


@pytest.mark.parametrize("head_first", [False, True])
def test_a_tied_head_counts_once_and_as_embedding(head_first: bool) -> None:
    model = Tiny(tied=True, head_first=head_first)
    found = parameter_roles(model)
    shared = [name for name in ("embedding.weight", "head.weight") if name in found]
    assert len(shared) == 1
    assert found[shared[0]] == "embedding"
    assert len(build_optimizer(model, OptimizerConfig()).parameters()) == len(list(model.parameters()))


def test_a_parameter_overrides_its_module_and_a_module_its_place() -> None:
    model = Tiny()
    model.experts.role = "embedding"  # type: ignore[attr-defined]
    model.head.role = "matrix"  # type: ignore[assignment]
    model.blocks[0].role = "head"  # type: ignore[assignment]
    found = parameter_roles(model)
    assert (found["experts"], found["head.weight"], found["head.bias"]) == ("embedding", "matrix", "scalar")
    assert (found["blocks.0.0.weight"], found["blocks.1.0.weight"]) == ("head", "matrix")


def test_a_misspelt_role_is_refused_with_the_nearest_one() -> None:
    model = Tiny()
    model.mix.role = "scaler"  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"mix has the role 'scaler' \(did you mean scalar\?\)"):
        parameter_roles(model)


SHAPES = st.lists(st.sampled_from([(3,), (2, 3), (4, 64), (64, 64), (64, 65), (2, 64, 64), ()]), min_size=1, max_size=8)


@settings(max_examples=40, deadline=None)
@given(shapes=SHAPES, tied=st.booleans(), frozen=st.integers(0, 7), kind=st.sampled_from(["adamw", "adamw8bit", "muon"]))
def test_every_trainable_parameter_is_updated_by_exactly_one_group(
    shapes: list[tuple[int, ...]], tied: bool, frozen: int, kind: str
) -> None:
    model = Tiny(tied)
    for index, shape in enumerate(shapes):
        model.register_parameter(f"extra{index}", nn.Parameter(torch.zeros(shape), requires_grad=index != frozen))
    optimizer = build_optimizer(model, OptimizerConfig.model_validate({"kind": kind}))
    grouped = [id(p) for part in optimizer.optimizers for group in part.param_groups for p in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(p) for p in model.parameters() if p.requires_grad}
