"""Schedules against torch's own and against closed forms."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import lr_scheduler

from andromeda.config.train import ScheduleConfig
from andromeda.optim import build_schedule
from andromeda.utils.errors import ConfigError

STEPS, WARMUP = 50, 8


def torch_factors(make: Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler], count: int) -> list[float]:
    """The rates of the first `count` updates under one of torch's schedulers, with base rate 1."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = make(optimizer)
    rates = []
    for _ in range(count):
        rates.append(float(scheduler.get_last_lr()[0]))
        optimizer.step()
        scheduler.step()
    return rates


def ours(config: ScheduleConfig, steps: int = STEPS) -> list[float]:
    factor = build_schedule(config, steps)
    return [factor(step) for step in range(steps)]


@pytest.mark.parametrize("final", [0.0, 0.1, 1.0])
def test_cosine_equals_torch(final: float) -> None:
    expected = torch_factors(lambda o: lr_scheduler.CosineAnnealingLR(o, STEPS - WARMUP, eta_min=final), STEPS - WARMUP)
    assert ours(ScheduleConfig(kind="cosine", warmup=WARMUP, min_lr_ratio=final))[WARMUP:] == pytest.approx(expected)


@pytest.mark.parametrize("final", [0.0, 0.1])
def test_linear_equals_torch(final: float) -> None:
    expected = torch_factors(lambda o: lr_scheduler.LinearLR(o, 1.0, final, STEPS - WARMUP), STEPS - WARMUP)
    assert ours(ScheduleConfig(kind="linear", warmup=WARMUP, min_lr_ratio=final))[WARMUP:] == pytest.approx(expected)


def test_warmup_equals_torch() -> None:
    expected = torch_factors(lambda o: lr_scheduler.LinearLR(o, 1 / WARMUP, 1.0, WARMUP - 1), STEPS)
    assert ours(ScheduleConfig(kind="constant", warmup=WARMUP)) == pytest.approx(expected)


def test_wsd_is_the_speedruns_trapezoid() -> None:
    """1,530 steps with a 600-step cooldown to zero: 1 until step 930, then the share of steps that remain."""
    factors = ours(ScheduleConfig(kind="wsd", cooldown=600, min_lr_ratio=0.0), 1530)
    assert factors == pytest.approx([min(1.0, (1530 - step) / 600) for step in range(1530)])
    assert factors[930] == 1.0
    assert factors[931] < 1.0


def test_edges() -> None:
    factor = build_schedule(ScheduleConfig(kind="cosine", warmup=4, min_lr_ratio=0.25), 20)
    assert (factor(0), factor(3), factor(4)) == (0.25, 1.0, 1.0)
    assert factor(19) > 0.25
    assert factor(20) == factor(10_000) == pytest.approx(0.25)


@given(
    kind=st.sampled_from(["constant", "linear", "cosine", "wsd"]),
    warmup=st.integers(0, 30),
    cooldown=st.integers(0, 30),
    extra=st.integers(1, 40),
    final=st.floats(0, 1),
)
def test_every_update_moves_and_none_exceeds_the_base_rate(kind: str, warmup: int, cooldown: int, extra: int, final: float) -> None:
    config = ScheduleConfig.model_validate({"kind": kind, "warmup": warmup, "cooldown": cooldown, "min_lr_ratio": final})
    steps = warmup + cooldown + extra
    factors = ours(config, steps)
    assert all(0.0 < f <= 1.0 + 1e-12 for f in factors)
    after = factors[max(0, warmup - 1) :]
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(after))


@pytest.mark.parametrize(
    ("kind", "warmup", "cooldown", "fits"), [("wsd", 6, 5, False), ("wsd", 5, 5, True), ("cosine", 11, 0, False), ("cosine", 5, 99, True)]
)
def test_what_does_not_fit_is_refused(kind: str, warmup: int, cooldown: int, fits: bool) -> None:
    config = ScheduleConfig.model_validate({"kind": kind, "warmup": warmup, "cooldown": cooldown})
    if fits:
        build_schedule(config, 10)
    else:
        with pytest.raises(ConfigError, match="do not fit in 10 steps"):
            build_schedule(config, 10)
