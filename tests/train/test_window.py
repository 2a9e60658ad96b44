"""Window warm-up against the sizes of the record that introduced it."""

from __future__ import annotations

import pytest

from andromeda.config.train import WindowWarmupConfig
from andromeda.optim.schedules import build_window_warmup


def test_the_speedrun_record() -> None:
    """modded-nanogpt, 2024-12-04: 64 to 1,792 tokens over 1,530 steps, in multiples of 64, never shrinking."""
    window = build_window_warmup(WindowWarmupConfig(start=64, end=1792, step=64), 1530)
    sizes = [window(step) for step in range(1530)]
    assert (sizes[0], sizes[-1]) == (64, 1792)
    assert sizes == sorted(sizes)
    assert {size % 64 for size in sizes} == {0}
    assert all(0 <= size - (64 + 1728 * step / 1529) < 64 for step, size in enumerate(sizes))


@pytest.mark.parametrize("step", [0, 10, 10**6])
def test_off(step: int) -> None:
    assert build_window_warmup(WindowWarmupConfig(), 100)(step) == 0


def test_after_the_end_and_of_one_step() -> None:
    assert build_window_warmup(WindowWarmupConfig(start=10, end=100, step=10), 5)(99) == 100
    assert build_window_warmup(WindowWarmupConfig(start=10, end=100, step=10), 1)(0) == 10
