"""What each method does to the positions, against its definition."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from andromeda.config.load import load
from andromeda.config.run import RunConfig
from andromeda.extend.methods import applicable_methods, parse_methods, position_overrides
from andromeda.extend.training_config import ExtendRequest, configure
from andromeda.model.position import build_alibi, build_rotary
from andromeda.utils.errors import ConfigError

from .conftest import Make

TO = 256
FACTOR = 8


def extended(old: RunConfig, tmp_path: Path, method: str, to: int = TO) -> RunConfig:
    """The configuration after `method`, read back through files as the command does it."""
    from andromeda.config.load import dumps

    (tmp_path / "old.toml").write_text(dumps(old))
    return load(str(tmp_path / "old.toml"), position_overrides(old, to, method))


def table(config: RunConfig, positions: list[float], span: int) -> tuple[Tensor, Tensor]:
    """What a query and a key of ones become at fractional or whole positions (P, R)."""
    rotation = build_rotary(config.model)(torch.tensor([positions], dtype=torch.float64), span, torch.float64)
    ones = torch.ones(1, len(positions), 1, config.model.attention.head_dim, dtype=torch.float64)
    q, k = rotation(ones, ones)
    return q[0, :, 0], k[0, :, 0]


def test_interpolated_positions_are_the_trained_ones(make: Make, tmp_path: Path) -> None:
    old = make()
    new = extended(old, tmp_path, "pi")
    places = [0.0, 3.0, 31.0]
    torch.testing.assert_close(table(new, [FACTOR * p for p in places], TO)[0], table(old, places, 32)[0])


def test_interpolated_xpos_gives_every_distance_the_logit_of_the_distance_it_stands_for(make: Make, tmp_path: Path) -> None:
    old = make(rotary={"kind": "xpos", "scale_base": 64})
    new = extended(old, tmp_path, "pi")
    q, k = table(old, [20.0, 7.0], 32)
    far_q, far_k = table(new, [FACTOR * 20.0 + 5, FACTOR * 7.0 + 5], TO)
    torch.testing.assert_close(far_q[0] @ far_k[1], q[0] @ k[1])


def test_ntk_leaves_the_fastest_pair_and_stretches_the_slowest_by_the_factor(make: Make, tmp_path: Path) -> None:
    old = make()
    new = build_rotary(extended(old, tmp_path, "ntk").model).scaled(TO, torch.device("cpu")).inverse
    before = build_rotary(old.model).scaled(32, torch.device("cpu")).inverse
    torch.testing.assert_close(new[[0, -1]], torch.stack([before[0], before[-1] / FACTOR]))


def test_yarn_follows_the_paper(make: Make, tmp_path: Path) -> None:
    """Equation 23 with its own ramp, and the temperature of equation 22, written out."""
    old = make(rotary={"kind": "rope", "scaling": {"ramp": "rotations"}})
    part = build_rotary(extended(old, tmp_path, "yarn").model)
    theta = 10000.0 ** (-torch.arange(0, 16, 2, dtype=torch.float64) / 16)
    gamma = ((32 * theta / (2 * torch.pi) - 1) / (32 - 1)).clamp(0, 1)
    torch.testing.assert_close(part.scaled(TO, torch.device("cpu")).inverse, (1 - gamma) * theta / FACTOR + gamma * theta)
    assert part.logit_factor == pytest.approx((0.1 * torch.tensor(8.0).log().item() + 1) ** 2)


def test_dynamic_ntk_changes_nothing_up_to_the_trained_context_and_is_ntk_at_the_new_one(make: Make, tmp_path: Path) -> None:
    old = make(alibi={"num_heads": 1})
    new = extended(old, tmp_path, "dynamic-ntk")
    device = torch.device("cpu")
    assert torch.equal(build_rotary(new.model).scaled(32, device).inverse, build_rotary(old.model).scaled(32, device).inverse)
    ntk = extended(old, tmp_path, "ntk")
    torch.testing.assert_close(build_rotary(new.model).scaled(TO, device).inverse, build_rotary(ntk.model).scaled(TO, device).inverse)
    assert new.model.alibi == old.model.alibi


@pytest.mark.parametrize("method", ["alibi-scale", "yarn", "pi"])
def test_alibi_gives_every_distance_the_bias_of_the_distance_it_stands_for(method: str, make: Make, tmp_path: Path) -> None:
    old = make(alibi={"num_heads": 2, "scale": 1.5})
    new = extended(old, tmp_path, method)
    before, after = (build_alibi(c.model)(0, 8, torch.device("cpu")).slopes for c in (old, new))
    assert before is not None
    assert after is not None
    torch.testing.assert_close(after * FACTOR, before)


def test_alibi_alone_leaves_rotation(make: Make, tmp_path: Path) -> None:
    old = make(alibi={"num_heads": 1})
    assert extended(old, tmp_path, "alibi-scale").model.rotary == old.model.rotary


def test_a_extended_run_is_extended_from_its_first_context(make: Make, tmp_path: Path) -> None:
    old = make(alibi={"num_heads": 1})
    once = extended(old, tmp_path, "yarn", 64)
    once = once.model_copy(update={"train": once.train.model_copy(update={"seq_len": 64})})
    twice, direct = extended(once, tmp_path, "yarn"), extended(old, tmp_path, "yarn")
    assert twice.model == direct.model


def test_methods_that_apply(make: Make) -> None:
    assert applicable_methods(make()) == ["yarn", "ntk", "pi", "dynamic-ntk", "none"]
    assert applicable_methods(make(rotary={"kind": "none"}, alibi={"num_heads": 2})) == ["alibi-scale", "none"]
    assert parse_methods("pi, ntk,pi", make()) == ["pi", "ntk"]
    assert parse_methods("all", make(alibi={"num_heads": 1})) == ["yarn", "ntk", "pi", "dynamic-ntk", "alibi-scale", "none"]


@pytest.mark.parametrize(
    ("model", "to", "method", "message"),
    [
        ({}, 32, "yarn", "trained on 32 tokens already"),
        ({"rotary": {"kind": "none"}, "alibi": {"num_heads": 1}}, 64, "ntk", "use alibi-scale or none"),
        ({}, 64, "alibi-scale", "the model has none"),
        ({"embedding": {"absolute": True}}, 64, "none", "embedding.absolute"),
    ],
)
def test_what_cannot_be_extended_is_refused(model: dict[str, object], to: int, method: str, message: str, make: Make) -> None:
    with pytest.raises(ConfigError, match=message):
        position_overrides(make(**model), to, method)


def test_the_continued_training_reads_as_many_tokens_a_step_at_a_share_of_the_rates(old: Path) -> None:
    before = load(str(old))
    new = configure(before, ExtendRequest(str(old), 64, steps=20, lr_scale=0.5), "yarn")
    assert new.train.seq_len * new.train.batch_size == 32 * before.train.batch_size
    assert new.train.optim.lr == pytest.approx(0.5 * before.train.optim.lr)
    assert new.train.steps == 20
    assert not new.data.document_mask
    assert new.data.corpus == before.data.corpus
    assert configure(before, ExtendRequest(str(old), 64, overrides=("train.batch_size=6",)), "yarn").train.batch_size == 6
    with pytest.raises(ConfigError, match="--steps"):
        configure(before, ExtendRequest(str(old), 64, overrides=("train.steps=7",)), "yarn")


def test_muons_companions_slow_down_too(make: Make, tmp_path: Path) -> None:
    from andromeda.config.load import dumps

    base = make()
    muon = base.model_copy(update={"train": base.train.model_copy(update={"optim": base.train.optim.model_copy(update={"kind": "muon"})})})
    (tmp_path / "config.toml").write_text(dumps(muon))
    optim = configure(muon, ExtendRequest(str(tmp_path), 64, lr_scale=0.5), "pi").train.optim
    assert (optim.embedding_lr, optim.head_lr, optim.scalar_lr) == pytest.approx((0.15, 0.002, 0.02))
